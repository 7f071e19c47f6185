package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

func digestFrom(s string) digest.Digest { return digest.Digest(s) }

const chunkSize = minChunkBytes // of newConverter

var faithful = map[string][]tarEntry{
	"empty":                  {},
	"one file":               {file("a", "hello")},
	"directories":            {dir("./"), dir("./a/", mode(0o1777)), dir("a/b", owner(5, 6)), file("a/b/c", "x")},
	"no parents":             {file("a/b/c", "x"), symlink("d/e/f", "../x")},
	"zero length":            {file("a", ""), file("b", "x"), file("c", "")},
	"hard links":             {dir("a"), dir("b"), file("a/x", "content", xattr("user.k", "v")), link("b/y", "a/x", xattr("user.k", "v")), link("z", "./b/y"), file("other", "o")},
	"hard link to a symlink": {symlink("s", "somewhere"), link("t", "s", mode(0o777))},
	"devices":                {device("null", tar.TypeChar, 1, 3), device("sda", tar.TypeBlock, 8, 0), fifo("pipe")},
	"xattrs":                 {file("a", "x", xattr("security.capability", "\x01\x00\x00\x02\xff\xfe\x00\x00"), xattr("user.empty", "")), dir("d", xattr("trusted.overlay.opaque", "y"))},
	"PAX names":              {file(strings.Repeat("long/", 60)+"name", "x", format(tar.FormatPAX)), symlink("s", strings.Repeat("t", 300), format(tar.FormatPAX)), file("äöü/日本", "x")},
	"GNU names":              {file(strings.Repeat("long/", 60)+"name", "x", format(tar.FormatGNU)), symlink("s", strings.Repeat("t", 300), format(tar.FormatGNU))},
	"large numbers":          {file("a", "x", owner(1<<31-2, 1<<31-2), format(tar.FormatGNU)), file("b", "x", owner(1<<31-2, 3), format(tar.FormatPAX))},
	"modes":                  {file("suid", "x", mode(0o4755)), file("sgid", "x", mode(0o2755)), file("none", "x", mode(0))},
	"owners' names":          {file("a", "x", owner(1, 1), ownerNames("u", "g")), file("b", "x", owner(1, 1), ownerNames("u", "g")), file("c", "x", owner(2, 1), ownerNames("v", "g"))},
	"times":                  {file("epoch", "x", at(time.Unix(0, 0))), file("fraction", "x", at(time.Unix(10, 6e8)), format(tar.FormatPAX)), file("old", "x", at(time.Unix(-5, 0)), format(tar.FormatPAX))},
	"whiteouts":              {dir("d"), file("d/.wh..wh..opq", ""), file("d/.wh.gone", ""), file("d/new", "x")},
	"odd names":              {file("/absolute", "x"), file("../../up", "y"), file("./dot/../dot2/f", "z"), file("with space\nand newline\"<&>", "q")},
	"chunk bounds": {
		file("minus", noise(chunkSize-1, 1)), file("even", noise(chunkSize, 2)), file("plus", noise(chunkSize+1, 3)),
		file("two", text(2*chunkSize, 4)), file("many", text(9*chunkSize+17, 5)), file("zeroes", string(make([]byte, 3*chunkSize))),
	},
	"a long run of headers": manyDirs(3000),
	"many batches":          manyFiles(300, 4000),
}

func manyDirs(n int) (out []tarEntry) {
	for i := range n {
		out = append(out, dir(fmt.Sprintf("d%d/", i)))
	}
	return append(out, file("last", "x"))
}

func manyFiles(n, size int) (out []tarEntry) {
	for i := range n {
		out = append(out, file(fmt.Sprintf("d%d/f%d", i%7, i), text(size+i, uint64(i))))
	}
	return out
}

// TestFaithful: what comes out is the same tree, to the stock library as well as
// to Diff, and the tar below is the same bytes.
func TestFaithful(t *testing.T) {
	for name, entries := range faithful {
		t.Run(name, func(t *testing.T) {
			src := tarOf(entries...)
			img := imageOf(t, layerOf(gz(src), src))
			res := converted(t, newConverter(t, 2), img)
			checkSame(t, img, res.Image, src)
		})
	}
}

