package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// errStalled ends a transfer that moved too little for too long.
var errStalled = errors.New("the transfer stalled")

// minMovedBytes is what a transfer must move within the stall timeout.
const minMovedBytes = 1 << 10

// stallWatch cancels a transfer that moves less than minMovedBytes while it
// waits for the network for limit. Time that the other side of the program
// takes (a slow consumer, a slow source) does not count: only what passes
// between begin and end does.
type stallWatch struct {
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	limit   time.Duration
	timer   *time.Timer
	since   time.Time
	waiting bool
	ended   bool
	spent   time.Duration // waited since the last minMovedBytes
	moved   int64
}

func newStallWatch(limit time.Duration, cancel context.CancelCauseFunc) *stallWatch {
	w := &stallWatch{cancel: cancel, limit: limit}
	w.timer = time.AfterFunc(limit, w.expired)
	w.timer.Stop()
	return w
}

func (w *stallWatch) expired() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting && !w.ended {
		w.cancel(fmt.Errorf("%w: less than %d bytes in %v", errStalled, minMovedBytes, w.limit))
	}
}

// begin starts a wait for the network.
func (w *stallWatch) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended || w.waiting {
		return
	}
	w.waiting, w.since = true, time.Now()
	w.timer.Reset(w.limit - w.spent)
}

// end ends a wait in which n bytes were moved.
func (w *stallWatch) end(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting {
		w.timer.Stop()
		w.waiting = false
		w.spent += time.Since(w.since)
	}
	w.moved += int64(n)
	if w.moved >= minMovedBytes {
		w.moved, w.spent = 0, 0
	}
}

// restart begins a wait under another limit.
func (w *stallWatch) restart(limit time.Duration) {
	w.end(minMovedBytes)
	w.mu.Lock()
	w.limit = limit
	w.mu.Unlock()
	w.begin()
}

// stop ends the watch for good.
func (w *stallWatch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer.Stop()
	w.ended = true
}

// uploadBody is a request's body under a watch: the network's time is what
// passes between net/http's reads.
type uploadBody struct {
	io.ReadCloser
	watch     *stallWatch
	sizeBytes int64
	// answerLimit is how long the registry may take for its answer once it has
	// all of the body: it may have to store and hash it first.
	answerLimit time.Duration
	last        int   // bytes of the latest Read, which the next one shows as sent
	total       int64 // bytes read

	mu  sync.Mutex
	err error // the source's own, not the network's
}

func (b *uploadBody) Read(p []byte) (int, error) {
	b.watch.end(b.last)
	n, err := b.ReadCloser.Read(p)
	b.last = n
	b.total += int64(n)
	switch {
	case err == nil:
		b.watch.begin()
		return n, nil
	case err != io.EOF:
		b.fail(err)
	case b.total != b.sizeBytes:
		b.fail(fmt.Errorf("content of %d bytes where %d were announced", b.total, b.sizeBytes))
	}
	b.watch.restart(b.answerLimit)
	return n, err
}

func (b *uploadBody) Close() error {
	b.watch.restart(b.answerLimit)
	return b.ReadCloser.Close()
}

func (b *uploadBody) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
}

func (b *uploadBody) sourceError() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// downloadBody is a response's body under a watch. Close also ends the
// request's context.
type downloadBody struct {
	io.ReadCloser
	ctx   context.Context
	watch *stallWatch
}

func (b *downloadBody) Read(p []byte) (int, error) {
	b.watch.begin()
	n, err := b.ReadCloser.Read(p)
	b.watch.end(n)
	if err != nil && !errors.Is(err, io.EOF) && b.ctx.Err() != nil {
		err = context.Cause(b.ctx)
	}
	return n, err
}

func (b *downloadBody) Close() error {
	b.watch.stop()
	err := b.ReadCloser.Close()
	b.watch.cancel(context.Canceled)
	return err
}
