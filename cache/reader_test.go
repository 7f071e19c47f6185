package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"accel"

	"github.com/opencontainers/go-digest"
)

func TestWholeBlob(t *testing.T) {
	for _, size := range []int{1, 100, heldBytes, heldBytes + 1, mib - 1, mib, mib + 1, 5*mib + 12345} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			b := start(t, Options{})
			data := content(size, size)
			f := from(data)
			f.peer = size%2 == 0
			got := mustGet(t, b.Store, data, 0, -1, f)
			if want := (accel.Tally{RegistryBytes: int64(size)}); !f.peer && got != want {
				t.Errorf("first: %+v", got)
			}
			if want := (accel.Tally{PeerBytes: int64(size)}); f.peer && got != want {
				t.Errorf("first: %+v", got)
			}
			if got := mustGet(t, b.Store, data, 0, -1, nil); got != (accel.Tally{CacheBytes: int64(size)}) {
				t.Errorf("second: %+v", got)
			}
			if n := f.fetches.Load(); n != 1 {
				t.Errorf("%d fetches", n)
			}
			e, err := b.Stat(digest.FromBytes(data))
			if err != nil || !e.Complete || e.PresentBytes != int64(size) {
				t.Errorf("%+v, %v", e, err)
			}
			dir := b.o.Dir
			b.close()
			again := open(t, Options{Dir: dir})
			mustGet(t, again, data, 0, -1, nil)
		})
	}
}

func TestEmptyBlob(t *testing.T) {
	b := start(t, Options{})
	for _, d := range []accel.BlobDescriptor{describe(nil), {Digest: digest.FromBytes(nil), SizeBytes: -1}} {
		got, _, err := get(b.Store, d, 0, -1, nil)
		if err != nil || len(got) != 0 {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	if _, err := b.Ensure(t.Context(), describe(nil), nil, false); err != nil {
		t.Error(err)
	}
	if _, _, err := get(b.Store, accel.BlobDescriptor{Digest: digest.FromString("x")}, 0, -1, from([]byte("x"))); !errors.Is(err, ErrDigest) {
		t.Errorf("no bytes for something: %v", err)
	}
}

func TestSHA512(t *testing.T) {
	b := start(t, Options{})
	data := content(1, 3*mib)
	d := accel.BlobDescriptor{Digest: digest.SHA512.FromBytes(data), SizeBytes: int64(len(data))}
	for _, f := range []Fetcher{from(data), nil} {
		got, _, err := get(b.Store, d, 0, -1, f)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
}

func TestInvalid(t *testing.T) {
	b := start(t, Options{})
	data := content(1, 1000)
	good := describe(data)
	for name, d := range map[string]accel.BlobDescriptor{
		"no digest":     {SizeBytes: 10},
		"path":          {Digest: "sha256:../../../../etc/passwd", SizeBytes: 10},
		"short":         {Digest: "sha256:abcd", SizeBytes: 10},
		"upper case":    {Digest: digest.Digest("sha256:" + string(bytes.ToUpper([]byte(good.Digest.Encoded())))), SizeBytes: 10},
		"other hash":    {Digest: digest.SHA384.FromBytes(data), SizeBytes: 1000},
		"of an exabyte": {Digest: good.Digest, SizeBytes: 1 << 60},
	} {
		if _, err := b.OpenBlob(t.Context(), d, 0, -1, from(data)); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, offset := range []int64{-1, 1001, 1 << 62} {
		if _, err := b.OpenBlob(t.Context(), good, offset, -1, from(data)); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("offset %d: %v", offset, err)
		}
	}
	if _, err := b.OpenBlob(t.Context(), good, 0, -1, nil); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("not there: %v", err)
	}
	if _, err := b.OpenBlob(t.Context(), accel.BlobDescriptor{Digest: good.Digest, SizeBytes: -1}, 0, -1, from(data)); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("unknown size: %v", err)
	}
	if n := len(b.List()); n != 0 {
		t.Errorf("%d entries are left of what failed", n)
	}
	mustGet(t, b.Store, data, 0, -1, from(data))
	if _, err := b.OpenBlob(t.Context(), accel.BlobDescriptor{Digest: good.Digest, SizeBytes: 999}, 0, -1, from(data)); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("wrong size of checked content: %v", err)
	}
	got, _, err := get(b.Store, accel.BlobDescriptor{Digest: good.Digest, SizeBytes: -1}, 10, 1<<40, nil)
	if err != nil || !bytes.Equal(got, data[10:]) {
		t.Errorf("known size: %d bytes, %v", len(got), err)
	}
}