func checkSame(t *testing.T, source, target v1.Image, src []byte) {
	t.Helper()
	l, d := layers(t, target)[0], manifest(t, target).Layers[0]
	blob := bytesOf(t, l)
	if h := hashOf(blob); h != d.Digest || int64(len(blob)) != d.Size {
		t.Fatalf("descriptor says %s of %d bytes, blob is %s of %d", d.Digest, d.Size, h, len(blob))
	}
	z := opened(t, blob, d)
	if offset, _, err := estargz.OpenFooter(section(blob)); err != nil || fmt.Sprint(offset) != d.Annotations[accel.AnnotationTOCOffset] {
		t.Errorf("TOC at %d (%v), annotation says %s", offset, err, d.Annotations[accel.AnnotationTOCOffset])
	}
	_, none := z.Lookup(estargz.NoPrefetchLandmark)
	if _, first := z.Lookup(estargz.PrefetchLandmark); none == first {
		t.Error("not one of the two landmarks")
	}
	r, err := gzip.NewReader(bytes.NewReader(blob))
	must(err)
	whole, err := io.ReadAll(r)
	must(err)
	if h, _ := l.DiffID(); h != hashOf(whole) {
		t.Errorf("diff ID %s, content has %s", h, hashOf(whole))
	}
	if got := d.Annotations[estargz.StoreUncompressedSizeAnnotation]; got != fmt.Sprint(len(whole)) {
		t.Errorf("uncompressed size %s, want %d", got, len(whole))
	}
	if src != nil {
		if entries := src[:len(src)-2*tarBlock]; !bytes.HasPrefix(whole, entries) {
			t.Error("the tar's bytes changed")
		}
	}
	if diff, err := Diff(context.Background(), source, target, DiffOptions{}); err != nil || len(diff) > 0 {
		t.Errorf("Diff: %v %v", diff, err)
	}
	if diff, err := Diff(context.Background(), source, target, DiffOptions{SampleBytes: 5000}); err != nil || len(diff) > 0 {
		t.Errorf("sampled Diff: %v %v", diff, err)
	}
	// And the TOC, which is what is mounted, against the tar.
	tt, _, err := readTree(context.Background(), layers(t, source)[0], prefix{})
	must(err)
	zt, err := treeOf(z)
	must(err)
	if diff := diffTrees(tt, zt, comparison{max: 10}); len(diff) > 0 {
		t.Errorf("TOC: %v", diff)
	}
}

func section(b []byte) *io.SectionReader {
	return io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b)))
}

// TestOracle compares with what the stock library makes of the same tar.
func TestOracle(t *testing.T) {
	for name, entries := range faithful {
		t.Run(name, func(t *testing.T) {
			src := tarOf(entries...)
			stock := stockBuild(t, src, estargz.WithChunkSize(chunkSize))
			z, err := estargz.Open(section(stock))
			must(err)
			want, err := treeOf(z)
			must(err)
			img := imageOf(t, layerOf(src, src))
			res := converted(t, newConverter(t, 2), img)
			got, err := treeOf(opened(t, bytesOf(t, layers(t, res.Image)[0]), manifest(t, res.Image).Layers[0]))
			must(err)
			for _, d := range diffTrees(want, got, comparison{max: 10, tolerance: 1}) {
				// The stock library writes no epoch and keeps times that containerd bounds.
				if d.What != "modification time" || name != "times" {
					t.Errorf("stock and ours: %v", d)
				}
			}
		})
	}
}

func stockBuild(t testing.TB, src []byte, o ...estargz.Option) []byte {
	t.Helper()
	b, err := estargz.Build(section(src), o...)
	must(err)
	out, err := io.ReadAll(b)
	must(err)
	must(b.Close())
	return out
}

