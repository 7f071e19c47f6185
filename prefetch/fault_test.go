package prefetch

import (
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"accel"
)

// flipped is b with a wrong byte at an offset.
func flipped(b []byte, at int64) io.Reader {
	bad := bytes.Clone(b)
	bad[at] ^= 0xff
	return bytes.NewReader(bad)
}

// inside returns a fault that damages the blob at one place, as long as again says so.
func inside(place int64, again func() bool) func(int, context.Context, int64, []byte) (io.Reader, error, bool) {
	return func(_ int, _ context.Context, offset int64, b []byte) (io.Reader, error, bool) {
		if offset <= place && place < offset+int64(len(b)) && again() {
			return flipped(b, place-offset), nil, true
		}
		return nil, nil, false
	}
}

func times(n int32) func() bool {
	var used atomic.Int32
	return func() bool { return used.Add(1) <= n }
}

func TestCorruptOnce(t *testing.T) {
	for _, o := range []Options{noBackground, {}} {
		b := start(t, o)
		fx := build(t, random(20), shape{members: 40, most: 30_000, together: 3})
		k := len(fx.chunks) / 2
		c := fx.chunks[k]
		m, r, done := b.add(fx, func(l *Layer) {
			l.Source.(*registry).fault = inside(c.BlobOffset+c.BlobBytes/2, times(1))
			l.Source.(*registry).latency = 10 * time.Millisecond
		})
		b.fill(fx, k, 1)
		m.check(t, k)
		if s := b.sums(); s.corrupt == 0 || s.failedMisses != 0 {
			t.Errorf("%+v", s)
		}
		if o.BackgroundBytesPerSecond >= 0 {
			<-done
		}
		once(t, r, fx, c.BlobBytes+b.sums().skipped+b.sums().overtakes*mostBackgroundBytes+leastWindowBytes)
	}
}

// A chunk that cannot be had right fails the reads of it alone, and not for ever.
func TestCorruptAlways(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(21), shape{members: 60, most: 30_000})
	var bad atomic.Bool
	bad.Store(true)
	c := fx.chunks[30]
	m, r, _ := b.add(fx, func(l *Layer) { l.Source.(*registry).fault = inside(c.BlobOffset+c.BlobBytes/2, bad.Load) })
	if err := b.Fill(t.Context(), fx.digest, 30, 1); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	n := len(r.asked())
	if err := b.Fill(t.Context(), fx.digest, 30, 1); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	for i := range fx.chunks {
		if i != 30 {
			b.fill(fx, i, 1)
			m.check(t, i)
		}
	}
	if m.Has(30) {
		t.Error("the wrong chunk is there")
	}
	eventually(t, "all but one", func() bool { return m.Left() == 1 })
	if got := len(r.asked()); got > n+10 {
		t.Errorf("%d requests after the first %d", got-n, n)
	}
	bad.Store(false)
	eventually(t, "mended", func() bool { return b.Fill(t.Context(), fx.digest, 30, 1) == nil })
	m.check(t, 30)
}

// A TOC that says wrong digests is corruption too.
func TestWrongDigest(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(22), shape{members: 3, most: 5000, together: 4})
	fx.chunks[1].Digest[5] ^= 1
	fx.chunks[2].InnerOffset += 1 << 30 // past the end
	m, _, _ := b.add(fx, nil)
	for i := range fx.chunks {
		err := b.Fill(t.Context(), fx.digest, i, 1)
		if i == 1 || i == 2 {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("chunk %d: %v", i, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("chunk %d: %v", i, err)
			continue
		}
		m.check(t, i)
	}
}

