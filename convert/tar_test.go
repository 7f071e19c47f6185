package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The tests' small language: tarOf(dir("a/"), file("a/b", "content", owner(1, 2))).

type tarEntry struct {
	h    tar.Header
	body []byte
	raw  []byte // instead of the others
}

type option func(*tar.Header)

func made(h tar.Header, body []byte, opts ...option) tarEntry {
	h.ModTime = time.Unix(1_700_000_000, 0)
	for _, o := range opts {
		o(&h)
	}
	return tarEntry{h: h, body: body}
}

func dir(name string, o ...option) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, nil, o...)
}
func file(name, content string, o ...option) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}, []byte(content), o...)
}
func symlink(name, to string, o ...option) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, nil, o...)
}
func link(name, to string, o ...option) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to, Mode: 0o644}, nil, o...)
}
func device(name string, kind byte, major, minor int64, o ...option) tarEntry {
	return made(tar.Header{Typeflag: kind, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}, nil, o...)
}
func fifo(name string, o ...option) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o600}, nil, o...)
}
func rawBytes(b []byte) tarEntry { return tarEntry{raw: b} }

func mode(m int64) option           { return func(h *tar.Header) { h.Mode = m } }
func owner(uid, gid int) option     { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }
func ownerNames(u, g string) option { return func(h *tar.Header) { h.Uname, h.Gname = u, g } }
func at(t time.Time) option         { return func(h *tar.Header) { h.ModTime = t } }
func format(f tar.Format) option    { return func(h *tar.Header) { h.Format = f } }
func xattr(name, v string) option {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = v
	}
}

func tarOf(entries ...tarEntry) []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		if e.raw != nil {
			must(tw.Flush())
			buf.Write(e.raw)
			continue
		}
		must(tw.WriteHeader(&e.h))
		if _, err := tw.Write(e.body); err != nil {
			panic(err)
		}
	}
	must(tw.Close())
	return buf.Bytes()
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func gz(b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(b)
	must(w.Close())
	return buf.Bytes()
}

func zst(b []byte) []byte {
	w, err := zstd.NewWriter(nil)
	must(err)
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// noise does not compress, text does.
func noise(n int, seed uint64) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return string(b)
}

func text(n int, seed uint64) string {
	r := rand.New(rand.NewPCG(seed, 1))
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "line %d of %s\n", r.IntN(1000), []string{"a program", "some text", "a library", "the data"}[r.IntN(4)])
	}
	return b.String()[:n]
}

// blobLayer is a layer of given bytes.
type blobLayer struct {
	blob      []byte
	tar       []byte // what DiffID is of
	mediaType types.MediaType
	open      func([]byte) io.ReadCloser // instead of the blob's bytes
	opened    atomic.Int32
}

func layerOf(blob, tarBytes []byte) *blobLayer {
	return &blobLayer{blob: blob, tar: tarBytes, mediaType: types.OCILayer}
}

func (l *blobLayer) Digest() (v1.Hash, error)            { return hashOf(l.blob), nil }
func (l *blobLayer) DiffID() (v1.Hash, error)            { return hashOf(l.tar), nil }
func (l *blobLayer) Size() (int64, error)                { return int64(len(l.blob)), nil }
func (l *blobLayer) MediaType() (types.MediaType, error) { return l.mediaType, nil }
func (l *blobLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.tar)), nil
}
func (l *blobLayer) Compressed() (io.ReadCloser, error) {
	l.opened.Add(1)
	if l.open != nil {
		return l.open(l.blob), nil
	}
	return io.NopCloser(bytes.NewReader(l.blob)), nil
}

func hashOf(b []byte) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sha256.Sum256(b))}
}

func imageOf(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	return imageFor(t, v1.Platform{OS: "linux", Architecture: "amd64"}, layers...)
}