// TestApplied: several entries for one name end as containerd would leave them.
func TestApplied(t *testing.T) {
	for name, c := range map[string]struct {
		in   []tarEntry
		want []tarEntry
	}{
		"last wins":                 {[]tarEntry{file("a", "1"), file("b", "b"), file("./a", "22")}, []tarEntry{file("b", "b"), file("a", "22")}},
		"directory is merged":       {[]tarEntry{dir("d", xattr("user.a", "1")), file("d/f", "x"), dir("d/", mode(0o700))}, []tarEntry{dir("d", mode(0o700), xattr("user.a", "1")), file("d/f", "x")}},
		"file replaces a directory": {[]tarEntry{dir("d"), file("d/f", "x"), file("d", "now")}, []tarEntry{file("d", "now")}},
		"directory replaces a file": {[]tarEntry{file("d", "was"), dir("d"), file("d/f", "x")}, []tarEntry{dir("d"), file("d/f", "x")}},
		"link keeps what its first name lost": {
			[]tarEntry{file("a", "first"), link("b", "a"), link("c", "b"), file("a", "second")},
			[]tarEntry{file("b", "first"), link("c", "b"), file("a", "second")},
		},
		"link sets attributes":        {[]tarEntry{file("a", "x"), link("b", "a", owner(7, 8), mode(0o600))}, []tarEntry{file("a", "x", owner(7, 8), mode(0o600)), link("b", "a", owner(7, 8), mode(0o600))}},
		"link before its target":      {[]tarEntry{link("b", "c"), link("c", "a"), file("a", "x")}, []tarEntry{file("a", "x"), link("b", "a"), link("c", "a")}},
		"below a symlink":             {[]tarEntry{dir("usr/lib"), symlink("lib", "usr/lib"), file("lib/x", "x"), link("y", "lib/x")}, []tarEntry{dir("usr/lib"), symlink("lib", "usr/lib"), file("usr/lib/x", "x"), link("y", "usr/lib/x")}},
		"below a symlink upwards":     {[]tarEntry{dir("a/b"), symlink("a/b/s", "../../../.."), file("a/b/s/x", "x")}, []tarEntry{dir("a/b"), symlink("a/b/s", "../../../.."), file("x", "x")}},
		"left-over names are dropped": {[]tarEntry{file(estargz.TOCTarName, "{}"), file(estargz.PrefetchLandmark, "\x0f"), file("d/"+estargz.TOCTarName, "kept")}, []tarEntry{file("d/"+estargz.TOCTarName, "kept")}},
		"global header":               {[]tarEntry{{h: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}}, file("a", "x")}, []tarEntry{file("a", "x")}},
	} {
		t.Run(name, func(t *testing.T) {
			in, want := tarOf(c.in...), tarOf(c.want...)
			img := imageOf(t, layerOf(gz(in), in))
			res := converted(t, newConverter(t, 2), img)
			checkSame(t, img, res.Image, in)
			if diff, err := Diff(context.Background(), imageOf(t, layerOf(want, want)), res.Image, DiffOptions{}); err != nil || len(diff) > 0 {
				t.Errorf("%v %v", diff, err)
			}
		})
	}
}

func TestCompressions(t *testing.T) {
	src := tarOf(manyFiles(50, 3000)...)
	cut := len(src) / 3
	for name, blob := range map[string][]byte{
		"gzip":             gz(src),
		"two members":      slices.Concat(gz(src[:cut]), gz(src[cut:])),
		"empty members":    slices.Concat(gz(nil), gz(src), gz(nil)),
		"zero padding":     slices.Concat(gz(src), make([]byte, 5000)),
		"trailing garbage": slices.Concat(gz(src), []byte("garbage, and more of it")),
		"zstd":             zst(src),
		"two zstd frames":  slices.Concat(zst(src[:cut]), zst(src[cut:])),
		"skippable frame":  slices.Concat([]byte{0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3}, zst(src)),
		"uncompressed":     src,
	} {
		t.Run(name, func(t *testing.T) {
			img := imageOf(t, layerOf(blob, src))
			checkSame(t, img, converted(t, newConverter(t, 2), img).Image, src)
		})
	}
	t.Run("garbage after the tar's end", func(t *testing.T) {
		long := slices.Concat(src, []byte("junk"), make([]byte, 100_000))
		img := imageOf(t, layerOf(gz(long), long))
		checkSame(t, img, converted(t, newConverter(t, 2), img).Image, src)
	})
	t.Run("no end marker, no last padding", func(t *testing.T) {
		short := tarOf(file("a", "x"))[:tarBlock+1]
		img := imageOf(t, layerOf(gz(short), short))
		checkSame(t, img, converted(t, newConverter(t, 2), img).Image, nil)
	})
}

