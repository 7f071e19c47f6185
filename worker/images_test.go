package worker_test

import (
	"archive/tar"
	"bytes"
	"io"
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// image is a small image whose content follows from seed.
func image(t *testing.T, seed uint64, arch string) v1.Image {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	rnd := rand.New(rand.NewPCG(seed, 1))
	data := make([]byte, 64<<10)
	for i := range data {
		data[i] = byte(rnd.UintN(32))
	}
	for _, h := range []*tar.Header{
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "etc/data", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data))},
		{Name: "etc/link", Typeflag: tar.TypeSymlink, Linkname: "data"},
	} {
		must(t, tw.WriteHeader(h))
		if h.Typeflag == tar.TypeReg {
			_, err := tw.Write(data)
			must(t, err)
		}
	}
	must(t, tw.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
	must(t, err)
	return withLayers(t, arch, layer)
}

func withLayers(t *testing.T, arch string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, layers...)
	must(t, err)
	cfg, err := img.ConfigFile()
	must(t, err)
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", arch
	img, err = mutate.ConfigFile(img, cfg)
	must(t, err)
	return img
}

// poisoned is an image whose layer is no tar at all, though its digest is right.
func poisoned(t *testing.T) v1.Image {
	return withLayers(t, "amd64", static.NewLayer(bytes.Repeat([]byte("no tar "), 1000), types.OCILayer))
}

func index(t *testing.T, imgs ...v1.Image) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, img := range imgs {
		cfg, err := img.ConfigFile()
		must(t, err)
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: cfg.OS, Architecture: cfg.Architecture},
		}})
	}
	return idx
}

func digestOf(t *testing.T, img v1.Image) string {
	t.Helper()
	h, err := img.Digest()
	must(t, err)
	return h.String()
}

// eStargz is an image that another tool made lazily loadable already.
func eStargz(t *testing.T) v1.Image {
	t.Helper()
	layers, err := image(t, 7, "amd64").Layers()
	must(t, err)
	rc, err := layers[0].Uncompressed()
	must(t, err)
	plain, err := io.ReadAll(rc)
	must(t, err)
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))))
	must(t, err)
	raw, err := io.ReadAll(blob)
	must(t, err)
	must(t, blob.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil },
		tarball.WithMediaType(types.OCILayer))
	must(t, err)
	uncompressed, err := layer.Uncompressed()
	must(t, err)
	bytesOut, err := io.Copy(io.Discard, uncompressed)
	must(t, err)
	img, err := mutate.Append(withLayers(t, "amd64"), mutate.Addendum{Layer: layer, Annotations: map[string]string{
		estargz.TOCJSONDigestAnnotation:         blob.TOCDigest().String(),
		estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(bytesOut, 10),
	}})
	must(t, err)
	return img
}
