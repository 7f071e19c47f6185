package e2e

import (
	"archive/tar"
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// entry is one member of a layer; its Typeflag follows from the helpers below.
type entry struct {
	tar.Header
	content string
}

var stamp = time.Unix(1_700_000_000, 0)

func dir(name string) entry {
	return entry{Header: tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: stamp}}
}

func file(name, content string, mode int64) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(content)), ModTime: stamp}, content}
}

func link(name, to string, kind byte) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: kind, Linkname: to, Mode: 0o777, ModTime: stamp}}
}

func special(name string, kind byte, major, minor int64) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: kind, Mode: 0o644, Devmajor: major, Devminor: minor, ModTime: stamp}}
}

func (e entry) owned(uid, gid int) entry { e.Uid, e.Gid = uid, gid; return e }

func (e entry) xattr(name, value string) entry {
	e.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
	return e
}

func tarOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		must(t, tw.WriteHeader(&e.Header))
		_, err := io.WriteString(tw, e.content)
		must(t, err)
	}
	must(t, tw.Close())
	return buf.Bytes()
}

func gzipped(t *testing.T, raw []byte) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	_, err := zw.Write(raw)
	must(t, err)
	must(t, zw.Close())
	return diffIDLayer{static.NewLayer(buf.Bytes(), types.OCILayer), static.NewLayer(raw, types.OCIUncompressedLayer)}
}

func zstded(t *testing.T, raw []byte) v1.Layer {
	t.Helper()
	zw, err := zstd.NewWriter(nil)
	must(t, err)
	defer zw.Close()
	return diffIDLayer{static.NewLayer(zw.EncodeAll(raw, nil), types.OCILayerZStd), static.NewLayer(raw, types.OCIUncompressedLayer)}
}

// diffIDLayer is a compressed layer with the DiffID of its plain form.
type diffIDLayer struct {
	v1.Layer
	plain v1.Layer
}

func (l diffIDLayer) DiffID() (v1.Hash, error)             { return l.plain.Digest() }
func (l diffIDLayer) Uncompressed() (io.ReadCloser, error) { return l.plain.Compressed() }

func image(t *testing.T, arch string, layers ...v1.Layer) v1.Image {
	t.Helper()
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	return withLayers(t, base, arch, layers...)
}

func withLayers(t *testing.T, base v1.Image, arch string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(base, layers...)
	must(t, err)
	cfg, err := img.ConfigFile()
	must(t, err)
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", arch
	img, err = mutate.ConfigFile(img, cfg)
	must(t, err)
	return img
}

// noise is text that compresses a little, from a seed.
func noise(seed uint64, bytes int) string {
	rnd := rand.New(rand.NewPCG(seed, 2))
	b := make([]byte, bytes)
	for i := range b {
		b[i] = byte('a' + rnd.UintN(24))
	}
	return string(b)
}
