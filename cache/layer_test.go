package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"accel"

	"github.com/opencontainers/go-digest"
)

// testChunk is the size of a chunk of a testLayer. The real ones differ in size, which the store does not see.
const testChunk = 64 << 10

// testLayer is a layer whose table is the SHA-256 sums of its chunks, one after the other.
type testLayer struct {
	digest digest.Digest
	data   []byte
}

func layerOf(seed, chunks int) testLayer {
	data := content(seed, chunks*testChunk)
	return testLayer{digest.FromString(fmt.Sprint("layer ", seed)), data}
}

func (l testLayer) chunks() int { return len(l.data) / testChunk }

func (l testLayer) chunk(i int) []byte { return l.data[i*testChunk : (i+1)*testChunk] }

func (l testLayer) info() LayerInfo {
	return LayerInfo{Chunks: l.chunks(), DataBytes: int64(len(l.data)), FilesBytes: int64(l.chunks()*sha256.Size + 20_000)}
}

func (l testLayer) write(f LayerFiles) error {
	var table []byte
	for i := range l.chunks() {
		sum := sha256.Sum256(l.chunk(i))
		table = append(table, sum[:]...)
	}
	return errors.Join(
		os.WriteFile(f.Meta, bytes.Repeat([]byte("meta"), 2500), 0o600),
		os.WriteFile(f.Table, table, 0o600),
		os.WriteFile(f.TOC, bytes.Repeat([]byte("toc."), 2500), 0o600),
		os.WriteFile(f.Data, nil, 0o600),
		os.Truncate(f.Data, int64(len(l.data))),
	)
}

// verifyLayer is Options.VerifyLayer for testLayers.
func verifyLayer(ctx context.Context, _ digest.Digest, f LayerFiles, has func(int) bool, progress func(int64)) (wrong []int, err error) {
	table, err := os.ReadFile(f.Table)
	if err != nil {
		return nil, err
	}
	data, err := os.Open(f.Data)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	chunk := make([]byte, testChunk)
	for i := range len(table) / sha256.Size {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !has(i) {
			continue
		}
		_, err := data.ReadAt(chunk, int64(i*testChunk))
		if sum := sha256.Sum256(chunk); err != nil || !bytes.Equal(sum[:], table[i*sha256.Size:(i+1)*sha256.Size]) {
			wrong = append(wrong, i)
		}
		progress(testChunk)
	}
	return wrong, nil
}

// mustCreate makes a layer, which has to work.
func mustCreate(t testing.TB, s *Store, l testLayer) *Layer {
	t.Helper()
	kept, err := s.CreateLayer(t.Context(), l.digest, l.info(), l.write)
	if err != nil {
		t.Fatal(err)
	}
	return kept
}