// TestManyReaders: a hundred clients, whole and in ranges, while it comes: each byte is fetched once.
func TestManyReaders(t *testing.T) {
	b := start(t, Options{})
	data := content(7, 20*mib+777)
	f := from(data)
	release := f.holdAt(3 * mib)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var sum accel.Tally
	for i := range 100 {
		wg.Go(func() {
			got := mustGet(t, b.Store, data, 0, -1, f)
			mu.Lock()
			defer mu.Unlock()
			sum.Add(got)
			_ = i
		})
	}
	until(t, "all readers are there", func() bool {
		e, err := b.Stat(digest.FromBytes(data))
		return err == nil && e.Readers == 100
	})
	release()
	wg.Wait()
	if f.bytes.Load() != int64(len(data)) || f.fetches.Load() != 1 || sum.RegistryBytes != int64(len(data)) {
		t.Errorf("%d bytes by %d fetches for a blob of %d; all readers: %+v", f.bytes.Load(), f.fetches.Load(), len(data), sum)
	}
}

func TestRandomRanges(t *testing.T) {
	b := start(t, Options{})
	data := content(8, 40*mib+1)
	f := from(data)
	var wg sync.WaitGroup
	for reader := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(reader)))
			for range 40 {
				offset := rng.Int64N(int64(len(data)) + 1)
				length := rng.Int64N(3*mib + 1)
				if rng.IntN(10) == 0 {
					length = int64(len(data))
				}
				mustGet(t, b.Store, data, offset, min(length, int64(len(data))-offset), f)
			}
		})
	}
	wg.Wait()
	mustGet(t, b.Store, data, 0, -1, f)
	e, err := b.Stat(digest.FromBytes(data))
	if err != nil || !e.Complete {
		t.Errorf("%+v, %v", e, err)
	}
	if n := f.bytes.Load(); n > int64(len(data))*11/10 {
		t.Errorf("%d bytes fetched for %d", n, len(data))
	}
}

// TestBytesArePassedOn: a reader has what came before the rest does, and not the end before the check.
func TestBytesArePassedOn(t *testing.T) {
	b := start(t, Options{})
	data := content(9, 2*mib)
	f := from(data)
	release := f.holdAt(1000)
	r, err := b.OpenBlob(t.Context(), describe(data), 0, -1, f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// The stream gives 1000 bytes and stops: those are shown when the next come, so
	// let one step pass.
	release2 := f.holdAt(mib + 500<<10)
	release()
	head := make([]byte, mib)
	if _, err := io.ReadFull(r, head); err != nil || !bytes.Equal(head, data[:mib]) {
		t.Fatalf("the first part: %v", err)
	}
	release2()
	rest, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(rest, data[mib:]) {
		t.Fatalf("the rest: %v", err)
	}
}

func TestWrongContent(t *testing.T) {
	for _, at := range []int64{0, 5, mib + 1, 3*mib - 1} {
		b := start(t, Options{})
		data := content(10, 3*mib)
		f := from(data)
		f.spoil = func(from int64, p []byte) {
			if i := at - from; i >= 0 && i < int64(len(p)) {
				p[i] ^= 1
			}
		}
		got, _, err := get(b.Store, describe(data), 0, -1, f)
		if !errors.Is(err, ErrDigest) || len(got) > len(data)-1 {
			t.Errorf("wrong byte at %d: %d bytes given, %v", at, len(got), err)
		}
		if _, err := b.Stat(digest.FromBytes(data)); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("wrong content is kept: %v", err)
		}
		// The next one fetches it anew.
		f.mu.Lock()
		f.spoil = nil
		f.mu.Unlock()
		mustGet(t, b.Store, data, 0, -1, f)
		mustGet(t, b.Store, data, 0, -1, nil)
		b.close()
	}
}

// TestWrongRange: a wrong byte in a range that was served is found when the whole is there.
func TestWrongRange(t *testing.T) {
	b := start(t, Options{})
	data := content(11, 4*mib)
	bad := bytes.Clone(data)
	bad[2*mib+5] ^= 1
	if _, _, err := get(b.Store, describe(data), 2*mib, 100, from(bad)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := get(b.Store, describe(data), 0, -1, from(data)); !errors.Is(err, ErrDigest) {
		t.Errorf("whole with a bad range in it: %v", err)
	}
	mustGet(t, b.Store, data, 0, -1, from(data))
}

func TestReaderClosedWhileItWaits(t *testing.T) {
	b := start(t, Options{})
	data := content(12, 3*mib)
	f := from(data)
	release := f.holdAt(mib)
	defer release()
	r, err := b.OpenBlob(t.Context(), describe(data), 0, -1, f)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error)
	go func() {
		_, err := io.Copy(io.Discard, r)
		result <- err
	}()
	until(t, "a fetch", func() bool { return f.fetches.Load() == 1 })
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, os.ErrClosed) {
		t.Errorf("read of a closed Reader: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, err = b.OpenBlob(ctx, describe(data), 0, -1, f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() {
		_, err := io.Copy(io.Discard, r)
		result <- err
	}()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("read under an ended context: %v", err)
	}
	release()
}

