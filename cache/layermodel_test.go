package cache

import (
	"accel"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestLayerModel does random things to some layers and compares with what has to be, also after starts.
func TestLayerModel(t *testing.T) {
	type state struct {
		here, pinned bool
		marks        map[int]bool
	}
	const layers, chunks = 5, 70
	o := Options{Dir: filepath.Join(t.TempDir(), "cache"), VerifyLayer: verifyLayer}
	s := open(t, o)
	all, model := make([]testLayer, layers), make([]state, layers)
	for i := range all {
		all[i] = layerOf(20+i, chunks)
	}
	rng := rand.New(rand.NewPCG(5, 6))
	for step := range 600 {
		i := rng.IntN(layers)
		l, m := all[i], &model[i]
		kept, err := s.Layer(l.digest)
		if (err == nil) != m.here {
			t.Fatalf("step %d: layer %d: %v, want it here: %v", step, i, err, m.here)
		}
		switch op := rng.IntN(20); {
		case op < 4 && !m.here:
			mustCreate(t, s, l)
			m.here, m.marks = true, map[int]bool{}
		case op < 12 && m.here:
			var some []int
			for range 1 + rng.IntN(12) {
				c := rng.IntN(chunks)
				some = append(some, c)
				m.marks[c] = true
			}
			if err := l.put(kept, some...); err != nil {
				t.Fatal(err)
			}
		case op < 14:
			owner := fmt.Sprint("owner", i)
			if m.pinned {
				err = s.Unpin(owner)
			} else {
				err = s.Pin(owner, l.digest)
			}
			if m.pinned = !m.pinned; err != nil {
				t.Fatal(err)
			}
		case op < 15:
			err := s.Remove(l.digest)
			switch {
			case m.pinned && !errors.Is(err, accel.ErrConflict), !m.pinned && m.here && err != nil, !m.pinned && !m.here && !errors.Is(err, accel.ErrNotFound):
				t.Fatalf("step %d: Remove: %v", step, err)
			}
			if !m.pinned {
				m.here = false
			}
		case op < 16 && m.here && len(m.marks) > 0: // bit rot
			for c := range m.marks {
				if err := flipAt(kept.Files().Data, int64(c*testChunk+99)); err != nil {
					t.Fatal(err)
				}
				delete(m.marks, c)
				break
			}
			if rep, err := s.Check(t.Context(), nil); err != nil || rep.WrongChunks != 1 || len(rep.Damaged) > 0 {
				t.Fatalf("step %d: %+v, %v", step, rep, err)
			}
		case op < 17:
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, o)
		case op < 18: // the index is lost, and with it nothing
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(o.Dir, "index.db"), []byte("noise"), 0o600); err != nil {
				t.Fatal(err)
			}
			s = open(t, o)
			if _, err := s.GC(t.Context()); err != nil {
				t.Fatal(err)
			}
			for i := range model { // pins are
				model[i].pinned = false
			}
		}
		if !m.here {
			continue
		}
		if kept, err = s.Layer(l.digest); err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		has := kept.Has()
		for c := range chunks {
			if has(c) != m.marks[c] {
				t.Fatalf("step %d: chunk %d of layer %d: %v", step, c, i, has(c))
			}
		}
		if n := l.right(t, kept); kept.Stat().Complete != (n == chunks) || kept.Stat().PresentChunks != n || kept.Stat().Pinned != m.pinned {
			t.Fatalf("step %d: %+v with %d right chunks", step, kept.Stat(), n)
		}
	}
}
