package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"accel"

	"github.com/opencontainers/go-digest"
)

// halfLayer makes a closed store in dir with a layer that has its even chunks.
func halfLayer(t testing.TB, dir string, l testLayer) {
	t.Helper()
	s := open(t, Options{Dir: dir})
	kept := mustCreate(t, s, l)
	for i := 0; i < l.chunks(); i += 2 {
		if err := l.put(kept, i); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(s.Pin("snapshot/1", l.digest), s.Close()); err != nil {
		t.Fatal(err)
	}
}

func spoilIndex(t testing.TB, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "index.db"), []byte("noise"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCheckLayer: wrong chunks lose their marks and nothing else; damage of the files about them, or a lost one, is the
// layer's end, pinned or not.
func TestCheckLayer(t *testing.T) {
	l := layerOf(40, 9)
	for name, c := range map[string]struct {
		damage func(LayerFiles) error
		wrong  []int // nil: the layer goes
	}{
		"chunks":     {func(f LayerFiles) error { return errors.Join(flipAt(f.Data, 5), flipAt(f.Data, 8*testChunk)) }, []int{0, 8}},
		"a hole":     {func(f LayerFiles) error { return punch(f.Data, 2*testChunk, testChunk) }, []int{2}},
		"not marked": {func(f LayerFiles) error { return flipAt(f.Data, testChunk) }, []int{}},
		"meta":       {func(f LayerFiles) error { return flipAt(f.Meta, 5) }, nil},
		"table":      {func(f LayerFiles) error { return flipAt(f.Table, 5) }, nil},
		"TOC":        {func(f LayerFiles) error { return flipAt(f.TOC, 5) }, nil},
		"no TOC":     {func(f LayerFiles) error { return os.Remove(f.TOC) }, nil},
		"no info":    {func(f LayerFiles) error { return os.Remove(infoPath(filepath.Dir(f.TOC))) }, nil},
		"short data": {func(f LayerFiles) error { return os.Truncate(f.Data, 5) }, nil},
		"a folder":   {func(f LayerFiles) error { return errors.Join(os.Remove(f.Meta), os.Mkdir(f.Meta, 0o700)) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "cache")
			halfLayer(t, dir, l)
			s := open(t, Options{Dir: dir, VerifyLayer: verifyLayer})
			kept, err := s.Layer(l.digest)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.damage(kept.Files()); err != nil {
				t.Fatal(err)
			}
			var told, total int64
			rep, err := s.Check(t.Context(), func(done, of int64) { told, total = done, of })
			if err != nil || rep.WrongChunks != len(c.wrong) || (len(rep.Damaged) == 1) != (c.wrong == nil) {
				t.Fatalf("%+v, %v", rep, err)
			}
			if c.wrong == nil {
				if _, err := s.Layer(l.digest); !errors.Is(err, accel.ErrNotFound) || len(s.Pins()) != 1 {
					t.Errorf("%v; pins %v", err, s.Pins())
				}
				if again := mustCreate(t, s, l); again.Stat().PresentChunks != 0 || !again.Stat().Pinned {
					t.Errorf("made again: %+v", again.Stat())
				}
				return
			}
			if told != total || total == 0 || rep.CheckedLayers != 1 {
				t.Errorf("%d of %d bytes were told; %+v", told, total, rep)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open(t, Options{Dir: dir})
			if kept, err = s.Layer(l.digest); err != nil {
				t.Fatal(err)
			}
			has := kept.Has()
			for i := range l.chunks() {
				if has(i) != (i%2 == 0 && !slices.Contains(c.wrong, i)) {
					t.Errorf("chunk %d: %v", i, has(i))
				}
			}
		})
	}
}

func punch(path string, at, n int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const keepSizePunchHole = 1 | 2
	return syscall.Fallocate(int(f.Fd()), keepSizePunchHole, at, n)
}

// TestLayersWithoutIndex: what is in the files is taken back as far as it is right.
func TestLayersWithoutIndex(t *testing.T) {
	l := layerOf(42, 9)
	for name, c := range map[string]struct {
		damage func(LayerFiles) error
		check  bool // VerifyLayer is there
		kept   int  // chunks; -1: the layer goes
	}{
		"all is well":     {nil, true, 5},
		"a wrong chunk":   {func(f LayerFiles) error { return flipAt(f.Data, 2*testChunk) }, true, 4},
		"nobody to check": {nil, false, -1},
		"nothing to check": {func(f LayerFiles) error {
			return errors.Join(os.Truncate(f.Data, 0), os.Truncate(f.Data, 9*testChunk))
		}, false, 0},
		"meta":               {func(f LayerFiles) error { return flipAt(f.Meta, 5) }, true, -1},
		"table":              {func(f LayerFiles) error { return flipAt(f.Table, 5) }, true, -1},
		"no TOC":             {func(f LayerFiles) error { return os.Remove(f.TOC) }, true, -1},
		"info":               {func(f LayerFiles) error { return flipAt(infoPath(filepath.Dir(f.TOC)), 9) }, true, -1},
		"no info":            {func(f LayerFiles) error { return os.Remove(infoPath(filepath.Dir(f.TOC))) }, true, -1},
		"info of a gigabyte": {func(f LayerFiles) error { return os.Truncate(infoPath(filepath.Dir(f.TOC)), 1<<30) }, true, -1},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "cache")
			halfLayer(t, dir, l)
			o := Options{Dir: dir}
			if c.check {
				o.VerifyLayer = verifyLayer
			}
			if c.damage != nil {
				if err := c.damage(layerFiles((&Store{o: o}).layerDir(l.digest))); err != nil {
					t.Fatal(err)
				}
			}
			spoilIndex(t, dir)
			s := open(t, o)
			rep, err := s.GC(t.Context())
			if err != nil || rep.AdoptedLayers != btoi(c.kept >= 0) || rep.RemovedFiles != 1+btoi(c.kept < 0) { // the index that was set aside is one
				t.Fatalf("%+v, %v", rep, err)
			}
			kept, err := s.Layer(l.digest)
			if c.kept < 0 {
				if !errors.Is(err, accel.ErrNotFound) || allocatedUnder(filepath.Join(dir, layersDir)) > 0 {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if n := l.right(t, kept); n != c.kept {
				t.Errorf("%d chunks", n)
			}
			if err := l.put(kept, upTo(9)...); err != nil || !kept.Stat().Complete {
				t.Errorf("filled up: %v", err)
			}
		})
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestTakenBackOnce: a mount that asks for a layer while the start looks at its files waits for that, and one that comes
// first is not disturbed by it. Files in use are never replaced.
func TestTakenBackOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	l := layerOf(43, 9)
	halfLayer(t, dir, l)
	spoilIndex(t, dir)
	var checks atomic.Int32
	entered, gate := make(chan struct{}, 1), make(chan struct{})
	o := Options{Dir: dir, VerifyLayer: func(ctx context.Context, d digest.Digest, f LayerFiles, has func(int) bool, progress func(int64)) ([]int, error) {
		checks.Add(1)
		entered <- struct{}{}
		<-gate
		return verifyLayer(ctx, d, f, has, progress)
	}}
	s := open(t, o)
	path := layerFiles(s.layerDir(l.digest)).Data
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.GC(t.Context()); err != nil {
			t.Error(err)
		}
	})
	<-entered
	for range 5 {
		wg.Go(func() {
			kept, err := s.CreateLayer(t.Context(), l.digest, l.info(), func(LayerFiles) error {
				t.Error("files were made for a layer that has some")
				return errors.New("a test's")
			})
			if err != nil || l.right(t, kept) != 5 {
				t.Errorf("%v", err)
			}
		})
	}
	close(gate)
	wg.Wait()
	after, err := os.Stat(path)
	if err != nil || !os.SameFile(before, after) || checks.Load() != 1 {
		t.Errorf("checked %d times; %v", checks.Load(), err)
	}
}

