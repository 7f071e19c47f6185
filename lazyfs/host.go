package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"accel/internal/keylock"

	"github.com/opencontainers/go-digest"
)

// Options configure NewHost.
type Options struct {
	// Dir is a short path on a tmpfs, e.g. /run/accel/lazyfs: it survives the daemon, not
	// the machine. Nobody else may be able to write there.
	Dir string
	// Version names the holder that serves new mounts: there is one for each version,
	// and an old one ends with its last mount (Retire).
	Version string
	// Holder is the command that starts a holder: RunHolder with this Dir and Version.
	// It gets a session of its own and outlives the daemon.
	Holder []string
	// Filler brings what readers miss.
	Filler Filler
	// HolderDied is told the layers of mounts whose holder is gone: reads from them
	// give EIO from now on. Mounting one again at its target gives it a new holder.
	HolderDied func(digests []digest.Digest)
	Log        *slog.Logger
	// ForceLoop mounts through loop devices even where the kernel can do without.
	ForceLoop bool
}

// Filler brings chunks that readers wait for.
type Filler interface {
	// Fill returns when those of the chunks [first, first+n) that were missing have been Put. An error is
	// EIO to whoever reads. ctx ends when nobody waits any more.
	Fill(ctx context.Context, l *Layer, first, n int) error
}

// Host is the daemon's side: it has the layers, mounts them, and answers what
// holders miss. There may be one for a Dir at a time.
type Host struct {
	o Options

	// byDigest serialises what is done with a layer's mounts, starting what is done with a
	// holder's connection (by name) and the starting of holders ("").
	byDigest, starting keylock.Mutex

	mu       sync.Mutex
	layers   map[digest.Digest]*Layer
	holders  map[string]*holderLink // the living, by name
	children map[int]bool           // the holders that we started, by process ID
	running  *run                   // nil before Run
	adopted  chan struct{}          // closed when Run has found what a former daemon left
	closed   bool
}

// NewHost prepares Dir. Next, Add the layers that may be mounted, then Run.
func NewHost(o Options) (*Host, error) {
	if err := checkVersion(o.Version); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(o.Dir) {
		return nil, fmt.Errorf("%s is not an absolute path", o.Dir)
	}
	if len(o.Holder) == 0 || o.Filler == nil || o.Log == nil {
		return nil, errors.New("lazyfs.Options: Holder, Filler and Log must be set")
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, bitsDir), 0o700); err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(o.Dir) // as mountinfo has it
	if err != nil {
		return nil, err
	}
	o.Dir = dir
	// Dir, the version, a process ID and a time make the path of a socket.
	if longest := len(dir) + len("/") + len(o.Version) + len("@4194304-7fffffffffffffff/s"); longest > 107 {
		return nil, fmt.Errorf("%s is too long a path for sockets in it", dir)
	}
	return &Host{o: o, layers: map[digest.Digest]*Layer{}, holders: map[string]*holderLink{}, children: map[int]bool{}, adopted: make(chan struct{})}, nil
}

const (
	bitsDir     = "bits"   // in Dir, has the bitmaps
	readsSuffix = ".reads" // of the files beside them that say what was read
)

// Add makes a layer known; d is a SHA-256 digest. has tells which chunks are durable, as the store's
// index knows; what a living holder's bitmap knows beyond that is there too. A layer that
// was added is returned as it is. Errors: ErrDamaged, ErrClosed, I/O.
func (h *Host) Add(d digest.Digest, f Files, has func(chunk int) bool) (*Layer, error) {
	if err := d.Validate(); err != nil || d.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("layer %q: not a SHA-256 digest", d)
	}
	unlock, err := h.byDigest.Lock(context.Background(), string(d)) // mounting takes a moment at most
	if err != nil {
		return nil, err
	}
	defer unlock()
	if l, ok := h.Layer(d); ok {
		return l, nil
	}
	l, err := openLayer(d, f, filepath.Join(h.o.Dir, bitsDir, fileName(d)), has)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", d, err)
	}
	if err := l.keepReads(filepath.Join(h.o.Dir, bitsDir, fileName(d)+readsSuffix)); err != nil {
		h.o.Log.Warn("what is read of a layer is not known", "layer", d, "error", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, errors.Join(ErrClosed, l.close())
	}
	h.layers[d] = l
	return l, nil
}

// Layer is the layer that was added as d.
func (h *Host) Layer(d digest.Digest) (*Layer, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, ok := h.layers[d]
	return l, ok
}

// Remove forgets a layer; its files are the caller's to delete. unread, which may be nil, is called when nobody can
// read it any more, before it is closed: what fills it ends there, and not earlier, for a container's mount is not always one
// that we see. Once Run has begun it waits until that has adopted what a former daemon left. Errors: ErrInUse while it is mounted, or something still has a mount open that was taken away (found out
// after 5 s, or when ctx ends), or a holder lives and does not answer.
func (h *Host) Remove(ctx context.Context, d digest.Digest, unread func()) error {
	h.mu.Lock()
	r := h.running
	h.mu.Unlock()
	if r != nil {
		select {
		case <-h.adopted:
		case <-r.ctx.Done(): // it may have failed to
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	unlock, err := h.byDigest.Lock(ctx, string(d))
	if err != nil {
		return err
	}
	defer unlock()
	l, ok := h.Layer(d)
	if !ok {
		if unread != nil {
			unread()
		}
		return nil
	}
	mounts, _, err := mountsOf(ctx, h.o.Dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.Digest == d {
			return fmt.Errorf("%w: %s is mounted at %s", ErrInUse, d, m.Target)
		}
	}
	links, err := h.allLinks(ctx)
	if err != nil {
		return fmt.Errorf("layer %s may be open: %w", d, err)
	}
	for _, link := range links {
		if err = link.remove(ctx, d); err != nil {
			return err
		}
		h.unlink(filepath.Join(h.o.Dir, sourcesDir, link.name, fileName(d)))
	}
	if unread != nil {
		unread()
	}
	h.unlink(filepath.Join(h.o.Dir, sourcesDir, plainSource, fileName(d)))
	h.unlink(l.bits)
	if l.times != "" {
		h.unlink(l.times)
	}
	h.mu.Lock()
	delete(h.layers, d)
	h.mu.Unlock()
	if err := l.close(); err != nil { // it is removed all the same
		h.o.Log.Warn("close", "layer", d, "error", err)
	}
	return nil
}

// unlink is for what the next start clears away too.
func (h *Host) unlink(path string) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		h.o.Log.Warn("remove", "error", err)
	}
}

// Close lets go of the layers; it unmounts nothing and ends no holder. Run has to have ended.
func (h *Host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	errs := make([]error, 0, len(h.layers))
	for _, l := range h.layers {
		errs = append(errs, l.close())
	}
	clear(h.layers)
	return errors.Join(errs...)
}

// Mounts are all our mounts of this moment, of former daemons too.
func (h *Host) Mounts() ([]MountInfo, error) {
	mounts, _, err := mountsOf(context.Background(), h.o.Dir)
	return mounts, err
}
