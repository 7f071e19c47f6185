package prefetch

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"accel"
)

// registry is a Source from memory, over a link that may be slow and with faults.
type registry struct {
	blob    []byte
	latency time.Duration
	link    *shaper       // nil: endless
	single  time.Duration // that a connection takes for each 64 KiB, beside others
	// fault may answer a request by itself (or change its bytes); ok is false where it does not.
	fault func(request int, ctx context.Context, offset int64, b []byte) (body io.Reader, err error, ok bool)

	mu       sync.Mutex
	requests [][2]int64
	open     int
	mostOpen int
}

func (r *registry) Range(ctx context.Context, offset, length int64) (io.ReadCloser, error) {
	r.mu.Lock()
	k := len(r.requests)
	r.requests = append(r.requests, [2]int64{offset, length})
	r.open++
	r.mostOpen = max(r.mostOpen, r.open)
	r.mu.Unlock()
	gone := func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.open--
	}
	if err := sleep(ctx, r.latency); err != nil {
		gone()
		return nil, err
	}
	if length < 0 {
		length = int64(len(r.blob)) - offset
	}
	if offset < 0 || offset+length > int64(len(r.blob)) {
		gone()
		return nil, fmt.Errorf("%w: 416", accel.ErrInvalid)
	}
	b := r.blob[offset : offset+length]
	if r.fault != nil {
		if body, err, ok := r.fault(k, ctx, offset, b); ok {
			if err != nil {
				gone()
				return nil, err
			}
			return &answer{r: r, ctx: ctx, body: body, gone: sync.OnceFunc(gone)}, nil
		}
	}
	return &answer{r: r, ctx: ctx, body: bytes.NewReader(b), gone: sync.OnceFunc(gone)}, nil
}

func (r *registry) asked() [][2]int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([][2]int64(nil), r.requests...)
}

type answer struct {
	r    *registry
	ctx  context.Context
	body io.Reader
	gone func()
}

func (a *answer) Read(p []byte) (int, error) {
	if err := a.ctx.Err(); err != nil {
		return 0, err
	}
	p = p[:min(len(p), 64<<10)]
	if a.r.single > 0 {
		if err := sleep(a.ctx, a.r.single); err != nil {
			return 0, err
		}
	}
	n, err := a.body.Read(p)
	if a.r.link != nil {
		if err := a.r.link.take(a.ctx, n); err != nil {
			return 0, err
		}
	}
	return n, err
}

func (a *answer) Close() error {
	a.gone()
	return nil
}

// hanging sends b and then nothing until the request ends.
type hanging struct {
	ctx context.Context
	b   io.Reader
}

func (h *hanging) Read(p []byte) (int, error) {
	if n, _ := h.b.Read(p); n > 0 {
		return n, nil
	}
	<-h.ctx.Done()
	return 0, h.ctx.Err()
}

// shaper is a link that its users share.
type shaper struct {
	bytesPerSecond float64
	mu             sync.Mutex
	free           time.Time
}

func (s *shaper) take(ctx context.Context, n int) error {
	s.mu.Lock()
	now := time.Now()
	if s.free.Before(now) {
		s.free = now
	}
	s.free = s.free.Add(time.Duration(float64(n) / s.bytesPerSecond * 1e9))
	wait := s.free.Sub(now)
	s.mu.Unlock()
	if wait < time.Millisecond {
		return nil
	}
	return sleep(ctx, wait)
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sourceFunc and answerBody are for sources that are a few lines in a test.
type sourceFunc func(ctx context.Context, offset, length int64) (answerBody, error)

type answerBody struct{ io.Reader }

func (answerBody) Close() error { return nil }

func bodyOf(b []byte) answerBody { return answerBody{bytes.NewReader(b)} }

func (f sourceFunc) Range(ctx context.Context, offset, length int64) (io.ReadCloser, error) {
	body, err := f(ctx, offset, length)
	if err != nil {
		return nil, err
	}
	return body, nil
}
