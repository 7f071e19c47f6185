package lazyfs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"accel"
	"accel/convert"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// The tests' small language: tarOf(aDir("a/"), aFile("a/b", "content", owned(1, 2))).

type tarEntry struct {
	h    tar.Header
	body string
}

type tarOption func(*tar.Header)

func made(h tar.Header, body string, opts ...tarOption) tarEntry {
	h.ModTime = time.Unix(1_700_000_000, 0)
	h.Size = int64(len(body))
	for _, o := range opts {
		o(&h)
	}
	return tarEntry{h: h, body: body}
}

func aDir(name string, o ...tarOption) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, "", o...)
}
func aFile(name, content string, o ...tarOption) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content, o...)
}
func aSymlink(name, to string, o ...tarOption) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, "", o...)
}
func aLink(name, to string, o ...tarOption) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to, Mode: 0o644}, "", o...)
}
func aDevice(name string, kind byte, major, minor int64, o ...tarOption) tarEntry {
	return made(tar.Header{Typeflag: kind, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}, "", o...)
}
func aFIFO(name string, o ...tarOption) tarEntry {
	return made(tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o600}, "", o...)
}

func withMode(m int64) tarOption   { return func(h *tar.Header) { h.Mode = m } }
func owned(uid, gid int) tarOption { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }
func at(seconds int64) tarOption   { return func(h *tar.Header) { h.ModTime = time.Unix(seconds, 0) } }
func withXattr(k, v string) tarOption {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
}

func tarOf(entries ...tarEntry) []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		must(tw.WriteHeader(&e.h))
		_, err := io.WriteString(tw, e.body)
		must(err)
	}
	must(tw.Close())
	return buf.Bytes()
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// noise does not compress.
func noise(n int, seed uint64) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return string(b)
}

// esgz is a layer in eStargz form.
type esgz struct {
	blob      []byte
	toc       []byte
	tocOffset int64
}

// stock makes the layer with the stock library.
func stock(t testing.TB, layer []byte, opts ...estargz.Option) esgz {
	t.Helper()
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer), 0, int64(len(layer))), opts...)
	must(err)
	defer b.Close()
	blob, err := io.ReadAll(b)
	must(err)
	return opened(t, blob)
}

// ours makes it with package convert.
func ours(t testing.TB, layer []byte) esgz {
	t.Helper()
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, err := z.Write(layer)
	must(err)
	must(z.Close())
	img, err := mutate.Append(empty.Image, mutate.Addendum{Layer: gzipLayer{static.NewLayer(zipped.Bytes(), types.OCILayer), layer}})
	must(err)
	c := &convert.Converter{TempDir: t.TempDir(), Workers: 2, Params: convert.Params{ChunkBytes: 64 << 10}}
	res, err := c.Convert(context.Background(), convert.Source{Repository: "r.test/app", Image: img}, convert.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer res.Close()
	layers, err := res.Image.Layers()
	must(err)
	r, err := layers[0].Compressed()
	must(err)
	defer r.Close()
	blob, err := io.ReadAll(r)
	must(err)
	return opened(t, blob)
}

// gzipLayer knows its uncompressed form, which static.Layer does not.
type gzipLayer struct {
	v1.Layer
	tar []byte
}

func (l gzipLayer) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.tar))
	return h, err
}
func (l gzipLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.tar)), nil
}

func opened(t testing.TB, blob []byte) esgz {
	t.Helper()
	offset, _, err := estargz.OpenFooter(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	must(err)
	z, err := gzip.NewReader(bytes.NewReader(blob[offset:]))
	must(err)
	tr := tar.NewReader(z)
	_, err = tr.Next()
	must(err)
	toc, err := io.ReadAll(tr)
	must(err)
	return esgz{blob: blob, toc: toc, tocOffset: offset}
}

// stored builds the layer and stores its files, with all content.
func stored(t testing.TB, z esgz) Files {
	t.Helper()
	l, err := Build(z.toc, z.tocOffset)
	if err != nil {
		t.Fatal(err)
	}
	d := t.TempDir()
	f := Files{Meta: filepath.Join(d, "meta"), Table: filepath.Join(d, "table"), Data: filepath.Join(d, "data")}
	if err := l.Store(f); err != nil {
		t.Fatal(err)
	}
	fill(t, z.blob, f)
	return f
}

// fill takes every chunk out of the blob as a node does: its members, inflated
// from their front.
func fill(t testing.TB, blob []byte, f Files) {
	t.Helper()
	table := openedTable(t, f.Table)
	data, err := os.OpenFile(f.Data, os.O_WRONLY, 0)
	must(err)
	defer data.Close()
	for i := range table.Len() {
		c := table.At(i)
		b := chunkOf(t, blob, c)
		if sha256.Sum256(b) != c.Digest {
			t.Fatalf("chunk %d has not its digest", i)
		}
		_, err := data.WriteAt(b, c.DataOffset)
		must(err)
	}
}

func chunkOf(t testing.TB, blob []byte, c accel.Chunk) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(blob[c.BlobOffset : c.BlobOffset+c.BlobBytes]))
	if err != nil {
		t.Fatalf("member at %d: %v", c.BlobOffset, err)
	}
	_, err = io.CopyN(io.Discard, z, c.InnerOffset)
	must(err)
	b := make([]byte, c.Bytes)
	_, err = io.ReadFull(z, b)
	must(err)
	return b
}

func openedTable(t testing.TB, path string) *Table {
	t.Helper()
	table, err := OpenTable(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	return table
}

// mounted mounts a layer's files with the kernel's EROFS.
func mounted(t testing.TB, f Files) string {
	t.Helper()
	needRoot(t)
	checkImage(t, f)
	return mountAt(t, f.Meta, "erofs", "device="+f.Data)
}

func mountAt(t testing.TB, source, kind, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(source, dir, kind, unix.MS_RDONLY, options); err != nil {
		t.Fatalf("mount -t %s %s -o %s: %v", kind, source, options, err)
	}
	t.Cleanup(func() { must(unix.Unmount(dir, 0)) })
	return dir
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: mounting takes root")
	}
}

// checkImage has erofs-utils look at the image, where they are installed, and
// takes the super block's checksum again.
func checkImage(t testing.TB, f Files) {
	t.Helper()
	meta, err := os.ReadFile(f.Meta)
	must(err)
	if magic := binary.LittleEndian.Uint32(meta[superOffset:]); magic != erofsMagic {
		t.Fatalf("magic %x", magic)
	}
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Log("NOT TESTED with fsck.erofs: erofs-utils are not installed")
		return
	}
	// Without -extract it walks over everything; a file without content it cannot read.
	if out, err := exec.Command(fsck, "--device="+f.Data, "--extract", f.Meta).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

func quoted(s string) string { return strconv.QuoteToASCII(s) }
