package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// startLimit is how long a holder may take to answer after it was started.
	startLimit = 10 * time.Second
	// releaseLimit is how long it may take, on a busy machine, until a holder has heard
	// from the kernel that an unmounted layer is closed.
	releaseLimit = 5 * time.Second
)

// holderLink is the daemon's end of the connection to a holder.
type holderLink struct {
	name    string
	dir     string
	version string
	peer    *peer

	mu   sync.Mutex
	open map[digest.Digest]int // its layers, and how often each is open
	met  bool                  // all of its layers are in open
}

// holderPID is in the holder's name.
func holderPID(name string) int {
	_, rest, _ := strings.Cut(name, "@")
	digits, _, _ := strings.Cut(rest, "-")
	pid, err := strconv.Atoi(digits)
	if err != nil {
		return 0
	}
	return pid
}

// connect makes that holder one of ours.
func (h *Host) connect(r *run, name string) (*holderLink, error) {
	ctx, cancel := context.WithTimeout(r.ctx, startLimit)
	defer cancel()
	// A holder drops one connection for another: there must not be two that take turns.
	unlock, err := h.starting.Lock(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	h.mu.Lock()
	link := h.holders[name]
	h.mu.Unlock()
	if link != nil && link.peer.alive() {
		return link, nil
	}
	dir := filepath.Join(h.o.Dir, name)
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dir, holderSocket))
	if err != nil {
		return nil, err
	}
	link = &holderLink{name: name, dir: dir, peer: newPeer(conn), open: map[digest.Digest]int{}}
	link.version, _, _ = strings.Cut(name, "@")
	greeted := make(chan bool, 1)
	r.working.Go(func() {
		err := link.peer.serve(r.ctx, func(ctx context.Context, m message) (message, bool) {
			switch m.Kind {
			case askFill:
				return h.fill(ctx, r, m)
			case askOpens:
				link.opened(m.Digest, m.N)
				return message{}, false
			}
			return refuse(fmt.Errorf("unknown question %q", m.Kind)), true
		})
		if <-greeted && r.ctx.Err() == nil {
			h.o.Log.Debug("holder left", "holder", name, "error", err)
			h.left(r, link)
		}
	})
	hello, err := link.peer.ask(ctx, message{Kind: askHello})
	if err != nil {
		greeted <- false
		link.peer.close()
		return nil, fmt.Errorf("greet holder %s: %w", name, err)
	}
	link.greeted(hello.Layers)
	h.mu.Lock()
	h.holders[name] = link
	h.mu.Unlock()
	greeted <- true
	return link, nil
}

// opened takes a holder's note, which may come after its answer that it has removed the layer.
func (l *holderLink) opened(d digest.Digest, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, has := l.open[d]; has || !l.met {
		l.open[d] = n
	}
}

// greeted takes what the holder said at first. What it noted since is newer, and may have come before.
func (l *holderLink) greeted(layers []heldLayer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, layer := range layers {
		if _, noted := l.open[layer.Digest]; !noted {
			l.open[layer.Digest] = layer.Opens
		}
	}
	l.met = true
}

func (l *holderLink) layers() map[digest.Digest]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.open)
}

func (l *holderLink) add(ctx context.Context, layer *Layer) error {
	_, err := l.peer.ask(ctx, message{Kind: askAdd, Layers: []heldLayer{
		{Digest: layer.digest, Table: layer.files.Table, Data: layer.files.Data, Bits: layer.bits, Reads: layer.times},
	}})
	if err != nil {
		return fmt.Errorf("hand layer %s to holder: %w", layer.digest, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, noted := l.open[layer.digest]; !noted {
		l.open[layer.digest] = 0
	}
	return nil
}

// remove has the holder forget the layer. One that has gone has; one that was stopped is not waited for without end.
func (l *holderLink) remove(ctx context.Context, d digest.Digest) error {
	ctx, cancel := context.WithTimeout(ctx, releaseLimit+startLimit)
	defer cancel()
	patience := time.Now().Add(releaseLimit)
	for {
		_, err := l.peer.ask(ctx, message{Kind: askRemove, Digest: d})
		switch {
		case err == nil:
			l.mu.Lock()
			delete(l.open, d)
			l.mu.Unlock()
			return nil
		case errors.Is(err, errGone):
			return nil
		case !errors.Is(err, ErrInUse) || time.Now().After(patience):
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
}

// leaves reports whether a holder, which was just told of a layer and does not show it, has unmounted and ends; it waits
// for that.
func (l *holderLink) leaves(ctx context.Context, d digest.Digest) bool {
	if _, err := os.Stat(filepath.Join(l.dir, holderFuse, fileName(d))); !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	limit := time.NewTimer(releaseLimit)
	defer limit.Stop()
	select {
	case <-l.peer.gone:
		return true
	case <-limit.C:
	case <-ctx.Done():
	}
	return false
}

func (h *Host) links() []*holderLink {
	h.mu.Lock()
	defer h.mu.Unlock()
	links := make([]*holderLink, 0, len(h.holders))
	for _, l := range h.holders {
		links = append(links, l)
	}
	return links
}

// allLinks are those to all holders that live. ErrInUse where there is no connection to one, which may serve anything; one that
// is just being started is waited for.
func (h *Host) allLinks(ctx context.Context) ([]*holderLink, error) {
	unlock, err := h.starting.Lock(ctx, "")
	if err != nil {
		return nil, err
	}
	defer unlock()
	names, err := h.holderNames()
	if err != nil {
		return nil, err
	}
	links := h.links()
	for _, name := range names {
		if !slices.ContainsFunc(links, func(l *holderLink) bool { return l.name == name }) && !h.dead(name) {
			return nil, fmt.Errorf("%w: holder %s lives and does not answer", ErrInUse, name)
		}
	}
	return links, nil
}

// Retire has the holders of other versions end with their last mounts. It waits until Run has adopted
// them.
func (h *Host) Retire(ctx context.Context) error {
	select {
	case <-h.adopted:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var errs []error
	for _, l := range h.links() {
		if l.version == h.o.Version {
			continue
		}
		if _, err := l.peer.ask(ctx, message{Kind: askRetire}); err != nil && !errors.Is(err, errGone) {
			errs = append(errs, fmt.Errorf("retire holder %s: %w", l.name, err))
		}
	}
	return errors.Join(errs...)
}
