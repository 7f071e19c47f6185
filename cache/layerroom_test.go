package cache

import (
	"accel"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

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
	if err := kept.Use(); err != nil {
		t.Errorf("use of what is there: %v", err)
	}
	if err := b.Remove(l.digest); err != nil {
		t.Fatal(err)
	}
	if err := kept.Use(); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("use of what was removed: %v", err)
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
		if err := kept.Use(); err != nil {
			t.Fatal(err)
		}
		if err := l.put(kept, upTo(chunks)...); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 { // a scan, in both forms
		kept, err := b.Layer(hot.digest)
		if err == nil {
			err = kept.Use()
		}
		if err != nil {
			t.Fatal(err)
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
