package convert

import (
	"bytes"
	stdgzip "compress/gzip"
	"slices"
	"testing"
)

// gzAt compresses with the standard library.
func gzAt(b []byte, level int) []byte {
	var buf bytes.Buffer
	w, err := stdgzip.NewWriterLevel(&buf, level)
	must(err)
	w.Write(b)
	must(w.Close())
	return buf.Bytes()
}

// TestSourceMatches: chunks that are long enough are made of the source's own
// matches, and whatever the source is made of, the same tree comes out.
func TestSourceMatches(t *testing.T) {
	mixed := text(200_000, 1) + noise(90_000, 2) + string(make([]byte, 300_000)) + text(700_000, 3)
	entries := []tarEntry{dir("links")}
	for i, n := range []int{0, 1, 32<<10 - 1, 32 << 10, 40 << 10, 41 << 10, 256 << 10, 256<<10 + 1, 256<<10 + 45<<10, len(mixed)} {
		at := min(i*31_111, len(mixed)-n)
		entries = append(entries, file(string(rune('a'+i)), mixed[at:at+n]), symlink("links/"+string(rune('a'+i)), "x"))
	}
	src := tarOf(entries...)
	cut := len(src) / 2
	sources := map[string][]byte{
		"level 9": gzAt(src, 9), "level 6": gzAt(src, 6), "Huffman only": gzAt(src, stdgzip.HuffmanOnly),
		"level 1": gzAt(src, 1), "level 0": gzAt(src, 0), "klauspost": gz(src), "zstd": zst(src), "plain": src,
		"members": slices.Concat(gzAt(src[:cut], 9), gzAt(src[cut:cut+100_000], 0), gzAt(src[cut+100_000:], 6)),
	}
	size := map[string]int64{}
	for name, blob := range sources {
		t.Run(name, func(t *testing.T) {
			c := newConverter(t, 2)
			c.Params = Params{Level: 1}
			img := imageOf(t, layerOf(blob, src))
			res := converted(t, c, img)
			checkSame(t, img, res.Image, src)
			size[name] = res.Stats.TargetBytes
		})
	}
	if size["level 9"] > size["plain"]*95/100 {
		t.Errorf("from level 9 %d bytes are made, at level 1 without it %d: the source's matches were not used", size["level 9"], size["plain"])
	}
	for _, name := range []string{"Huffman only", "level 1", "level 0", "zstd"} {
		if size[name] != size["plain"] {
			t.Errorf("from %s %d bytes are made, without matches %d", name, size[name], size["plain"])
		}
	}
}
