package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"accel"

	"github.com/opencontainers/go-digest"
)

func TestLayer(t *testing.T) {
	for _, chunks := range []int{0, 1, 63, 64, 65, 300} {
		t.Run(fmt.Sprint(chunks), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "cache")
			s := open(t, Options{Dir: dir})
			l := layerOf(1, chunks)
			if _, err := s.Layer(l.digest); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("before it is made: %v", err)
			}
			kept := mustCreate(t, s, l)
			if kept.Stat().Complete != (chunks == 0) || kept.Stat().Chunks != chunks || kept.Has()(0) {
				t.Errorf("new: %+v", kept.Stat())
			}
			for _, bad := range []int{-1, chunks, 1 << 40} {
				if err := kept.Commit([]int{bad}); !errors.Is(err, accel.ErrInvalid) || kept.Has()(bad) {
					t.Errorf("chunk %d: %v", bad, err)
				}
			}
			before := kept.Has()
			for i := 0; i < chunks; i += 2 {
				if err := l.put(kept, i); err != nil {
					t.Fatal(err)
				}
			}
			if chunks > 0 && (before(0) || !kept.Has()(0)) {
				t.Error("marks in what was asked for before, or none in what came after")
			}
			// Who has half of it is killed: a copy of the folder is what the next one finds.
			again := open(t, Options{Dir: copyDir(t, dir)})
			half, err := again.Layer(l.digest)
			if err != nil {
				t.Fatal(err)
			}
			if n := l.right(t, half); n != (chunks+1)/2 || half.Stat().PresentChunks != n {
				t.Errorf("%d chunks after a start, %+v", n, half.Stat())
			}
			if err := l.put(half, upTo(chunks)...); err != nil {
				t.Fatal(err)
			}
			e := half.Stat()
			if !half.Stat().Complete || !e.Complete || e.PresentBytes != e.SizeBytes || e.Form != FormLayer || e.AllocatedBytes < int64(len(l.data)) {
				t.Errorf("complete: %+v", e)
			}
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
			again = open(t, Options{Dir: again.o.Dir})
			whole, err := again.Layer(l.digest)
			if err != nil || !whole.Stat().Complete || l.right(t, whole) != chunks {
				t.Errorf("complete, after a start: %v", err)
			}
		})
	}
}

// TestLayerMarks: marks at all edges of the rows that hold them survive, and a complete layer has no rows of them.
func TestLayerMarks(t *testing.T) {
	const chunks = 3*segmentChunks + 5
	dir := filepath.Join(t.TempDir(), "cache")
	s := open(t, Options{Dir: dir})
	d := digest.FromString("many chunks")
	write := func(f LayerFiles) error {
		return errors.Join(os.WriteFile(f.Meta, nil, 0o600), os.WriteFile(f.Table, nil, 0o600), os.WriteFile(f.TOC, nil, 0o600), os.WriteFile(f.Data, nil, 0o600), os.Truncate(f.Data, chunks))
	}
	kept, err := s.CreateLayer(t.Context(), d, LayerInfo{Chunks: chunks, DataBytes: chunks}, write)
	if err != nil {
		t.Fatal(err)
	}
	rows := func() int {
		s.index.mu.Lock()
		defer s.index.mu.Unlock()
		return s.index.counts[tableMarks]
	}
	marked := []int{0, 63, 64, segmentChunks - 1, segmentChunks, 3*segmentChunks - 1, chunks - 1}
	if err := kept.Commit(marked); err != nil || rows() != 4 {
		t.Fatalf("%d rows, %v", rows(), err)
	}
	reopen := func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, Options{Dir: dir})
		if kept, err = s.Layer(d); err != nil {
			t.Fatal(err)
		}
	}
	reopen()
	has := kept.Has()
	for i := range chunks {
		if has(i) != slices.Contains(marked, i) {
			t.Errorf("chunk %d: %v", i, has(i))
		}
	}
	if err := kept.Commit(upTo(chunks)); err != nil || rows() != 0 || !kept.Stat().Complete {
		t.Errorf("%d rows, %v", rows(), err)
	}
	s.mu.Lock()
	n := kept.unmark([]int{-1, 7, chunks - 1, chunks, 7})
	s.dirtyLayers[kept] = struct{}{}
	s.mu.Unlock()
	if err := s.commit(); err != nil || n != 2 || rows() != 4 {
		t.Errorf("%d marks were taken away, %d rows, %v", n, rows(), err)
	}
	reopen()
	if has := kept.Has(); kept.Stat().Complete || has(7) || has(chunks-1) || !has(8) || kept.Stat().PresentChunks != chunks-2 {
		t.Errorf("%+v", kept.Stat())
	}
}

