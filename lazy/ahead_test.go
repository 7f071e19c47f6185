package lazy

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"accel/lazyfs"
	"accel/profile"
)

// entry is one of a TOC, as the format has it.
type entry struct {
	Name        string `json:"name"`
	Type        string `json:"type"`
	Size        int64  `json:"size,omitempty"`
	Mode        int64  `json:"mode,omitempty"`
	LinkName    string `json:"linkName,omitempty"`
	Offset      int64  `json:"offset,omitempty"`
	ChunkOffset int64  `json:"chunkOffset,omitempty"`
	ChunkSize   int64  `json:"chunkSize,omitempty"`
	Digest      string `json:"digest,omitempty"`
	ChunkDigest string `json:"chunkDigest,omitempty"`
}

const testChunkBytes = 256 << 10

// tocOf is a TOC with files of these sizes, and links to some of them.
func tocOf(t testing.TB, sizes map[string]int64, order []string) (toc []byte, blobBytes int64) {
	t.Helper()
	at := int64(1)
	entries := []entry{{Name: "dir/", Type: "dir", Mode: 0o755}}
	for n, name := range order {
		size := sizes[name]
		sum := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(name)))
		for off := int64(0); off == 0 || off < size; off += testChunkBytes {
			e := entry{Name: name, Type: "chunk", Offset: at, ChunkOffset: off, ChunkSize: min(testChunkBytes, size-off), ChunkDigest: sum}
			if off == 0 {
				e.Type, e.Size, e.Mode, e.Digest = "reg", size, 0o644, sum
			}
			entries = append(entries, e)
			at += e.ChunkSize + 1
		}
		if n%5 == 0 {
			entries = append(entries, entry{Name: name + ".hard", Type: "hardlink", LinkName: name}, entry{Name: name + ".soft", Type: "symlink", LinkName: "/" + name, Mode: 0o777})
		}
	}
	toc, err := json.Marshal(map[string]any{"version": 1, "entries": entries})
	must(t, err)
	return toc, at
}

// layerOf stores a layer's files, and opens its table.
func layerOf(t testing.TB, files int) (toc []byte, table *lazyfs.Table, names []string, sizes map[string]int64) {
	t.Helper()
	sizes = map[string]int64{}
	for i := range files {
		name := fmt.Sprintf("dir/file%05d", i)
		sizes[name] = int64(i*7919)%(3*testChunkBytes) + 1
		names = append(names, name)
	}
	toc, blobBytes := tocOf(t, sizes, names)
	layout, err := lazyfs.Build(toc, blobBytes)
	must(t, err)
	dir := t.TempDir()
	f := lazyfs.Files{Meta: filepath.Join(dir, "meta"), Table: filepath.Join(dir, "table"), Data: filepath.Join(dir, "data")}
	must(t, layout.Store(f))
	table, err = lazyfs.OpenTable(f.Table)
	must(t, err)
	t.Cleanup(func() { _ = table.Close() })
	return toc, table, names, sizes
}

func quickLayer(toc []byte, t *lazyfs.Table) (*profile.Layer, error) {
	return profile.NewLayer(named("layer"), func(do func(profile.TOCEntry) error) error {
		return lazyfs.EachEntry(toc, func(e lazyfs.Entry) error { return do(profile.TOCEntry(e)) })
	}, t)
}

// slowLayer is quickLayer by the standard library.
func slowLayer(toc []byte, t *lazyfs.Table) (*profile.Layer, error) {
	return profile.NewLayer(named("layer"), func(do func(profile.TOCEntry) error) error {
		var all struct {
			Entries []profile.TOCEntry `json:"entries"`
		}
		if err := json.Unmarshal(toc, &all); err != nil {
			return err
		}
		for _, e := range all.Entries {
			if err := do(e); err != nil {
				return err
			}
		}
		return nil
	}, t)
}

// The fast reader of TOCs finds the same chunks as the standard library.
func TestLayersAreReadEqually(t *testing.T) {
	toc, table, names, sizes := layerOf(t, 200)
	slow, err := slowLayer(toc, table)
	must(t, err)
	quick, err := quickLayer(toc, table)
	must(t, err)
	for _, name := range names {
		for _, path := range []string{name, name + ".hard", name + ".soft", "./" + name, name + "x"} {
			for _, at := range []int64{0, testChunkBytes, sizes[name] - 1, sizes[name]} {
				first, n := slow.Chunks(path, at, 4096)
				if f, m := quick.Chunks(path, at, 4096); f != first || m != n {
					t.Fatalf("%s at %d: %d chunks from %d, want %d from %d", path, at, m, f, n, first)
				}
			}
		}
	}
	if first, n := quick.Chunks(names[0]+".hard", 0, 1); n != 1 || first != 0 {
		t.Errorf("a hard link has %d chunks from %d", n, first)
	}
	for _, bad := range []string{"", "{", `{"version":1,"entries":[{"name":"` + string(rune(0)) + `"}]}`} {
		if _, err := quickLayer([]byte(bad), table); err == nil {
			t.Errorf("%q is a TOC", bad)
		}
	}
}

func BenchmarkLayerOfTOC(b *testing.B) {
	toc, table, _, _ := layerOf(b, 10_000)
	b.Run("json", func(b *testing.B) {
		b.SetBytes(int64(len(toc)))
		for range b.N {
			if _, err := slowLayer(toc, table); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("quick", func(b *testing.B) {
		b.SetBytes(int64(len(toc)))
		for range b.N {
			if _, err := quickLayer(toc, table); err != nil {
				b.Fatal(err)
			}
		}
	})
}
