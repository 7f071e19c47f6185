package lazyfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// HolderOptions configure RunHolder.
type HolderOptions struct {
	Dir     string // the Host's
	Version string // the Host's
	// Patience is how long a read that misses waits for a daemon that is away; 60 s
	// where zero. Reads that come when that time is over wait for a tenth of it.
	Patience time.Duration
	// FillLimit is how long one fill may take; 5 min where zero.
	FillLimit time.Duration
	// IdleLimit is how long a holder stays that has neither a mount nor a daemon; 1 min
	// where zero.
	IdleLimit time.Duration
	Log       *slog.Logger // the standard error is Dir/<version>.log
}

// A holder's directory is Dir/<version>@<pid>-<time>. In it are:
const (
	holderLock   = "lock" // locked by the living holder
	holderSocket = "s"    // short: the path of a socket has 107 bytes
	holderFuse   = "fuse" // the FUSE mount
)

// startingPrefix begins the directory's name until it is locked; the process ID follows.
const startingPrefix = ".new-"

// holder is the process that serves the layers' files. It knows no network and
// no digests: it answers what is there, and has the daemon bring what is not.
type holder struct {
	o     HolderOptions
	dir   string
	shelf *shelf

	mu      sync.Mutex
	daemon  *peer         // nil while it is away
	away    time.Time     // since when it is
	back    chan struct{} // closed and replaced when a daemon comes
	retired bool
	opened  map[digest.Digest]bool // whose count the daemon is to be told
	wake    chan struct{}          // something changed that may end us, or that the daemon is to be told
	missed  bool                   // a read was given up since the daemon was here: said once
}

// RunHolder is a holder's life. It outlives the daemon that started it, ignores what
// service managers send, and returns nil when it was retired and its last mount is gone, or when it had
// neither a mount nor a daemon for IdleLimit. When ctx ends it leaves the mounts dead.
func RunHolder(ctx context.Context, o HolderOptions) (err error) {
	if err = checkVersion(o.Version); err != nil {
		return err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Patience == 0 {
		o.Patience = time.Minute
	}
	if o.FillLimit == 0 {
		o.FillLimit = 5 * time.Minute
	}
	if o.IdleLimit == 0 {
		o.IdleLimit = time.Minute
	}
	// A broken standard error must not end us either.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	debug.SetGCPercent(25) // little lives long here; the heap may start at 1 MB
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0o600); err != nil {
		o.Log.Warn("not protected from the out-of-memory killer", "error", err)
	}

	dir := filepath.Join(o.Dir, fmt.Sprintf("%s@%d-%x", o.Version, os.Getpid(), time.Now().UnixNano()))
	h := &holder{o: o, dir: dir, away: time.Now(), back: make(chan struct{}), opened: map[digest.Digest]bool{}, wake: make(chan struct{}, 1)}
	h.shelf = newShelf(h.note)
	lock, err := makeHolderDir(dir)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, os.RemoveAll(dir))
		lock.Close()
	}()
	fuse, err := mountFuse(filepath.Join(dir, holderFuse), h.shelf, o.Log)
	if err != nil {
		return err
	}
	fuse.fill = h.fill
	fuse.start()
	defer h.shelf.close()
	ending, end := context.WithCancel(ctx)
	listener, err := listenAt(filepath.Join(dir, holderSocket))
	if err != nil {
		end()
		fuse.abort()
		return err
	}
	var serving sync.WaitGroup
	serving.Go(func() { h.accept(ending, listener) })
	for !h.mayEnd(ctx) || !h.ended(ctx, fuse) {
	}
	end()
	_ = listener.Close() // accept may have
	serving.Wait()
	return context.Cause(ctx)
}

// VersionName is a program's version as Options.Version takes it, whatever is in it: the beginning of text, as far as a
// path can have that, and a digest of all of it.
func VersionName(text string) string {
	const readable, digits = 12, 8
	name := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '-' || r == '+' || r == '.' {
			return r
		}
		return -1
	}, text)
	sum := sha256.Sum256([]byte(text))
	return strings.TrimLeft(name[:min(len(name), readable)], ".") + "-" + hex.EncodeToString(sum[:])[:digits]
}

func checkVersion(v string) error {
	if v == "" || len(v) > 40 || strings.ContainsAny(v, "/@\x00, \n") || v[0] == '.' {
		return fmt.Errorf("version %q cannot be part of a path", v)
	}
	return nil
}

// makeHolderDir locks the directory before it gets the name by which it is found:
// one of that name without a lock is a dead holder's.
func makeHolderDir(dir string) (lock *os.File, err error) {
	temp := filepath.Join(filepath.Dir(dir), fmt.Sprintf("%s%d-%x", startingPrefix, os.Getpid(), time.Now().UnixNano()))
	if err = os.MkdirAll(filepath.Join(temp, holderFuse), 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	lock, err = os.OpenFile(filepath.Join(temp, holderLock), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		err = os.Rename(temp, dir)
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("holder directory: %w", err)
	}
	return lock, nil
}

// listenAt puts the socket in its place when it can be connected to.
func listenAt(path string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(true)
	return l, nil
}

// mayEnd waits until there may be a reason to end, and tells the daemon of layers
// that were opened or released meanwhile.
func (h *holder) mayEnd(ctx context.Context) bool {
	idle := time.NewTimer(h.o.IdleLimit)
	defer idle.Stop()
	select {
	case <-ctx.Done():
		return true
	case <-h.wake:
	case <-idle.C:
	}
	h.mu.Lock()
	daemon := h.daemon
	opened := h.opened
	h.opened = map[digest.Digest]bool{}
	retired, away := h.retired, h.away
	h.mu.Unlock()
	if daemon != nil {
		for d := range opened {
			_ = daemon.send(message{Kind: askOpens, Digest: d, N: h.shelf.opens(d)}) // gone: the next is told everything
		}
	}
	if _, opens := h.shelf.list(); opens > 0 {
		return false
	}
	return retired || daemon == nil && time.Since(away) >= h.o.IdleLimit
}

// ended unmounts, which fails while something is open: the kernel knows better than
// our count, and nothing can be opened after it.
func (h *holder) ended(ctx context.Context, fuse *fuseServer) bool {
	if ctx.Err() != nil {
		fuse.abort()
		return true
	}
	err := fuse.unmount()
	if err != nil && !errors.Is(err, unix.EBUSY) { // somebody else unmounted it
		h.o.Log.Error("unmount", "error", err)
		fuse.abort()
		return true
	}
	return err == nil
}

// note is the shelf's word that a layer was opened or released.
func (h *holder) note(d digest.Digest) {
	h.mu.Lock()
	h.opened[d] = true
	h.mu.Unlock()
	h.stir()
}

func (h *holder) stir() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}
