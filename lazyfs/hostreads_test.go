package lazyfs

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// chunksOf are the chunks that hold a file, in their order.
func (im *sample) chunksOf(name string) (chunks []int) {
	at := 0
	for _, n := range im.names {
		count := (len(im.files[n]) + testChunkBytes - 1) / testChunkBytes
		if n == name {
			for i := range count {
				chunks = append(chunks, at+i)
			}
			return chunks
		}
		at += count
	}
	return nil
}

// TestReads: what is read through a mount is known by chunk and time, whether it had to be fetched or was
// there; what is in the kernel's cache is not; and the next daemon knows it too.
func TestReads(t *testing.T) {
	im := newSample(60, 12, 900<<10)
	b := newBed(t, nil).start(im)
	l, _ := b.Layer(im.digest)
	target := b.mount(im, "a")
	read := func(name string) {
		t.Helper()
		if err := im.sameFile(target, name); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(maps.Collect(l.Reads())); n > 0 {
		t.Fatalf("%d chunks are read before anything was", n)
	}

	first, there, late := im.names[3], im.names[7], im.names[9]
	for _, i := range im.chunksOf(there) { // fetched ahead of its read
		if err := l.Put(i, im.chunks[i]); err != nil {
			t.Fatal(err)
		}
	}
	before := time.Now()
	read(first)
	between := time.Now()
	time.Sleep(5 * time.Millisecond) // the times are in milliseconds
	read(there)
	reads := maps.Collect(l.Reads())
	if got, want := slices.Sorted(maps.Keys(reads)), append(im.chunksOf(first), im.chunksOf(there)...); !slices.Equal(got, want) {
		t.Errorf("read %v, want %v", got, want)
	}
	const grain = 2 * time.Millisecond
	for i, at := range reads {
		switch late := slices.Contains(im.chunksOf(there), i); {
		case at.Before(before.Add(-grain)), at.After(time.Now()), late && at.Before(between.Add(-grain)), !late && at.After(between.Add(grain)):
			t.Errorf("chunk %d was read at %s: not between %s, %s and now", i, at, before, between)
		}
	}

	l.ResetReads()
	if n := len(maps.Collect(l.Reads())); n > 0 {
		t.Errorf("%d chunks are read after a reset", n)
	}
	read(first) // from the kernel's cache
	read(late)
	want := im.chunksOf(late)
	if got := slices.Sorted(maps.Keys(maps.Collect(l.Reads()))); !slices.Equal(got, want) {
		t.Errorf("read %v, want %v: what the kernel has in its cache is not read", got, want)
	}

	b.stop()
	b.start(im)
	l, _ = b.Layer(im.digest)
	if got := slices.Sorted(maps.Keys(maps.Collect(l.Reads()))); !slices.Equal(got, want) {
		t.Errorf("the next daemon knows of %v, want %v", got, want)
	}
	if err := b.Unmount(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(t.Context(), im.digest, nil); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(b.dir, bitsDir)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestReadsAreNoDuty: a file of times that is of another layer is made anew, and one that cannot be made or was
// cut short costs no read.
func TestReadsAreNoDuty(t *testing.T) {
	im := newSample(61, 6, 300<<10)
	b := newBed(t, nil)
	path := filepath.Join(b.dir, bitsDir, fileName(im.digest)+readsSuffix)
	if err := os.MkdirAll(path, 0o700); err != nil { // a directory is in the way
		t.Fatal(err)
	}
	b.start(im)
	target := b.mount(im, "a")
	if err := im.sameFile(target, im.names[0]); err != nil {
		t.Fatal(err)
	}
	l, _ := b.Layer(im.digest)
	l.ResetReads()
	if n := len(maps.Collect(l.Reads())); n > 0 {
		t.Errorf("%d reads without a file of them", n)
	}
	b.stop()

	other := newSample(62, 6, 300<<10)
	path = filepath.Join(b.dir, bitsDir, fileName(other.digest)+readsSuffix)
	if err := os.WriteFile(path, []byte("of something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.start(im, other)
	target = b.mount(other, "b")
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if err := other.same(target); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkNoteRead(b *testing.B) {
	r, err := openReads(filepath.Join(b.TempDir(), "reads"), 1<<16)
	if err != nil {
		b.Fatal(err)
	}
	defer r.close()
	b.Run("again", func(b *testing.B) {
		for i := range b.N {
			r.note(i&0xffff, i&0xffff+1)
		}
	})
	b.Run("first", func(b *testing.B) {
		for i := range b.N {
			if i&0xffff == 0 {
				r.clear()
			}
			r.note(i&0xffff, i&0xffff+1)
		}
	})
}