func TestFaultyAnswers(t *testing.T) {
	fx := build(t, random(23), shape{members: 100, most: 30_000, together: 2})
	broken := errors.New("connection reset")
	type fault = func(k int, ctx context.Context, offset int64, b []byte) (io.Reader, error, bool)
	first := func(n int, f fault) fault {
		return func(k int, ctx context.Context, offset int64, b []byte) (io.Reader, error, bool) {
			if k >= n {
				return nil, nil, false
			}
			return f(k, ctx, offset, b)
		}
	}
	for name, f := range map[string]fault{
		"refused": first(3, func(int, context.Context, int64, []byte) (io.Reader, error, bool) { return nil, broken, true }),
		"empty": first(2, func(int, context.Context, int64, []byte) (io.Reader, error, bool) {
			return bytes.NewReader(nil), nil, true
		}),
		"short": first(3, func(_ int, _ context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return bytes.NewReader(b[:len(b)/2]), nil, true
		}),
		"breaks off": first(3, func(_ int, _ context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return io.MultiReader(bytes.NewReader(b[:len(b)/3]), iotest.ErrReader(broken)), nil, true
		}),
		"stalls at once": first(1, func(_ int, ctx context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return &hanging{ctx, bytes.NewReader(nil)}, nil, true
		}),
		"stalls in the middle": first(2, func(_ int, ctx context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return &hanging{ctx, bytes.NewReader(b[:len(b)/3])}, nil, true
		}),
		"with the end": func(_ int, _ context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return iotest.DataErrReader(bytes.NewReader(b)), nil, true
		},
		"in bits": func(_ int, _ context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return iotest.HalfReader(bytes.NewReader(b)), nil, true
		},
		"too much": func(_ int, _ context.Context, offset int64, b []byte) (io.Reader, error, bool) {
			return bytes.NewReader(append(bytes.Clone(b), "and more"...)), nil, true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := start(t, Options{StallPatience: 100 * time.Millisecond})
			m, _, done := b.add(fx, func(l *Layer) { l.Source.(*registry).fault = f })
			for _, i := range []int{0, 70, 30, 31, 32, 99, len(fx.chunks) - 1} {
				b.fill(fx, i, 1)
				m.check(t, i)
			}
			<-done
			for i := range fx.chunks {
				m.check(t, i)
			}
		})
	}
}

// What trickles is given up as what stalls is.
func TestTrickle(t *testing.T) {
	b := start(t, Options{StallPatience: 300 * time.Millisecond, BackgroundBytesPerSecond: -1})
	fx := build(t, random(24), shape{members: 5, most: 300_000})
	m, _, _ := b.add(fx, func(l *Layer) {
		l.Source.(*registry).fault = func(k int, ctx context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return &trickle{ctx, bytes.NewReader(b)}, nil, k == 0
		}
	})
	b.fill(fx, 4, 1)
	m.check(t, 4)
	if s := b.sums(); s.stalls != 1 {
		t.Errorf("%+v", s)
	}
}

type trickle struct {
	ctx context.Context
	r   io.Reader
}

func (r *trickle) Read(p []byte) (int, error) {
	if err := sleep(r.ctx, 20*time.Millisecond); err != nil {
		return 0, err
	}
	return r.r.Read(p[:1])
}

func TestGivesUp(t *testing.T) {
	fx := build(t, random(25), shape{members: 5, most: 3000})
	broken := errors.New("connection refused")
	for name, c := range map[string]struct {
		answer, want error
	}{
		"transient": {broken, ErrImpatient},
		"permanent": {accel.Permanent(broken), broken},
		"gone":      {accel.ErrNotFound, accel.ErrNotFound},
		"416":       {accel.ErrInvalid, accel.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, Options{Patience: 300 * time.Millisecond, BackgroundBytesPerSecond: -1})
			_, _, _ = b.add(fx, func(l *Layer) {
				l.Source.(*registry).fault = func(int, context.Context, int64, []byte) (io.Reader, error, bool) { return nil, c.answer, true }
			})
			if err := b.Fill(t.Context(), fx.digest, 1, 1); !errors.Is(err, c.want) || !errors.Is(err, c.answer) {
				t.Error(err)
			}
			if s := b.sums(); s.failedMisses != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A registry without ranges sends everything, once.
func TestUnranged(t *testing.T) {
	for _, o := range []Options{{}, noBackground} {
		b := start(t, o)
		fx := build(t, random(26), shape{members: 200, most: 30_000, together: 3})
		var whole atomic.Int32
		m, _, done := b.add(fx, func(l *Layer) {
			l.Source = sourceFunc(func(_ context.Context, offset, length int64) (answerBody, error) {
				if offset != 0 || length != -1 {
					return answerBody{}, ErrUnranged
				}
				if whole.Add(1) == 1 {
					return bodyOf(fx.blob[:len(fx.blob)/2]), nil // and breaks off
				}
				return bodyOf(fx.blob), nil
			})
		})
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() { b.fill(fx, len(fx.chunks)-2-i*4, 2) })
		}
		wg.Wait()
		<-done
		for i := range fx.chunks {
			m.check(t, i)
		}
		if n := whole.Load(); n != 2 {
			t.Errorf("fetched %d times", n)
		}
	}
}

