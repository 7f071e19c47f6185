package lazyfs

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func openSample(t testing.TB, im *sample, has func(int) bool) *Layer {
	t.Helper()
	dir := t.TempDir()
	l, err := openLayer(im.digest, im.store(t, dir), filepath.Join(dir, "bits"), has)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close() })
	return l
}

func TestLayerPutAndRead(t *testing.T) {
	im := newSample(50, 20, 600<<10)
	l := openSample(t, im, nil)
	if l.Len() != len(im.chunks) || l.Left() != l.Len() || l.Complete() || l.Digest() != im.digest {
		t.Fatalf("%d chunks, %d left", l.Len(), l.Left())
	}
	p := make([]byte, len(im.chunks[0]))
	if err := l.Read(0, p); !errors.Is(err, ErrIncomplete) {
		t.Error("read of what is missing:", err)
	}
	if err := l.Put(0, im.chunks[1]); !errors.Is(err, ErrDigest) {
		t.Error("put of another chunk:", err)
	}
	if l.Has(0) || l.Left() != l.Len() {
		t.Error("a wrong chunk counts")
	}
	for range 2 {
		if err := l.Put(0, im.chunks[0]); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Put(0, im.chunks[1]); !errors.Is(err, ErrDigest) {
		t.Error("put of another chunk over it:", err)
	}
	if !l.Has(0) || l.Left() != l.Len()-1 {
		t.Errorf("%d left of %d", l.Left(), l.Len())
	}
	if err := l.Read(0, p); err != nil || !bytes.Equal(p, im.chunks[0]) {
		t.Error(err)
	}
	if l.Read(0, p[1:]) == nil {
		t.Error("read of a part")
	}
	for _, i := range []int{-1, l.Len()} {
		if l.Put(i, nil) == nil || l.Has(i) || l.Read(i, nil) == nil || l.Forget(i) == nil || l.Chunk(i).Bytes != 0 {
			t.Error("chunk", i)
		}
	}
	if err := l.Sync(); err != nil {
		t.Error(err)
	}
	if err := l.Forget(0, 0); err != nil {
		t.Error(err)
	}
	if l.Has(0) || l.Left() != l.Len() {
		t.Error("not forgotten")
	}
}

// A holder asks for the chunks from the first that is missing to the last.
func TestHeldMissing(t *testing.T) {
	im := newSample(51, 300, 10)
	rng := rand.New(rand.NewPCG(51, 1))
	there := make([]bool, len(im.chunks))
	for i := range there {
		there[i] = rng.IntN(10) < 9
	}
	l := openSample(t, im, func(i int) bool { return there[i] })
	for range 500 {
		first, n := rng.IntN(320)-10, rng.IntN(320)
		from, to := max(first, 0), min(first+n, len(there))
		if from >= to {
			continue
		}
		lo, hi := -1, -1
		for i := from; i < to; i++ {
			if !there[i] {
				if lo < 0 {
					lo = i
				}
				hi = i
			}
		}
		f := held{table: l.table, bitmap: l.bitmap}
		a, b := l.Chunk(from), l.Chunk(to-1)
		gotFirst, gotN, err := f.missing(a.DataOffset, int(b.DataOffset+b.Bytes-a.DataOffset))
		if err != nil || lo >= 0 && (gotFirst != lo || gotN != hi-lo+1) || lo < 0 && gotN != 0 {
			t.Fatalf("chunks [%d,%d): span %d+%d, want %d to %d (%v)", from, to, gotFirst, gotN, lo, hi, err)
		}
	}
}

// Padding between files is never missing.
func TestPaddingIsThere(t *testing.T) {
	im := newSample(52, 3, 10)
	l := openSample(t, im, nil)
	f := held{table: l.table, bitmap: l.bitmap}
	c := l.Chunk(0)
	if _, n, err := f.missing(c.DataOffset+c.Bytes, BlockBytes-int(c.Bytes)); err != nil || n != 0 {
		t.Error(n, err)
	}
	if first, n, err := f.missing(0, int(l.table.DataBytes())); err != nil || first != 0 || n != l.Len() {
		t.Error(first, n, err)
	}
}

// Many put, forget and read at once; what is there is right, and the count too.
func TestLayerConcurrently(t *testing.T) {
	im := newSample(53, 100, 5000)
	l := openSample(t, im, nil)
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(worker), 3))
			p := make([]byte, 5000)
			for range 2000 {
				i := rng.IntN(l.Len())
				switch rng.IntN(4) {
				case 0:
					if err := l.Forget(i); err != nil {
						t.Error(err)
					}
				case 1:
					b := p[:len(im.chunks[i])]
					if err := l.Read(i, b); err == nil && !bytes.Equal(b, im.chunks[i]) {
						t.Error("wrong bytes")
					}
				default:
					if err := l.Put(i, im.chunks[i]); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	left := 0
	for i := range l.Len() {
		if !l.Has(i) {
			left++
		}
	}
	if l.Left() != left {
		t.Errorf("%d left, counted %d", left, l.Left())
	}
	all.Go(func() { fillAll(t, l, im) })
	all.Wait()
	if !l.Complete() {
		t.Error(l.Left(), "left")
	}
}

// What could not be made durable is missing again.
func TestSyncFails(t *testing.T) {
	im := newSample(54, 10, 100)
	l := openSample(t, im, func(i int) bool { return i == 0 })
	putAll(t, l, im)
	good := l.data
	r, w, err := os.Pipe() // has no fdatasync
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	l.data = w
	err = l.Sync()
	w.Close()
	l.data = good
	if err == nil {
		t.Fatal("no error")
	}
	if l.Left() != l.Len()-1 || !l.Has(0) {
		t.Errorf("%d of %d left", l.Left(), l.Len())
	}
	fillAll(t, l, im)
	if err := l.Sync(); err != nil || !l.Complete() {
		t.Error(err, l.Left())
	}
}

// A chunk that was written before a Sync that fails, and is noted while that runs, is doubtful too.
func TestSyncFailsBesidePut(t *testing.T) {
	im := newSample(56, 10, 100)
	l := openSample(t, im, nil)
	if err := l.Put(0, im.chunks[0]); err != nil {
		t.Fatal(err)
	}
	good := l.data
	r, w, err := os.Pipe() // has no fdatasync
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	l.data = w
	l.putting.RLock() // a Put of chunk 1, which is written
	synced := make(chan error)
	go func() { synced <- l.Sync() }()
	until(t, "the list that Sync takes first", func() bool {
		l.unsyncedMu.Lock()
		defer l.unsyncedMu.Unlock()
		return len(l.unsynced) == 0
	})
	l.unsyncedMu.Lock()
	l.unsynced = append(l.unsynced, 1)
	l.unsyncedMu.Unlock()
	l.unsure.Add(1)
	l.bitmap.set(1)
	l.left.Add(-1)
	l.putting.RUnlock()
	if err := <-synced; err == nil {
		t.Error("no error")
	}
	w.Close()
	l.data = good
	if l.Has(0) || l.Has(1) || l.Left() != l.Len() || l.unsure.Load() != 0 {
		t.Errorf("there: %v %v, %d of %d left", l.Has(0), l.Has(1), l.Left(), l.Len())
	}
}

// A bitmap of another boot, layer or size is not believed.
func TestStaleBitmap(t *testing.T) {
	im := newSample(55, 10, 100)
	for name, spoil := range map[string]func([]byte) []byte{
		"boot":   func(b []byte) []byte { b[20] ^= 1; return b },
		"inode":  func(b []byte) []byte { b[40] ^= 1; return b },
		"magic":  func(b []byte) []byte { b[0] ^= 1; return b },
		"chunks": func(b []byte) []byte { b[8] ^= 1; return b },
		"short":  func(b []byte) []byte { return b[:len(b)-1] },
		"empty":  func(b []byte) []byte { return nil },
	} {
		dir := t.TempDir()
		f, bits := im.store(t, dir), filepath.Join(dir, "bits")
		l, err := openLayer(im.digest, f, bits, nil)
		if err != nil {
			t.Fatal(err)
		}
		fillAll(t, l, im)
		l.close()
		b, err := os.ReadFile(bits)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(bits, spoil(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err = openLayer(im.digest, f, bits, nil); err != nil {
			t.Fatal(name, err)
		}
		if l.Left() != l.Len() {
			t.Errorf("%s: believed", name)
		}
		l.close()
	}
}
