package prefetch

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
)

// With a full disk, reads of what cannot be written fail, the background waits, and all goes on when there is room.
func TestDiskFull(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(27), shape{members: 100, most: 30_000})
	var full atomic.Bool
	full.Store(true)
	m, r, done := b.add(fx, func(l *Layer) {
		l.Content.(*memory).putErr = func(int) error {
			if full.Load() {
				return syscall.ENOSPC
			}
			return nil
		}
		l.Reserve = func(int64) (func(), error) {
			if full.Load() {
				return nil, syscall.ENOSPC
			}
			return func() {}, nil
		}
	})
	eventually(t, "a try", func() bool { return b.sums().retries > 0 })
	if n := len(r.asked()); n != 0 {
		t.Errorf("%d requests without room", n)
	}
	if err := b.Fill(t.Context(), fx.digest, 50, 1); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
	full.Store(false)
	b.fill(fx, 50, 1)
	m.check(t, 50)
	<-done
}

// A failing disk is not tried again and again at once, also where all that was asked for was read by then.
func TestDiskThatFailsLast(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(42), shape{members: 1, most: 30_000})
	var left atomic.Int32
	left.Store(3)
	m, r, done := b.add(fx, func(l *Layer) {
		l.Content.(*memory).putErr = func(int) error {
			if left.Add(-1) >= 0 {
				return errors.New("the disk is broken")
			}
			return nil
		}
	})
	<-done
	m.check(t, 0)
	if s := b.sums(); s.retries != 3 || len(r.asked()) != 4 {
		t.Errorf("%d requests, of which %d count as tries after a failure", len(r.asked()), s.retries)
	}
}

// What is copied is reserved as well, and all of a layer whose registry turns out to know no ranges.
func TestReservesFirst(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(43), shape{members: 100, most: 30_000})
	old, _, _ := b.add(fx, nil)
	b.fill(fx, 0, 30)
	old.check(t, 29)
	twin := *fx
	twin.digest = digest.FromString("twin")
	var reserved atomic.Int64
	written := int64(0)
	m, _, _ := b.add(&twin, func(l *Layer) {
		l.Content.(*memory).putErr = func(i int) error {
			if written += fx.chunks[i].Bytes; written > reserved.Load() {
				t.Errorf("%d bytes are written and %d reserved", written, reserved.Load())
			}
			return nil
		}
		l.Reserve = func(n int64) (func(), error) {
			reserved.Add(n)
			return func() {}, nil
		}
		l.Source = sourceFunc(func(_ context.Context, offset, length int64) (answerBody, error) {
			if length != -1 {
				return answerBody{}, ErrUnranged
			}
			return bodyOf(fx.blob), nil
		})
	})
	b.fill(&twin, 10, 5)
	b.fill(&twin, 90, 1)
	m.check(t, 12)
	eventually(t, "the whole layer", func() bool { return m.Left() == 0 })
}

// Room that can be made is made, and what was reserved is given back.
func TestReserves(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(28), shape{members: 100, most: 30_000})
	var held, made atomic.Int64
	m, _, done := b.add(fx, func(l *Layer) {
		failed := map[int]bool{}
		l.Content.(*memory).putErr = func(i int) error {
			if i%10 == 0 && !failed[i] {
				failed[i] = true
				return syscall.ENOSPC
			}
			return nil
		}
		l.Reserve = func(n int64) (func(), error) {
			held.Add(n)
			made.Add(1)
			return sync.OnceFunc(func() { held.Add(-n) }), nil
		}
	})
	b.fill(fx, 20, 1)
	<-done
	m.check(t, 20)
	b.Remove(fx.digest)
	if held.Load() != 0 || made.Load() < 10 {
		t.Errorf("%d bytes are held after %d reservations", held.Load(), made.Load())
	}
}

// What was reserved but for whom there was no room otherwise is still tried for who waits.
func TestNoRoomForAhead(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(29), shape{members: 100, most: 30_000})
	m, _, _ := b.add(fx, func(l *Layer) {
		l.Reserve = func(int64) (func(), error) { return nil, syscall.ENOSPC }
	})
	for i := range 20 {
		b.fill(fx, i, 1)
		m.check(t, i)
	}
	if m.Left() < 70 {
		t.Errorf("%d chunks are there, where there was no room", 100-m.Left())
	}
}
