package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// accept takes one daemon after the other. There are never two: a new one means that the
// old is dead.
func (h *holder) accept(ctx context.Context, l *net.UnixListener) {
	var serving sync.WaitGroup
	defer serving.Wait()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				h.o.Log.Error("accept", "error", err)
				time.Sleep(100 * time.Millisecond) // out of descriptors: some will come back
				continue
			}
			return
		}
		p := newPeer(conn)
		serving.Go(func() {
			err := p.serve(ctx, func(ctx context.Context, m message) (message, bool) { return h.answer(p, m), true })
			h.left(p)
			h.o.Log.Info("daemon left", "error", err)
		})
	}
}

// answer is what a holder does for its daemon.
func (h *holder) answer(p *peer, m message) message {
	switch m.Kind {
	case askHello:
		h.arrived(p)
		layers, _ := h.shelf.list()
		return message{Version: h.o.Version, PID: os.Getpid(), Layers: layers}
	case askAdd:
		if len(m.Layers) != 1 {
			return refuse(errors.New("one layer at a time"))
		}
		if err := m.Layers[0].Digest.Validate(); err != nil {
			return refuse(err)
		}
		if err := h.shelf.add(m.Layers[0]); err != nil {
			return refuse(err)
		}
		return message{}
	case askRemove:
		if err := m.Digest.Validate(); err != nil {
			return refuse(err)
		}
		if err := h.shelf.remove(m.Digest); err != nil {
			return refuse(err)
		}
		return message{}
	case askRetire:
		h.mu.Lock()
		h.retired = true
		h.mu.Unlock()
		h.stir()
		return message{}
	}
	return refuse(fmt.Errorf("unknown question %q", m.Kind))
}

func (h *holder) arrived(p *peer) {
	h.mu.Lock()
	old := h.daemon
	h.daemon, h.missed = p, false
	close(h.back)
	h.back = make(chan struct{})
	h.mu.Unlock()
	if old != nil && old != p {
		old.close()
	}
}

func (h *holder) left(p *peer) {
	h.mu.Lock()
	if h.daemon == p {
		h.daemon, h.away = nil, time.Now()
	}
	h.mu.Unlock()
	h.stir()
}

// errAway: the daemon did not come back in time.
var errAway = errors.New("no daemon")

// fill returns nil when the chunks of f are there, as the daemon says. A daemon that goes
// away meanwhile is waited for, and the next one is asked again.
func (h *holder) fill(f *held, first, n int, interrupted <-chan struct{}) error {
	limit := time.NewTimer(h.o.FillLimit)
	defer limit.Stop()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-interrupted:
			cancel(errInterrupted)
		case <-limit.C:
			cancel(context.DeadlineExceeded)
		case <-done:
		}
	}()
	began := time.Now()
	for {
		daemon, err := h.awaitDaemon(ctx, began)
		if err == nil {
			_, err = daemon.ask(ctx, message{Kind: askFill, Digest: f.layer.Digest, First: first, N: n})
			if errors.Is(err, errGone) {
				began = time.Now() // it was there until now
				h.left(daemon)
				continue
			}
		}
		if errors.Is(err, errAway) || errors.Is(err, context.DeadlineExceeded) {
			h.gaveUp(err)
		} // what the daemon refused, it has logged
		return err
	}
}

// awaitDaemon waits until the daemon was away for Patience, or for a tenth of
// Patience since began where that is later: kernels repeat a read that failed.
func (h *holder) awaitDaemon(ctx context.Context, began time.Time) (*peer, error) {
	for {
		h.mu.Lock()
		daemon, away, back := h.daemon, h.away, h.back
		h.mu.Unlock()
		if daemon != nil {
			return daemon, nil
		}
		until := away.Add(h.o.Patience)
		if least := began.Add(h.o.Patience / 10); least.After(until) {
			until = least
		}
		patience := time.NewTimer(time.Until(until))
		select {
		case <-back:
		case <-patience.C:
			return nil, errAway
		case <-ctx.Done():
			patience.Stop()
			return nil, context.Cause(ctx)
		}
		patience.Stop()
	}
}

func (h *holder) gaveUp(err error) {
	h.mu.Lock()
	first := !h.missed
	h.missed = true
	h.mu.Unlock()
	if first {
		h.o.Log.Error("reads of what is missing fail until a daemon is back", "error", err)
	}
}