// put writes chunks as a mount's filler does: room, data, fsync, marks.
func (l testLayer) put(kept *Layer, chunks ...int) error {
	release, err := kept.Reserve(int64(len(chunks)) * testChunk)
	if err != nil {
		return err
	}
	defer release()
	f, err := os.OpenFile(kept.Files().Data, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, i := range chunks {
		if _, err := f.WriteAt(l.chunk(i), int64(i*testChunk)); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return kept.Commit(chunks)
}

// right compares every marked chunk with what it has to be, and returns how many there are.
func (l testLayer) right(t testing.TB, kept *Layer) (n int) {
	t.Helper()
	f, err := os.Open(kept.Files().Data)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	has := kept.Has()
	got := make([]byte, testChunk)
	for i := range l.chunks() {
		if !has(i) {
			continue
		}
		n++
		if _, err := f.ReadAt(got, int64(i*testChunk)); err != nil || !bytes.Equal(got, l.chunk(i)) {
			t.Fatalf("chunk %d of %s is marked and not what it has to be, %v", i, l.digest, err)
		}
	}
	return n
}

func upTo(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return all
}

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
			if kept.Complete() != (chunks == 0) || kept.Chunks() != chunks || kept.Has()(0) {
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
			if !half.Complete() || !e.Complete || e.PresentBytes != e.SizeBytes || e.Form != FormLayer || e.AllocatedBytes < int64(len(l.data)) {
				t.Errorf("complete: %+v", e)
			}
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
			again = open(t, Options{Dir: again.o.Dir})
			whole, err := again.Layer(l.digest)
			if err != nil || !whole.Complete() || l.right(t, whole) != chunks {
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
	if err := kept.Commit(upTo(chunks)); err != nil || rows() != 0 || !kept.Complete() {
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
	if has := kept.Has(); kept.Complete() || has(7) || has(chunks-1) || !has(8) || kept.Stat().PresentChunks != chunks-2 {
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

// TestSideBySide: both forms of one digest are there by themselves, are pinned together and removed together.
func TestSideBySide(t *testing.T) {
	b := start(t, Options{})
	data := content(4, 2*mib)
	l := layerOf(4, 3)
	l.digest = digest.FromBytes(data)
	kept := mustCreate(t, b.Store, l)
	if err := l.put(kept, upTo(3)...); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Stat(l.digest); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a layer passes for a blob: %v", err)
	}
	if _, err := b.OpenBlob(t.Context(), accel.BlobDescriptor{Digest: l.digest, SizeBytes: -1}, 0, -1, nil); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a layer is read as a blob: %v", err)
	}
	mustGet(t, b.Store, data, 0, -1, from(data))
	forms := map[Form]Entry{}
	for _, e := range b.List() {
		forms[e.Form] = e
	}
	if len(forms) != 2 || forms[FormBlob].SizeBytes != 2*mib || forms[FormLayer].PresentChunks != 3 || forms[FormLayer].Digest != l.digest {
		t.Errorf("%+v", forms)
	}
	if err := b.Pin("somebody", l.digest); err != nil {
		t.Fatal(err)
	}
	if u := b.Usage(); u.PinnedBytes < 2*mib+3*testChunk || !kept.Stat().Pinned {
		t.Errorf("%+v, %+v", u, kept.Stat())
	}
	if err := b.Remove(l.digest); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("removed while pinned: %v", err)
	}
	if err := b.Unpin("somebody"); err != nil {
		t.Fatal(err)
	}
	release, err := kept.Reserve(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(l.digest); !errors.Is(err, accel.ErrConflict) || !b.has(data) {
		t.Errorf("removed while written: %v", err)
	}
	release()
	release() // twice is once
	if err := b.Remove(l.digest); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Layer(l.digest); !errors.Is(err, accel.ErrNotFound) || b.has(data) || len(b.List()) != 0 {
		t.Errorf("after Remove: %v, %+v", err, b.List())
	}
	if _, err := os.Lstat(filepath.Dir(kept.Files().Data)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder: %v", err)
	}
	if err := kept.Commit([]int{0}); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("marks of what is gone: %v", err)
	}
	if _, err := kept.Reserve(1); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("room for what is gone: %v", err)
	}
	if again := mustCreate(t, b.Store, l); again.Has()(0) { // the old marks are not its own
		t.Error("a new layer has marks")
	}
}

// TestSparse: what a layer takes of the budget is its blocks, not its length.
func TestSparse(t *testing.T) {
	s := open(t, Options{BudgetBytes: 40 * mib})
	l := layerOf(5, 16)
	l.data = slices.Concat(l.data, make([]byte, 100*mib)) // most of it never comes
	kept := mustCreate(t, s, l)
	before := s.Usage().UsedBytes
	if before > 2*mib { // the index is a part of it
		t.Errorf("an empty layer takes %d bytes", before)
	}
	if err := l.put(kept, 0, 5, 15); err != nil {
		t.Fatal(err)
	}
	// Written and not marked yet counts from release on.
	release, err := kept.Reserve(testChunk)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(kept.Files().Data, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(l.chunk(7), 7*testChunk); err != nil {
		t.Fatal(err)
	}
	release()
	n := s.Usage().UsedBytes - before
	if n < 4*testChunk || n > 4*testChunk+256<<10 {
		t.Errorf("four chunks take %d bytes", n)
	}
	if e := kept.Stat(); e.AllocatedBytes < 4*testChunk || e.AllocatedBytes > 5*testChunk+100_000 || e.PresentChunks != 3 {
		t.Errorf("%+v", e)
	}
	if _, err := kept.Reserve(41 * mib); !errors.Is(err, ErrNoSpace) {
		t.Errorf("more than the budget: %v", err)
	}
	if _, err := kept.Reserve(-1); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("less than nothing: %v", err)
	}
	if s.reserved != 0 {
		t.Errorf("%d bytes are reserved", s.reserved)
	}
}

// TestLayerEviction: blobs and layers make room for each other; what is used again stays longer, what is pinned for ever.
func TestLayerEviction(t *testing.T) {
	const budget = 24 * mib
	b := start(t, Options{BudgetBytes: budget})
	const chunks = 3 * mib / testChunk
	pinned, hot, cold := layerOf(10, chunks), layerOf(11, chunks), layerOf(12, chunks)
	if err := b.Pin("snapshot/1", pinned.digest); err != nil { // before it is here
		t.Fatal(err)
	}
	for _, l := range []testLayer{pinned, hot, cold} {
		kept := mustCreate(t, b.Store, l)
		kept.Use()
		if err := l.put(kept, upTo(chunks)...); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 { // a scan, in both forms
		if kept, err := b.Layer(hot.digest); err != nil {
			t.Fatal(err)
		} else {
			kept.Use()
		}
		if i%2 == 0 {
			data := content(1500+i, 3*mib)
			mustGet(t, b.Store, data, 0, -1, from(data))
		} else {
			l := layerOf(1500+i, chunks)
			if err := l.put(mustCreate(t, b.Store, l), upTo(chunks)...); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
		if u := b.Usage(); u.UsedBytes > budget {
			t.Fatalf("%d bytes used of %d", u.UsedBytes, budget)
		}
	}
	if _, err := b.Layer(cold.digest); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("what was used once: %v", err)
	}
	for _, l := range []testLayer{pinned, hot} {
		kept, err := b.Layer(l.digest)
		if err != nil {
			t.Fatal(err)
		}
		if l.right(t, kept) != chunks {
			t.Error("it is not complete")
		}
	}
	b.mu.Lock()
	reserved := b.reserved
	b.mu.Unlock()
	if reserved != 0 {
		t.Errorf("%d bytes are reserved", reserved)
	}
	// Nothing that may go is left: no room, and nothing is lost for it.
	if err := b.Pin("all", func() (all []digest.Digest) {
		for _, e := range b.List() {
			all = append(all, e.Digest)
		}
		return all
	}()...); err != nil {
		t.Fatal(err)
	}
	before := len(b.List())
	big := layerOf(13, 2)
	info := big.info()
	info.FilesBytes = budget / 2
	if _, err := b.CreateLayer(t.Context(), big.digest, info, big.write); !errors.Is(err, ErrNoSpace) {
		t.Errorf("made without room: %v", err)
	}
	if len(b.List()) != before {
		t.Error("something pinned was evicted")
	}
}

// TestWriterIsNotEvicted: a layer is not taken from under whoever has reserved room in it, pinned or not.
func TestWriterIsNotEvicted(t *testing.T) {
	b := start(t, Options{BudgetBytes: 8 * mib})
	l := layerOf(14, 32)
	kept := mustCreate(t, b.Store, l)
	release, err := kept.Reserve(2 * mib)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		data := content(1600+i, 3*mib)
		mustGet(t, b.Store, data, 0, -1, from(data))
	}
	if again, err := b.Layer(l.digest); err != nil || again != kept {
		t.Errorf("it was evicted while it was written: %v", err)
	}
	release()
}

func TestReplacePins(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	s := open(t, Options{Dir: dir})
	l := layerOf(15, 1)
	kept := mustCreate(t, s, l)
	other := digest.FromString("other")
	if err := errors.Join(s.Pin("snapshot/1", l.digest), s.Pin("snapshot/2", l.digest, other), s.Pin("person:x", other)); err != nil {
		t.Fatal(err)
	}
	for name, pins := range map[string]map[string][]digest.Digest{
		"another's owner": {"person:y": {l.digest}}, "no digest": {"snapshot/3": {"sha256:x"}},
	} {
		if err := s.ReplacePins("snapshot/", pins); !errors.Is(err, accel.ErrInvalid) || len(s.Pins()) != 3 {
			t.Errorf("%s: %v, %v", name, err, s.Pins())
		}
	}
	if err := s.ReplacePins("", nil); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("everybody's: %v", err)
	}
	want := map[string][]digest.Digest{"snapshot/2": {other}, "snapshot/4": {l.digest, other}, "person:x": {other}}
	if err := s.ReplacePins("snapshot/", map[string][]digest.Digest{"snapshot/2": {other}, "snapshot/4": {l.digest, other, l.digest}, "snapshot/5": {}}); err != nil {
		t.Fatal(err)
	}
	check := func(s *Store, kept *Layer) {
		t.Helper()
		if got := fmt.Sprint(s.Pins()); got != fmt.Sprint(want) {
			t.Errorf("%v, want %v", got, want)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.pinned[l.digest] != 1 || s.pinned[other] != 3 || kept.pins != 1 {
			t.Errorf("%v, the layer %d times", s.pinned, kept.pins)
		}
	}
	check(s, kept)
	again := open(t, Options{Dir: copyDir(t, dir)})
	kept2, err := again.Layer(l.digest)
	if err != nil {
		t.Fatal(err)
	}
	check(again, kept2)
	if err := s.ReplacePins("snapshot/", nil); err != nil || len(s.Pins()) != 1 || kept.Stat().Pinned {
		t.Errorf("%v, %v", err, s.Pins())
	}
}

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
			kept = mustCreate(t, s, l)
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
		if n := l.right(t, kept); kept.Complete() != (n == chunks) || kept.Stat().PresentChunks != n || kept.Stat().Pinned != m.pinned {
			t.Fatalf("step %d: %+v with %d right chunks", step, kept.Stat(), n)
		}
	}
}

func flipAt(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return err
	}
	b[0] ^= 4
	_, err = f.WriteAt(b[:], at)
	return err
}