// TestCreateLayerOnce: callers at the same time share one making, and an error; one whose context ends
// spoils it for nobody.
func TestCreateLayerOnce(t *testing.T) {
	s := open(t, Options{})
	l := layerOf(2, 3)
	var writes atomic.Int32
	entered, gate := make(chan struct{}, 1), make(chan struct{})
	write := func(f LayerFiles) error {
		writes.Add(1)
		entered <- struct{}{}
		<-gate
		return l.write(f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	results := make(chan *Layer, 20)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			kept, err := s.CreateLayer(t.Context(), l.digest, l.info(), write)
			if err != nil {
				t.Error(err)
			}
			results <- kept
		})
	}
	<-entered
	impatient := make(chan error)
	go func() {
		_, err := s.CreateLayer(ctx, l.digest, l.info(), write)
		impatient <- err
	}()
	cancel()
	if err := <-impatient; !errors.Is(err, context.Canceled) {
		t.Errorf("whose context ended: %v", err)
	}
	close(gate)
	wg.Wait()
	close(results)
	first := <-results
	for kept := range results {
		if kept != first {
			t.Error("two layers of one digest")
		}
	}
	if writes.Load() != 1 {
		t.Errorf("written %d times", writes.Load())
	}
	if again, err := s.CreateLayer(t.Context(), l.digest, LayerInfo{}, nil); err != nil || again != first {
		t.Errorf("one that is there: %v", err)
	}
}

// TestCreateLayerFails: what a failure leaves is nothing.
func TestCreateLayerFails(t *testing.T) {
	s := open(t, Options{})
	l := layerOf(3, 3)
	errWrite := errors.New("a test's")
	for name, c := range map[string]struct {
		info  LayerInfo
		write func(LayerFiles) error
		want  error
	}{
		"write":           {l.info(), func(f LayerFiles) error { return errors.Join(l.write(f), errWrite) }, errWrite},
		"a file lacks":    {l.info(), func(f LayerFiles) error { return errors.Join(l.write(f), os.Remove(f.TOC)) }, accel.ErrInvalid},
		"no data":         {l.info(), func(f LayerFiles) error { return errors.Join(l.write(f), os.Remove(f.Data)) }, accel.ErrInvalid},
		"other data":      {l.info(), func(f LayerFiles) error { return errors.Join(l.write(f), os.Truncate(f.Data, 5)) }, accel.ErrInvalid},
		"chunks":          {LayerInfo{Chunks: -1}, l.write, accel.ErrInvalid},
		"too many chunks": {LayerInfo{Chunks: maxLayerChunks + 1}, l.write, accel.ErrInvalid},
		"too long":        {LayerInfo{DataBytes: maxBlobBytes + 1}, l.write, accel.ErrInvalid},
	} {
		if _, err := s.CreateLayer(t.Context(), l.digest, c.info, c.write); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.CreateLayer(t.Context(), "sha256:../..", l.info(), l.write); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a digest that is none: %v", err)
	}
	if left := allocatedUnder(filepath.Join(s.o.Dir, stagingDir)) + allocatedUnder(filepath.Join(s.o.Dir, layersDir)); left != 0 || s.reserved != 0 || len(s.List()) != 0 {
		t.Errorf("%d bytes and %d reserved are left", left, s.reserved)
	}
	mustCreate(t, s, l)
}
