package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/opencontainers/go-digest"
)

// TestKept: what is eStargz already stays, if it is what it says.
func TestKept(t *testing.T) {
	src := tarOf(manyFiles(60, 2000)...)
	first := converted(t, newConverter(t, 2), imageOf(t, layerOf(src, src)))
	ours := layers(t, first.Image)[0]
	again := func(t *testing.T, blob []byte, annotated bool, mutateTOC string) *Result {
		t.Helper()
		img := imageOf(t, layerOf(blob, inflateAll(t, blob)))
		if annotated {
			z, err := estargz.Open(section(blob))
			must(err)
			toc := z.TOCDigest().String()
			if mutateTOC != "" {
				toc = mutateTOC
			}
			img, err = mutate.Append(imageOf(t), mutate.Addendum{Layer: layerOf(blob, inflateAll(t, blob)), Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: toc}})
			must(err)
			c, _ := img.ConfigFile()
			c.OS, c.Architecture = "linux", "amd64"
			img, err = mutate.ConfigFile(img, c)
			must(err)
		}
		return converted(t, newConverter(t, 2), img)
	}
	oursBlob := bytesOf(t, ours)
	stock := stockBuild(t, src, estargz.WithChunkSize(700))
	for name, c := range map[string]struct {
		blob      []byte
		annotated bool
		toc       string
		unchanged bool
		kept      bool
	}{
		"ours, annotated":      {oursBlob, true, "", true, true},
		"ours, by its footer":  {oursBlob, false, "", false, true},
		"stock, annotated":     {stock, true, "", true, true},
		"stock, by its footer": {stock, false, "", false, true},
		"another TOC digest":   {stock, true, digest.FromString("x").String(), false, false},
		"a TOC that lies":      {lyingTOC(t, stock), true, "", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			res := again(t, c.blob, c.annotated, c.toc)
			if res.Unchanged != c.unchanged {
				t.Errorf("unchanged %v", res.Unchanged)
			}
			m := res.Mappings[0].Layers[0]
			if kept := m.Target == m.Source; kept != c.kept {
				t.Errorf("kept %v", kept)
			}
			if m.TOCDigest == "" || m.TOCOffset == 0 {
				t.Errorf("mapping %+v", m)
			}
			opened(t, bytesOf(t, layers(t, res.Image)[0]), v1.Descriptor{Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: m.TOCDigest.String()}})
		})
	}
}

func inflateAll(t *testing.T, blob []byte) []byte {
	t.Helper()
	s, err := newSource(bytes.NewReader(blob), nil).tarStream()
	must(err)
	defer s.Close()
	b, err := io.ReadAll(s)
	must(err)
	return b
}

// lyingTOC swaps the content of two files in a blob's TOC, which stays valid.
func lyingTOC(t *testing.T, blob []byte) []byte {
	t.Helper()
	offset, _, err := estargz.OpenFooter(section(blob))
	must(err)
	toc, _, err := new(estargz.GzipDecompressor).ParseTOC(bytes.NewReader(blob[offset:]))
	must(err)
	var files []*estargz.TOCEntry
	for _, e := range toc.Entries {
		if e.Type == "reg" && e.Size > 100 {
			files = append(files, e)
		}
	}
	files[0].Name, files[1].Name = files[1].Name, files[0].Name
	var buf bytes.Buffer
	buf.Write(blob[:offset])
	_, err = estargz.NewGzipCompressor().WriteTOCAndFooter(&buf, offset, toc, nil)
	must(err)
	return buf.Bytes()
}

// mapMemo remembers in memory.
type mapMemo struct {
	mu   sync.Mutex
	m    map[string]LayerMemo
	err  error
	hits int
}

func (m *mapMemo) Lookup(_ context.Context, d digest.Digest, params string) (LayerMemo, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l, ok := m.m[d.String()+params]
	if ok {
		m.hits++
	}
	return l, ok, m.err
}

func (m *mapMemo) Remember(_ context.Context, d digest.Digest, params string, l LayerMemo) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.Repositories = []string{"r.test/other"}
	m.m[d.String()+params] = l
	return m.err
}

func TestMemo(t *testing.T) {
	a, b := gzLayer(file("a", text(50_000, 1))), gzLayer(file("b", "b"))
	stock := stockBuild(t, tarOf(file("e", "e")))
	e := layerOf(stock, inflateAll(t, stock))
	memo := &mapMemo{m: map[string]LayerMemo{}}
	c := newConverter(t, 2)
	convert := func(img v1.Image) (*Result, error) {
		return c.Convert(context.Background(), Source{Image: img}, Options{Memo: memo})
	}
	first, err := convert(imageOf(t, a, b, e))
	must(err)
	defer first.Close()
	second, err := convert(imageOf(t, a, gzLayer(file("b", "changed")), e))
	must(err)
	defer second.Close()
	if memo.hits != 2 || a.opened.Load() != 1 || e.opened.Load() != 1 {
		t.Errorf("%d hits; a read %d times", memo.hits, a.opened.Load())
	}
	m1, m2 := manifest(t, first.Image), manifest(t, second.Image)
	for _, i := range []int{0, 2} {
		if fmt.Sprint(m1.Layers[i]) != fmt.Sprint(m2.Layers[i]) {
			t.Errorf("descriptors %v and %v", m1.Layers[i], m2.Layers[i])
		}
	}
	l := layers(t, second.Image)[0]
	if _, err := l.Compressed(); !errors.Is(err, accel.ErrNotFound) {
		t.Error(err)
	}
	if from := l.(interface{ MountFrom() []string }).MountFrom(); !slices.Equal(from, []string{"r.test/other"}) {
		t.Error(from)
	}
	if first.Stats.UncompressedBytes == 0 {
		t.Error("no uncompressed bytes")
	}
	third, err := convert(imageOf(t, a, b, e))
	must(err)
	defer third.Close()
	d1, _ := first.Image.Digest()
	if d3, _ := third.Image.Digest(); d1 != d3 || third.Stats.UncompressedBytes != first.Stats.UncompressedBytes {
		t.Errorf("%s, %+v; from the memo %s, %+v", d1, first.Stats, d3, third.Stats)
	}
	// An image that lies about a remembered layer's diff ID is found out.
	liar := layerOf(a.blob, []byte("something else"))
	if _, err := convert(imageOf(t, liar)); err == nil || !accel.IsPermanent(err) {
		t.Error(err)
	}
	// A memo that fails costs time only.
	memo.err = errors.New("disk full")
	fourth, err := convert(imageOf(t, a))
	must(err)
	fourth.Close()
}
