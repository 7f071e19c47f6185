package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

var errUpstream = errors.New("upstream said 500")

// TestFetchFails: an error is everybody's who waits, and the next one tries again.
func TestFetchFails(t *testing.T) {
	b := start(t, Options{})
	data := content(30, 3*mib)
	f := from(data)
	gate := make(chan struct{})
	f.fail = func(int64, int64) error {
		<-gate
		return errUpstream
	}
	results := make(chan error)
	for range 20 {
		go func() {
			_, _, err := get(b.Store, describe(data), 0, -1, f)
			results <- err
		}()
	}
	until(t, "all wait", func() bool {
		e, err := b.Stat(digest.FromBytes(data))
		return err == nil && e.Readers == 20 && b.waitsForFill(e.Digest)
	})
	time.Sleep(10 * time.Millisecond) // let the last of them come to wait; a later one just tries itself
	close(gate)
	for range 20 {
		if err := <-results; !errors.Is(err, errUpstream) {
			t.Errorf("%v", err)
		}
	}
	if n := f.fetches.Load(); n > 10 {
		t.Errorf("%d fetches for 20 readers of one failure", n)
	}
	if _, err := b.Stat(digest.FromBytes(data)); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("an entry without content is left: %v", err)
	}
	f.mu.Lock()
	f.fail = nil
	f.mu.Unlock()
	mustGet(t, b.Store, data, 0, -1, f)
}

func (s *Store) waitsForFill(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[d]
	return b != nil && b.live != nil && len(b.live.fills) > 0 && b.live.changed != nil
}

// TestOthersCredential: that one client may not pull ends nobody else's pull.
func TestOthersCredential(t *testing.T) {
	for _, refusal := range []error{accel.ErrUnauthenticated, accel.ErrForbidden} {
		b := start(t, Options{})
		data := content(31, 3*mib)
		refused, good := from(data), from(data)
		gate := make(chan struct{})
		refused.fail = func(int64, int64) error {
			<-gate
			return fmt.Errorf("upstream: %w", refusal)
		}
		first := make(chan error)
		go func() {
			_, _, err := get(b.Store, describe(data), 0, -1, refused)
			first <- err
		}()
		until(t, "the first one fetches", func() bool { return refused.fetches.Load() == 1 })
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { mustGet(t, b.Store, data, 0, -1, good) })
		}
		until(t, "the others are there", func() bool {
			e, err := b.Stat(digest.FromBytes(data))
			return err == nil && e.Readers == 6
		})
		close(gate)
		wg.Wait()
		if err := <-first; !errors.Is(err, refusal) {
			t.Errorf("the refused one: %v", err)
		}
		if n := good.fetches.Load(); n != 1 {
			t.Errorf("%d fetches by the others", n)
		}
		b.close()
	}
}

// TestStreamEndsEarly: what a stream brought is kept, and the rest is fetched by another.
func TestStreamEndsEarly(t *testing.T) {
	for _, cut := range []int64{2 * mib, 2*mib + 500_000, 5 * mib} {
		b := start(t, Options{})
		data := content(32, 6*mib+10)
		f := from(data)
		f.cut = cut
		mustGet(t, b.Store, data, 0, -1, f)
		if f.fetches.Load() != 2 || f.bytes.Load() > int64(len(data))+mib {
			t.Errorf("cut at %d: %d fetches, %d bytes", cut, f.fetches.Load(), f.bytes.Load())
		}
		b.close()
	}
	// Without a whole part it is an error.
	b := start(t, Options{})
	data := content(33, 6*mib)
	f := from(data)
	f.cut, f.cutAll = mib-1, true
	if _, _, err := get(b.Store, describe(data), 0, -1, f); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a stream of less than a part: %v", err)
	}
	f.cut = 0
	mustGet(t, b.Store, data, 0, -1, f)
}

// TestTornPart: the bytes of a part that broke off were shown already; when they are
// different the second time, the reader that had them is not told that all is well.
func TestTornPart(t *testing.T) {
	b := start(t, Options{})
	data := content(34, 3*mib)
	f := from(data)
	f.cut = mib + 600<<10
	f.spoil = func(at int64, p []byte) {
		if i := mib + 100 - at; f.fetches.Load() == 1 && i >= 0 && i < int64(len(p)) {
			p[i] ^= 1
		}
	}
	if _, _, err := get(b.Store, describe(data), 0, -1, f); !errors.Is(err, ErrDigest) {
		t.Errorf("a spoiled beginning of a part: %v", err)
	}
	mustGet(t, b.Store, data, 0, -1, f)
}

func TestUnranged(t *testing.T) {
	b := start(t, Options{})
	data := content(35, 20*mib+5)
	f := from(data)
	f.unranged = true
	mustGet(t, b.Store, data, 15*mib, 100, f)
	mustGet(t, b.Store, data, 3*mib+7, 2*mib, f)
	mustGet(t, b.Store, data, 0, -1, f)
	if f.fetches.Load() != 1 {
		t.Errorf("%d downloads of the whole", f.fetches.Load())
	}
	// A source that begins after what was asked for is no source.
	other := content(36, 3*mib)
	if _, _, err := get(b.Store, describe(other), 0, -1, late{from(other)}); err == nil {
		t.Error("a stream from behind the offset was taken")
	}
}

type late struct{ *source }

func (l late) Fetch(ctx context.Context, offset, length int64) (Stream, error) {
	st, err := l.source.Fetch(ctx, offset, length)
	st.From = offset + 1
	return st, err
}