func TestRemoveInTheMiddle(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(30), shape{members: 100, most: 100_000})
	m, r, _ := b.add(fx, func(l *Layer) {
		l.Source.(*registry).fault = func(k int, ctx context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return &hanging{ctx, bytes.NewReader(b[:len(b)/2])}, nil, true
		}
		l.Persist = func([]int) error { return nil }
	})
	waits := make(chan error)
	last := len(fx.chunks) - 1
	go func() { waits <- b.Fill(t.Context(), fx.digest, last, 1) }()
	eventually(t, "a miss that waits", func() bool { return len(r.asked()) > 1 && m.Left() < 100 })
	b.Remove(fx.digest)
	if err := <-waits; !errors.Is(err, accel.ErrNotFound) {
		t.Error(err)
	}
	m.mu.Lock()
	puts, unsynced := m.puts, len(m.unsynced)
	m.mu.Unlock()
	if unsynced != 0 {
		t.Errorf("%d chunks are not synced", unsynced)
	}
	b.Remove(fx.digest)
	// It may come back.
	again, _, done := b.add(fx, nil)
	<-done
	again.check(t, last)
	if m.puts != puts {
		t.Error("a layer that was removed is written to")
	}
}

func TestEndInTheMiddle(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(31), shape{members: 100, most: 100_000})
	var marked atomic.Int64
	m, r, _ := b.add(fx, func(l *Layer) {
		l.Source.(*registry).fault = func(k int, ctx context.Context, _ int64, b []byte) (io.Reader, error, bool) {
			return &hanging{ctx, bytes.NewReader(b[:len(b)/2])}, nil, true
		}
		l.Persist = func(chunks []int) error { marked.Add(int64(len(chunks))); return nil }
	})
	waits := make(chan error)
	go func() { waits <- b.Fill(t.Context(), fx.digest, 99, 1) }()
	eventually(t, "a miss that waits", func() bool { return len(r.asked()) > 1 && m.Left() < 100 })
	b.stop()
	if err := <-waits; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if got := int64(100 - m.Left()); marked.Load() != got {
		t.Errorf("%d chunks are marked of %d", marked.Load(), got)
	}
	if err := b.Fill(t.Context(), fx.digest, 99, 1); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := b.Hot(t.Context(), nil); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := b.Add(Layer{Content: fx.memory(), Source: &registry{}}); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	b.Remove(fx.digest)
	if err := b.Run(t.Context()); !errors.Is(err, accel.ErrConflict) {
		t.Error(err)
	}
}

// A batch that is inflated while it comes and ends early keeps its buffer until nothing is written into it any more: the next
// batch would have other bytes in its place.
func TestBufferOfABatchThatEndsEarly(t *testing.T) {
	fx := build(t, random(41), shape{members: 8, most: 30_000})
	m := fx.memory()
	m.putErr = func(int) error { return errors.New("the disk is broken") }
	f, err := New(Options{BackgroundBytesPerSecond: -1, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Add(Layer{Content: m, Source: &registry{blob: fx.blob}}); err != nil {
		t.Fatal(err)
	}
	l := f.layers[fx.digest]
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	fl := &flight{l: l, kind: demand, end: l.members, cancel: cancel, hurry: make(chan struct{})}
	b, _ := f.nextBatch(fl, l.members)
	if b.end < 3 {
		t.Fatalf("a batch of %d members", b.end)
	}
	b.buf = grab(int(b.bytes))
	_, first := l.span(0)
	copy(b.buf, fx.blob[:first])
	b.add(int(first))
	decoded := make(chan struct{})
	go func() {
		defer close(decoded)
		f.decode(fl, b)
	}()
	<-ctx.Done() // the failure ends the flight, and with it what is read
	for range 1000 {
		runtime.Gosched()
	}
	select {
	case <-decoded:
		t.Error("the buffer was given back while the network's side has it")
	default:
	}
	b.fail(context.Cause(ctx))
	<-decoded
}