// TestHangUp: clients that hang up end no fill that another waits for.
func TestHangUp(t *testing.T) {
	b := start(t, Options{})
	data := content(13, 30*mib)
	f := from(data)
	release := f.holdAt(2 * mib)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 10 {
		r, err := b.OpenBlob(ctx, describe(data), 0, -1, f)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			_, _ = io.Copy(io.Discard, r) // ended by cancel
			r.Close()
		})
	}
	stays, err := b.OpenBlob(t.Context(), describe(data), 0, -1, f)
	if err != nil {
		t.Fatal(err)
	}
	defer stays.Close()
	var first [1]byte
	if _, err := io.ReadFull(stays, first[:]); err != nil {
		t.Fatal(err)
	}
	cancel()
	wg.Wait()
	release()
	rest, err := io.ReadAll(stays)
	if err != nil || !bytes.Equal(rest, data[1:]) {
		t.Fatalf("%d bytes, %v", len(rest), err)
	}
	if f.fetches.Load() != 1 {
		t.Errorf("%d fetches", f.fetches.Load())
	}
}

func TestDisputedSize(t *testing.T) {
	b := start(t, Options{})
	data := content(14, 3*mib)
	d := describe(data)
	lie := accel.BlobDescriptor{Digest: d.Digest, SizeBytes: d.SizeBytes + 5*mib}
	f := from(append(bytes.Clone(data), content(15, 5*mib)...))
	release := f.holdAt(2 * mib)
	r, err := b.OpenBlob(t.Context(), lie, 0, -1, f)
	if err != nil {
		t.Fatal(err)
	}
	var first [1]byte
	if _, err := io.ReadFull(r, first[:]); err != nil {
		t.Fatal(err)
	}
	mustGet(t, b.Store, data, 0, -1, from(data)) // served beside the lie
	if _, err := b.Ensure(t.Context(), d, from(data), false); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("Ensure beside a lie: %v", err)
	}
	release()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, ErrDigest) {
		t.Errorf("the lie: %v", err)
	}
	r.Close()
	mustGet(t, b.Store, data, 0, -1, from(data))
	mustGet(t, b.Store, data, 0, -1, nil)
	// A lie that is at rest gives way to the next one who says otherwise.
	other := content(16, 20*mib)
	lie = accel.BlobDescriptor{Digest: digest.FromBytes(other), SizeBytes: 40 * mib}
	if _, _, err := get(b.Store, lie, 0, 100, from(other)); err != nil {
		t.Fatal(err)
	}
	until(t, "the fill has ended", func() bool {
		e, err := b.Stat(lie.Digest)
		return err == nil && !e.Filling
	})
	mustGet(t, b.Store, other, 0, -1, from(other))
}

func TestStoppedStore(t *testing.T) {
	b := start(t, Options{})
	data, other := content(17, 2*mib), content(18, 5*mib)
	mustGet(t, b.Store, data, 0, -1, from(data))
	f := from(other)
	defer f.holdAt(mib)()
	r, err := b.OpenBlob(t.Context(), describe(other), 0, -1, f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	result := make(chan error)
	go func() {
		_, err := io.Copy(io.Discard, r)
		result <- err
	}()
	until(t, "a fetch", func() bool { return f.fetches.Load() == 1 })
	b.end()
	if err := <-result; !errors.Is(err, ErrClosed) {
		t.Errorf("a fill after Run: %v", err)
	}
	mustGet(t, b.Store, data, 0, -1, nil) // what is there is served until Close
	if _, _, err := get(b.Store, describe(other), 0, -1, from(other)); !errors.Is(err, ErrClosed) {
		t.Errorf("a fetch after Run: %v", err)
	}
	open, err := b.OpenBlob(t.Context(), describe(data), 0, -1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	b.close()
	got, err := io.ReadAll(open)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("an open Reader after Close: %d bytes, %v", len(got), err)
	}
	if _, err := b.OpenBlob(t.Context(), describe(data), 0, -1, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := b.Run(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("Run after Close: %v", err)
	}
}

// TestBeforeRun: what is asked for before Run waits for it.
func TestBeforeRun(t *testing.T) {
	s := open(t, Options{})
	data := content(19, 3*mib)
	result := make(chan error)
	go func() {
		_, _, err := get(s, describe(data), 0, -1, from(data))
		result <- err
	}()
	until(t, "the reader waits", func() bool {
		e, err := s.Stat(digest.FromBytes(data))
		return err == nil && e.Filling
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	if err := <-result; err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestEnsure(t *testing.T) {
	b := start(t, Options{})
	data := content(20, 9*mib)
	f := from(data)
	got, err := b.Ensure(t.Context(), describe(data), f, true)
	if err != nil || got != (accel.Tally{RegistryBytes: int64(len(data))}) {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = b.Ensure(t.Context(), describe(data), nil, true)
	if err != nil || got != (accel.Tally{CacheBytes: int64(len(data))}) {
		t.Errorf("again: %+v, %v", got, err)
	}
	mustGet(t, b.Store, data, 0, -1, nil)
}
