package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestCheckLayerFails: what says nothing of the layer costs it nothing.
func TestCheckLayerFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	l := layerOf(41, 9)
	halfLayer(t, dir, l)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failure := error(&os.PathError{Op: "open", Err: syscall.EMFILE})
	s := open(t, Options{Dir: dir, VerifyLayer: func(context.Context, digest.Digest, LayerFiles, func(int) bool, func(int64)) ([]int, error) {
		return []int{0, 2}, failure
	}})
	if _, err := s.Check(ctx, nil); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("no descriptors: %v", err)
	}
	cancel()
	if _, err := s.Check(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	kept, err := s.Layer(l.digest)
	if err != nil || l.right(t, kept) != 5 {
		t.Errorf("after that: %v", err)
	}
	failure = errors.New("the table is damaged")
	if rep, err := s.Check(t.Context(), nil); err != nil || !slices.Equal(rep.Damaged, []digest.Digest{l.digest}) {
		t.Errorf("a damaged table: %+v, %v", rep, err)
	}
}

// TestLayersOnFullDisk: the file system is full in the middle of fills: what is marked is right all the same, and goes on
// when there is room again.
func TestLayersOnFullDisk(t *testing.T) {
	dir := filepath.Join(smallDisk(t, 48), "cache")
	o := Options{Dir: dir, VerifyLayer: verifyLayer}
	b := start(t, o)
	const chunks = 7 * mib / testChunk
	layers := make([]testLayer, 10)
	full := 0
	for i := range layers {
		layers[i] = layerOf(50+i, chunks)
	}
	for round := range 3 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for i := range layers {
			wg.Go(func() {
				l := layers[(i+round)%len(layers)]
				if err := b.Pin(fmt.Sprint("mount", i), l.digest); err != nil && !noSpace(err) {
					t.Error(err)
				}
				defer b.Unpin(fmt.Sprint("mount", i))
				kept, err := b.CreateLayer(t.Context(), l.digest, l.info(), l.write)
				for c := 0; c < chunks && err == nil; c += 16 {
					err = l.put(kept, upTo(chunks)[c:min(c+16, chunks)]...)
				}
				if err != nil && !errors.Is(err, ErrNoSpace) && !noSpace(err) {
					t.Error(err)
				}
				if kept != nil {
					l.right(t, kept)
				}
				mu.Lock()
				defer mu.Unlock()
				full += btoi(err != nil)
			})
		}
		wg.Wait()
	}
	if full == 0 {
		t.Error("it was never full")
	}
	// Nothing at all is left, not even for the index.
	filler, err := os.Create(filepath.Join(dir, "..", "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	for block := make([]byte, mib); err == nil; {
		_, err = filler.Write(block)
	}
	all := []digest.Digest{}
	for _, e := range b.List() {
		all = append(all, e.Digest)
	}
	_ = b.Pin("all", all...) // in memory it counts, on disk where there is room
	more := layers[0].info()
	more.FilesBytes = 5 * mib // what the file system had kept back for itself may come free
	if _, err := b.CreateLayer(t.Context(), digest.FromString("one more"), more, layers[0].write); !errors.Is(err, ErrNoSpace) {
		t.Errorf("made on a full disk: %v", err)
	}
	if err := errors.Join(filler.Truncate(0), filler.Sync(), b.Unpin("all")); err != nil {
		t.Fatal(err)
	}
	until(t, "a layer is filled again", func() bool {
		kept, err := b.CreateLayer(t.Context(), layers[0].digest, layers[0].info(), layers[0].write)
		return err == nil && layers[0].put(kept, upTo(chunks)...) == nil && kept.Stat().Complete
	})
	b.close()
	b = start(t, o)
	kept, err := b.Layer(layers[0].digest)
	if err != nil || layers[0].right(t, kept) != chunks {
		t.Errorf("after a start: %v", err)
	}
	rep, err := b.Check(t.Context(), nil)
	if err != nil || len(rep.Damaged) > 0 || rep.WrongChunks > 0 {
		t.Errorf("after it was full: %+v, %v", rep, err)
	}
}

// TestWriteOnFullDisk: the disk is full while the files are made: others go, and they are made anew.
func TestWriteOnFullDisk(t *testing.T) {
	s := open(t, Options{})
	old := layerOf(47, 3)
	mustCreate(t, s, old)
	l := layerOf(48, 3)
	write := func(f LayerFiles) error {
		if _, err := s.Layer(old.digest); err == nil {
			return &os.PathError{Op: "write", Path: f.Meta, Err: syscall.ENOSPC}
		}
		return l.write(f)
	}
	if _, err := s.CreateLayer(t.Context(), l.digest, l.info(), write); err != nil {
		t.Error(err)
	}
	never := func(LayerFiles) error { return syscall.ENOSPC }
	if _, err := s.CreateLayer(t.Context(), old.digest, old.info(), never); !errors.Is(err, ErrNoSpace) {
		t.Errorf("with nothing left to evict: %v", err)
	}
	if n := len(s.List()); n != 0 || allocatedUnder(filepath.Join(s.o.Dir, stagingDir)) > 0 {
		t.Errorf("%d are left", n)
	}
}

// TestSeedLayer: a folder that another store made, and the word of an entry for what is in it.
func TestSeedLayer(t *testing.T) {
	l := layerOf(46, 9)
	for _, present := range []int{0, 4, 9} {
		dir := filepath.Join(t.TempDir(), "seeded")
		s := open(t, Options{Dir: dir})
		kept := mustCreate(t, s, l)
		if err := l.put(kept, upTo(present)...); err != nil {
			t.Fatal(err)
		}
		e := kept.Stat()
		if err := errors.Join(s.Close(), os.Remove(filepath.Join(dir, "index.db"))); err != nil {
			t.Fatal(err)
		}
		if err := Seed(dir, slices.Values([]Entry{e})); err != nil {
			t.Fatal(err)
		}
		s = open(t, Options{Dir: dir, VerifyLayer: verifyLayer})
		kept, err := s.Layer(l.digest)
		if err != nil || l.right(t, kept) != present || kept.Stat().Complete != (present == 9) {
			t.Errorf("%d chunks: %v", present, err)
		}
		if rep, err := s.Check(t.Context(), nil); err != nil || rep.CheckedLayers != 1 || rep.WrongChunks > 0 {
			t.Errorf("%+v, %v", rep, err)
		}
	}
	none := filepath.Join(t.TempDir(), "none")
	if err := os.MkdirAll(none, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Seed(none, slices.Values([]Entry{{Form: FormLayer, Digest: l.digest}})); err == nil {
		t.Error("a layer without files was seeded")
	}
}