// TestStrangeLayers: what lies in the layers' folders and is no layer is removed.
func TestStrangeLayers(t *testing.T) {
	s := open(t, Options{VerifyLayer: verifyLayer})
	l := layerOf(44, 3)
	kept := mustCreate(t, s, l)
	if err := l.put(kept, 0, 1); err != nil {
		t.Fatal(err)
	}
	put := func(path string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, make([]byte, 5000), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(s.o.Dir, layersDir)
	put(filepath.Join(root, "core"))
	put(filepath.Join(root, "sha256", "readme"))
	put(filepath.Join(root, "sha256", "ab", "readme"))
	put(filepath.Join(root, "md5", "ab", "x", "data"))
	put(filepath.Join(s.layerDir(digest.FromString("empty")), "data"))
	put(filepath.Join(s.o.Dir, stagingDir, "left", "over", "data"))
	put(s.layerDir(digest.FromString("a file")))
	outside := filepath.Join(t.TempDir(), "outside")
	put(filepath.Join(outside, "data"))
	if err := os.Symlink(outside, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	rep, err := s.GC(t.Context())
	if err != nil || rep.RemovedFiles != 8 || rep.AdoptedLayers != 0 || rep.FreedBytes < 7*5000 || len(rep.Damaged) > 0 {
		t.Errorf("%+v, %v", rep, err)
	}
	if _, err := os.Stat(filepath.Join(outside, "data")); err != nil {
		t.Error(err)
	}
	if again, err := s.Layer(l.digest); err != nil || again != kept || l.right(t, kept) != 2 {
		t.Errorf("the layer: %v", err)
	}
	if rep, err := s.GC(t.Context()); err != nil || rep.RemovedFiles != 0 || s.strays != 0 {
		t.Errorf("again: %+v, %v", rep, err)
	}
}

// TestLostLayer: files that went while the store did not run are noticed at once by who asks, and by the start.
func TestLostLayer(t *testing.T) {
	for _, asked := range []bool{true, false} {
		dir := filepath.Join(t.TempDir(), "cache")
		l := layerOf(45, 3)
		halfLayer(t, dir, l)
		s := open(t, Options{Dir: dir})
		if err := os.RemoveAll(s.layerDir(l.digest)); err != nil {
			t.Fatal(err)
		}
		if asked {
			if again := mustCreate(t, s, l); again.Has()(0) {
				t.Error("a new layer has marks")
			}
			continue
		}
		if rep, err := s.GC(t.Context()); err != nil || !slices.Equal(rep.Damaged, []digest.Digest{l.digest}) || len(s.List()) != 0 {
			t.Errorf("%+v, %v", rep, err)
		}
	}
}