// TestStalled: a stream that hangs holds up nobody who does not need it.
func TestStalled(t *testing.T) {
	b := start(t, Options{})
	data := content(37, 40*mib)
	f := from(data)
	release := f.holdAt(mib)
	result := make(chan error)
	go func() {
		r, err := b.OpenBlob(context.Background(), describe(data), 0, -1, f)
		if err == nil {
			c := &compared{data}
			_, err = r.WriteTo(c)
			r.Close()
		}
		result <- err
	}()
	until(t, "a fetch", func() bool { return f.fetches.Load() == 1 })
	mustGet(t, b.Store, data, 30*mib, mib, f) // far ahead of the fill: not waited for
	other := content(38, 3*mib)
	mustGet(t, b.Store, other, 0, -1, from(other))
	release()
	if err := <-result; err != nil {
		t.Error(err)
	}
	if n := f.bytes.Load(); n > int64(len(data))+2*mib {
		t.Errorf("%d bytes for %d", n, len(data))
	}
}

// TestIdleFill: what nobody waits for any more is finished when half is there or it is small, else dropped.
func TestIdleFill(t *testing.T) {
	for name, c := range map[string]struct {
		size     int
		seen     int64 // when the only reader leaves
		finishes bool
	}{
		"small":             {10 * mib, mib, true},
		"little of a large": {40 * mib, 5 * mib, false},
		"most of a large":   {40 * mib, 25 * mib, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, Options{})
			b.mu.Lock()
			b.idleGrace = 0
			b.mu.Unlock()
			data := content(39, c.size)
			f := from(data)
			release := f.holdAt(c.seen)
			r, err := b.OpenBlob(t.Context(), describe(data), 0, -1, f)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.CopyN(io.Discard, r, c.seen-mib/2); err != nil {
				t.Fatal(err)
			}
			r.Close()
			entry := func() Entry {
				e, err := b.Stat(digest.FromBytes(data))
				if err != nil {
					t.Fatal(err)
				}
				return e
			}
			if c.finishes {
				b.endIdle()
				release()
				until(t, "it is complete", func() bool { return entry().Complete })
				return
			}
			defer release()
			until(t, "it is dropped", func() bool { b.endIdle(); return !entry().Filling })
			if e := entry(); e.Complete || e.PresentBytes < c.seen-2*mib {
				t.Errorf("after it was dropped: %+v", e)
			}
			release()
			mustGet(t, b.Store, data, 0, -1, f) // goes on from there
			if n := f.bytes.Load(); n > int64(c.size)+2*mib {
				t.Errorf("%d bytes for %d", n, c.size)
			}
		})
	}
}

// TestLowPriority: a warm waits while somebody fetches for a client, and goes on then.
func TestLowPriority(t *testing.T) {
	b := start(t, Options{})
	warm, wanted := content(40, 10*mib), content(41, 3*mib)
	w, f := from(warm), from(wanted)
	release := f.holdAt(mib)
	client := make(chan error)
	go func() {
		_, _, err := get(b.Store, describe(wanted), 0, -1, f)
		client <- err
	}()
	until(t, "the client's fetch", func() bool { return f.fetches.Load() == 1 })
	var ended atomic.Bool
	result := make(chan error)
	go func() {
		_, err := b.Ensure(context.Background(), describe(warm), w, true)
		ended.Store(true)
		result <- err
	}()
	until(t, "the warm is there", func() bool { return b.waitsForFill(digest.FromBytes(warm)) })
	if w.bytes.Load() != 0 || ended.Load() {
		t.Error("a warm did not wait for the client's fill")
	}
	release()
	if err := errors.Join(<-client, <-result); err != nil {
		t.Fatal(err)
	}
	// Somebody who waits for a warm makes it a fill like others.
	warm2, wanted2 := content(42, 10*mib), content(43, 3*mib)
	w, f = from(warm2), from(wanted2)
	release = f.holdAt(mib)
	go func() {
		_, _, err := get(b.Store, describe(wanted2), 0, -1, f)
		client <- err
	}()
	until(t, "the client's fetch", func() bool { return f.fetches.Load() == 1 })
	go func() {
		_, err := b.Ensure(context.Background(), describe(warm2), w, true)
		result <- err
	}()
	until(t, "the warm is there", func() bool { return b.waitsForFill(digest.FromBytes(warm2)) })
	mustGet(t, b.Store, warm2, 0, -1, w)
	if w.fetches.Load() != 1 {
		t.Errorf("%d fetches", w.fetches.Load())
	}
	release()
	if err := errors.Join(<-client, <-result); err != nil {
		t.Fatal(err)
	}
}

// TestResume: what was there when the process ended is not fetched again.
func TestResume(t *testing.T) {
	b := start(t, Options{})
	dir := b.o.Dir
	data := content(44, 30*mib)
	f := from(data)
	release := f.holdAt(20*mib + 12345)
	r, err := b.OpenBlob(t.Context(), describe(data), 0, -1, f)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, r, 20*mib); err != nil {
		t.Fatal(err)
	}
	r.Close()
	b.close()
	release()
	b = start(t, Options{Dir: dir})
	again := from(data)
	tally := mustGet(t, b.Store, data, 0, -1, again)
	if again.bytes.Load() != 10*mib || tally.CacheBytes != 20*mib {
		t.Errorf("%d bytes fetched again, %+v", again.bytes.Load(), tally)
	}
	got, _, err := get(b.Store, describe(data), 0, -1, nil)
	if err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
}
