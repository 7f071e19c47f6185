package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// FuzzLayer converts whatever comes: no panic, errors that are final, and where
// it succeeds a tree that is the source's, as package archive/tar and the stock
// library read it.
func FuzzLayer(f *testing.F) {
	for _, entries := range faithful {
		if src := tarOf(entries...); len(src) < 100_000 {
			f.Add(src)
			f.Add(gz(src))
		}
	}
	src := tarOf(file("a", "x"), oldGNUSparse("s", 5000, extent{1024, "data"}), paxSparse("p", 5000, extent{1024, "data"}), link("l", "a"), file("a", "y"))
	f.Add(src)
	f.Add(zst(src))
	f.Add(stockBuild(f, src[:2*tarBlock]))
	f.Fuzz(func(t *testing.T, blob []byte) {
		src := tarBytes(blob)
		l := layerOf(blob, src)
		c := &Converter{TempDir: t.TempDir(), Workers: 2, Params: Params{ChunkBytes: minChunkBytes}, Policy: Policy{MaxUncompressedBytes: 8 << 20}}
		img := imageOf(t, l)
		res, err := c.Convert(context.Background(), Source{Image: img}, Options{})
		if err != nil {
			if !accel.IsPermanent(err) {
				t.Fatalf("an error that may pass, of bytes that stay: %v", err)
			}
			return
		}
		defer res.Close()
		if _, err := tar.NewReader(bytes.NewReader(src)).Next(); err != nil && !errors.Is(err, io.EOF) {
			t.Fatalf("converted what archive/tar cannot read: %v", err)
		}
		desc := manifest(t, res.Image).Layers[0]
		z := opened(t, bytesOf(t, layers(t, res.Image)[0]), desc)
		if _, ok := z.Lookup(estargz.NoPrefetchLandmark); !ok && !res.Unchanged {
			t.Error("no landmark")
		}
		if diff, err := Diff(context.Background(), img, res.Image, DiffOptions{}); err != nil || len(diff) > 0 {
			t.Fatalf("Diff: %v %v", diff, err)
		}
		want, _, err := readTree(context.Background(), l, prefix{})
		must(err)
		got, err := treeOf(z)
		must(err)
		if diff := diffTrees(want, got, tocTolerance); len(diff) > 0 {
			t.Fatalf("TOC: %v", diff)
		}
	})
}

// tarBytes is what blob inflates to, as far as it does.
func tarBytes(blob []byte) []byte {
	r, err := newSource(bytes.NewReader(blob), nil).tarStream()
	if err != nil {
		return nil
	}
	defer r.Close()
	b, _ := io.ReadAll(io.LimitReader(r, 16<<20))
	return b
}