func imageFor(t testing.TB, p v1.Platform, layers ...v1.Layer) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for i, l := range layers {
		var err error
		img, err = mutate.Append(img, mutate.Addendum{Layer: l, History: v1.History{CreatedBy: fmt.Sprint("step ", i)}})
		must(err)
	}
	c, err := img.ConfigFile()
	must(err)
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Variant = p.OS, p.Architecture, p.Variant
	c.Config.Env = []string{"PATH=/bin", "A=<&>"}
	img, err = mutate.ConfigFile(img, c)
	must(err)
	return img
}

func newConverter(t testing.TB, workers int) *Converter {
	t.Helper()
	d := t.TempDir()
	t.Cleanup(func() {
		left, err := os.ReadDir(d)
		if err != nil || len(left) > 0 {
			t.Errorf("temporary files left: %v %v", left, err)
		}
	})
	return &Converter{TempDir: d, Workers: workers, Params: Params{ChunkBytes: minChunkBytes}}
}

// converted converts an image, and closes the result in the end.
func converted(t testing.TB, c *Converter, img v1.Image) *Result {
	t.Helper()
	res, err := c.Convert(context.Background(), Source{Repository: "r.test/app", Image: img}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(res.Close()) })
	return res
}

func bytesOf(t testing.TB, l v1.Layer) []byte {
	t.Helper()
	rc, err := l.Compressed()
	must(err)
	defer rc.Close()
	b, err := io.ReadAll(rc)
	must(err)
	return b
}

func layers(t testing.TB, img v1.Image) []v1.Layer {
	t.Helper()
	ls, err := img.Layers()
	must(err)
	return ls
}

func manifest(t testing.TB, img v1.Image) *v1.Manifest {
	t.Helper()
	m, err := img.Manifest()
	must(err)
	return m
}

// opened verifies a converted layer with the stock library, content and all.
func opened(t testing.TB, blob []byte, desc v1.Descriptor) *estargz.Reader {
	t.Helper()
	z, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	if err != nil {
		t.Fatal("estargz.Open: ", err)
	}
	v, err := z.VerifyTOC(digestFrom(desc.Annotations[estargz.TOCJSONDigestAnnotation]))
	if err != nil {
		t.Fatal("VerifyTOC: ", err)
	}
	root, _ := z.Lookup("")
	var walk func(path string, e *estargz.TOCEntry)
	walk = func(path string, e *estargz.TOCEntry) {
		e.ForeachChild(func(name string, c *estargz.TOCEntry) bool {
			p := name
			if path != "" {
				p = path + "/" + name
			}
			if c.Type == "reg" && c.Size > 0 {
				readAll(t, z, v, p, c)
			}
			walk(p, c)
			return true
		})
	}
	walk("", root)
	return z
}

// readAll reads a file through the stock library chunk by chunk, as a snapshotter does.
func readAll(t testing.TB, z *estargz.Reader, v estargz.TOCEntryVerifier, path string, e *estargz.TOCEntry) []byte {
	t.Helper()
	r, err := z.OpenFile(path)
	if err != nil {
		t.Fatalf("OpenFile %q: %v", path, err)
	}
	h := sha256.New()
	var all []byte
	for at := int64(0); at < e.Size; {
		c, ok := z.ChunkEntryForOffset(path, at)
		if !ok {
			t.Fatalf("%q has no chunk at %d", path, at)
		}
		p := make([]byte, c.ChunkSize)
		if _, err := r.ReadAt(p, at); err != nil {
			t.Fatalf("read %q at %d: %v", path, at, err)
		}
		cv, err := v.Verifier(c)
		if err != nil {
			t.Fatal(err)
		}
		cv.Write(p)
		if !cv.Verified() {
			t.Fatalf("%q at %d is not what its chunk digest says", path, at)
		}
		h.Write(p)
		all = append(all, p...)
		at += c.ChunkSize
	}
	if got := fmt.Sprintf("sha256:%x", h.Sum(nil)); got != e.Digest {
		t.Fatalf("%q: digest %s, TOC says %s", path, got, e.Digest)
	}
	return all
}
