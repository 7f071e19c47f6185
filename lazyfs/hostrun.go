package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// run is what Run owns.
type run struct {
	ctx     context.Context
	working sync.WaitGroup
	// failures are said this often: a registry that is down fails every read.
	failures rate.Sometimes
}

// Run adopts the holders and mounts of a former daemon, clears away what it left otherwise, starts
// a holder and answers what holders miss, until ctx ends. The layers of living mounts have to be
// Added before: reads of others fail. It may be called once.
func (h *Host) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	r := &run{ctx: ctx, failures: rate.Sometimes{First: 3, Interval: 10 * time.Second}}
	h.mu.Lock()
	if h.running != nil || h.closed {
		h.mu.Unlock()
		cancel()
		return errors.New("lazyfs: Run was called before, or Close")
	}
	h.running = r
	h.mu.Unlock()
	defer r.working.Wait()
	defer cancel()

	if err := h.adopt(r); err != nil {
		return err
	}
	close(h.adopted)
	r.working.Go(func() {
		// Mount starts one where there is none. Now there is time, then somebody waits.
		if _, err := h.holder(ctx); err != nil && ctx.Err() == nil {
			h.o.Log.Error("layers cannot be mounted lazily", "error", err)
		}
	})
	<-ctx.Done()
	return context.Cause(ctx)
}

// adopt finds what a former daemon left in Dir.
func (h *Host) adopt(r *run) error {
	if err := h.clearStarting(); err != nil {
		return err
	}
	names, err := h.holderNames()
	if err != nil {
		return err
	}
	needed, silent := map[string]bool{}, false
	for _, name := range names {
		if h.dead(name) {
			h.bury(r, name, nil)
			continue
		}
		link, err := h.connect(r, name)
		if err != nil {
			h.o.Log.Error("a holder lives and does not answer", "holder", name, "error", err)
			silent = true
			r.working.Go(func() { h.reconnect(r, name, nil) })
			continue
		}
		for d, opens := range link.layers() {
			needed[fileName(d)] = true
			if _, ok := h.Layer(d); !ok && opens > 0 {
				h.o.Log.Error("a mounted layer is unknown, reads of it fail", "layer", d)
			}
		}
	}
	// What is named after a holder that is not there any more.
	sources, err := readNames(filepath.Join(h.o.Dir, sourcesDir))
	if err != nil {
		return err
	}
	for _, name := range sources {
		if name != plainSource && !slices.Contains(names, name) {
			h.bury(r, name, nil)
		}
	}
	bitmaps, err := readNames(filepath.Join(h.o.Dir, bitsDir))
	if err != nil {
		return err
	}
	for _, file := range bitmaps {
		if isNew(filepath.Join(h.o.Dir, bitsDir, file)) {
			continue // Add is making it just now
		}
		name := strings.TrimSuffix(file, readsSuffix)
		d := digest.NewDigestFromEncoded(digest.SHA256, name)
		unlock, err := h.byDigest.Lock(r.ctx, string(d)) // Add may be about to know it
		if err != nil {
			return err
		}
		if _, known := h.Layer(d); !known && !needed[name] && !silent {
			h.unlink(filepath.Join(h.o.Dir, bitsDir, file))
		}
		unlock()
	}
	return nil
}

// isNew reports whether a file is one that is being made, and no crash can have left.
func isNew(path string) bool {
	info, err := os.Stat(path)
	return err == nil && strings.HasPrefix(info.Name(), newPrefix) && time.Since(info.ModTime()) < time.Minute
}

func readNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// clearStarting removes what holders left that died before they were found.
func (h *Host) clearStarting() error {
	names, err := readNames(h.o.Dir)
	for _, name := range names {
		rest, is := strings.CutPrefix(name, startingPrefix)
		if is && errors.Is(unix.Kill(holderPID("@"+rest), 0), unix.ESRCH) {
			if err := os.RemoveAll(filepath.Join(h.o.Dir, name)); err != nil {
				h.o.Log.Warn("remove", "error", err)
			}
		}
	}
	return err
}

// holderNames are the holders' directories in Dir, the dead ones' too.
func (h *Host) holderNames() ([]string, error) {
	names, err := readNames(h.o.Dir)
	return slices.DeleteFunc(names, func(name string) bool { return !strings.Contains(name, "@") }), err
}

// dead reports whether no process holds that holder's lock. What cannot be found out, as without descriptors, is no death:
// the mounts of a holder that is buried alive are lost.
func (h *Host) dead(name string) bool {
	f, err := os.Open(filepath.Join(h.o.Dir, name, holderLock))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	return err == nil
}

// alive reports whether mounts through that holder work.
func (h *Host) alive(name string) bool {
	h.mu.Lock()
	link := h.holders[name]
	h.mu.Unlock()
	return link != nil && link.peer.alive() || !h.dead(name)
}

// left is called when the connection to a holder has ended by itself.
func (h *Host) left(r *run, link *holderLink) {
	h.mu.Lock()
	if h.holders[link.name] == link {
		delete(h.holders, link.name)
	}
	h.mu.Unlock()
	h.reconnect(r, link.name, link.layers())
}

// reconnect tries until it works or the holder is dead.
func (h *Host) reconnect(r *run, name string, open map[digest.Digest]int) {
	for r.ctx.Err() == nil {
		if h.dead(name) {
			h.bury(r, name, open)
			h.reap(holderPID(name))
			return
		}
		if _, err := h.connect(r, name); err == nil {
			return
		}
		select {
		case <-r.ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// reap ends the zombie where the holder was our child.
func (h *Host) reap(pid int) {
	h.mu.Lock()
	ours := h.children[pid]
	delete(h.children, pid)
	h.mu.Unlock()
	if ours {
		reap(pid)
	}
}

func reap(pid int) {
	for range 100 { // its lock goes a moment before it does
		got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
		if got != 0 || err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// fill answers a holder.
func (h *Host) fill(ctx context.Context, r *run, m message) (message, bool) {
	l, ok := h.Layer(m.Digest)
	if !ok {
		return refuse(fmt.Errorf("%w: %s", ErrUnknown, m.Digest)), true
	}
	if m.First < 0 || m.N <= 0 || m.N > l.Len()-m.First {
		return refuse(fmt.Errorf("layer %s has no chunks %d to %d", m.Digest, m.First, m.First+m.N)), true
	}
	if l.hasAll(m.First, m.N) {
		return message{}, true
	}
	err := h.o.Filler.Fill(ctx, l, m.First, m.N)
	if r.ctx.Err() != nil {
		return message{}, false // we are ending: the reader waits for the next daemon
	}
	if err == nil {
		return message{}, true
	}
	if ctx.Err() == nil {
		r.failures.Do(func() {
			h.o.Log.Error("a read gets EIO", "layer", m.Digest, "chunk", m.First, "chunks", m.N, "error", err)
		})
	}
	return refuse(err), true
}