// TestBroken: a clear error, permanent where the bytes are what they should be.
func TestBroken(t *testing.T) {
	src := tarOf(manyFiles(50, 3000)...)
	whole := gz(src)
	flipped := bytes.Clone(whole)
	flipped[len(flipped)-5] ^= 0x55
	for name, c := range map[string]struct {
		blob, tar []byte
		want      string
	}{
		"truncated gzip":  {whole[:len(whole)/2], src, "unexpected EOF"},
		"truncated zstd":  {zst(src)[:1000], src, "unexpected EOF"},
		"truncated tar":   {gz(src[:len(src)/2+7]), src[:len(src)/2+7], "tar: content of"},
		"corrupted gzip":  {flipped, src, "checksum"},
		"not a tar":       {gz([]byte(strings.Repeat("no tar ", 500))), nil, "tar: header"},
		"wrong diff ID":   {whole, []byte("other"), "the image config says"},
		"link to nowhere": {tarOf(link("a", "b")), tarOf(link("a", "b")), "not in this layer"},
		"links in a ring": {tarOf(link("a", "b"), link("b", "a")), tarOf(link("a", "b"), link("b", "a")), "hard link"},
		"link to a dir":   {tarOf(dir("d"), link("a", "d")), tarOf(dir("d"), link("a", "d")), "directory"},
		"below a file":    {tarOf(file("a", "x"), file("a/b", "x")), tarOf(file("a", "x"), file("a/b", "x")), "no directory"},
		"long name":       {tarOf(file(strings.Repeat("n/", 3000)+"n", "")), tarOf(file(strings.Repeat("n/", 3000)+"n", "")), "longer"},
	} {
		t.Run(name, func(t *testing.T) {
			l := layerOf(c.blob, c.tar)
			_, err := newConverter(t, 2).Convert(context.Background(), Source{Image: imageOf(t, l)}, Options{})
			if err == nil || !strings.Contains(err.Error(), c.want) || !accel.IsPermanent(err) {
				t.Errorf("error %v (permanent %v), want a permanent one with %q", err, accel.IsPermanent(err), c.want)
			}
			// The same bytes from a reader that finds at the end that they are wrong: try again.
			wrong := errors.New("the digest does not hold")
			l.open = func(b []byte) io.ReadCloser {
				return io.NopCloser(io.MultiReader(bytes.NewReader(b), failing{wrong}))
			}
			_, err = newConverter(t, 2).Convert(context.Background(), Source{Image: imageOf(t, l)}, Options{})
			if !errors.Is(err, wrong) || accel.IsPermanent(err) {
				t.Errorf("error %v, want the reader's", err)
			}
		})
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestRejected(t *testing.T) {
	for name, c := range map[string]struct {
		entry tarEntry
		rule  string
		want  string
	}{
		"name":      {file("caf\xe9", "x"), "format.utf8-names", `"caf\xe9"`},
		"target":    {symlink("a", "caf\xe9"), "format.utf8-names", `"caf\xe9"`},
		"xattr":     {file("a", "x", xattr("user.\xe9", "v")), "format.utf8-names", `\xe9`},
		"cont file": {made(tar.Header{Typeflag: tar.TypeCont, Name: "c"}, nil), "format.entry-type", `"c"`},
	} {
		t.Run(name, func(t *testing.T) {
			src := tarOf(c.entry)
			_, err := newConverter(t, 2).Convert(context.Background(), Source{Image: imageOf(t, layerOf(src, src))}, Options{})
			var r *accel.Rejection
			if !errors.As(err, &r) || r.Rule != c.rule || !strings.Contains(r.Detail, c.want) {
				t.Errorf("%v, want %s with %s", err, c.rule, c.want)
			}
		})
	}
}

// TestReproducible: the bytes depend on nothing but source and Params.
func TestReproducible(t *testing.T) {
	src := tarOf(append(manyFiles(120, 6000), file("big", text(400_000, 9)), file("noise", noise(300_000, 8)))...)
	for _, level := range []int{6, 9} {
		want := v1.Hash{}
		for _, workers := range []int{1, 2, 8} {
			c := newConverter(t, workers)
			c.Params.Level = level
			for range 2 { // the second with used compressors
				got, err := converted(t, c, imageOf(t, layerOf(gz(src), src))).Image.Digest()
				must(err)
				if want == (v1.Hash{}) {
					want = got
				}
				if got != want {
					t.Errorf("level %d, %d workers: %s, want %s", level, workers, got, want)
				}
			}
		}
	}
}

func TestMaxUncompressed(t *testing.T) {
	bomb := tarOf(file("zeroes", string(make([]byte, 8<<20))))
	l := layerOf(gz(bomb), bomb)
	c := newConverter(t, 2)
	c.Policy.MaxUncompressedBytes = 1 << 20
	read := 0
	l.open = func(b []byte) io.ReadCloser { return io.NopCloser(countTo{bytes.NewReader(b), &read}) }
	_, err := c.Convert(context.Background(), Source{Image: imageOf(t, l)}, Options{})
	var r *accel.Rejection
	if !errors.As(err, &r) || r.Rule != "policy.max_uncompressed_size" || !strings.Contains(r.Detail, "1048576") {
		t.Errorf("%v", err)
	}
}

type countTo struct {
	r io.Reader
	n *int
}

func (c countTo) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	*c.n += n
	return n, err
}
