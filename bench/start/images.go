package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// cached is the image that convert makes of src, from the user's cache directory
// where it was made before: the stock library takes minutes. A change of what is
// made needs a new kind.
func cached(ctx context.Context, image, kind string, src v1.Image, make func(ctx context.Context, work string) (v1.Image, error)) (_ v1.Image, err error) {
	home, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	of, err := src.Digest()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(home, "accel-images", fmt.Sprintf("%s-%s-%.12s", image, kind, of.Hex))
	if _, err := os.Stat(filepath.Join(dir, "index.json")); errors.Is(err, os.ErrNotExist) {
		fmt.Fprintf(os.Stderr, "%s: making the form %s, once\n", image, kind)
		if err := makeLayout(ctx, dir, make); err != nil {
			return nil, fmt.Errorf("make the form %s: %w", kind, err)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	return index.Image(m.Manifests[0].Digest)
}

func makeLayout(ctx context.Context, dir string, make func(ctx context.Context, work string) (v1.Image, error)) (err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), "making-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	img, err := make(ctx, work)
	if err != nil {
		return err
	}
	staged := filepath.Join(work, "layout")
	path, err := layout.Write(staged, empty.Index)
	if err != nil {
		return err
	}
	if err := path.AppendImage(img); err != nil {
		return err
	}
	return os.Rename(staged, dir) // the commit: one that was cut short leaves nothing
}

// stockImage is src as eStargz by the stock library at its defaults.
func stockImage(ctx context.Context, image string, src v1.Image) (v1.Image, error) {
	return cached(ctx, image, "stock-1", src, func(ctx context.Context, work string) (v1.Image, error) {
		return stockConvert(ctx, src, nil, work)
	})
}

// readAnnotation of an optimised image is the bytes that its recorded start read.
const readAnnotation = "dev.accel.bench.read-bytes"

// optimisedImage is src as the stock optimiser makes it: with the files in front
// that a start was recorded to read.
func (b *bed) optimisedImage(ctx context.Context, s startable, src, stock v1.Image) (v1.Image, error) {
	return cached(ctx, s.name, "optimised-2", src, func(ctx context.Context, work string) (v1.Image, error) {
		recorded, err := b.record(ctx, s, src)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(os.Stderr, "%s: a start opens %d files and reads %.1f MB\n", s.name, len(recorded.files), float64(recorded.residentBytes)/megabyte)
		first, err := byLayer(recorded.files, stock, work)
		if err != nil {
			return nil, err
		}
		img, err := stockConvert(ctx, src, first, work)
		if err != nil {
			return nil, err
		}
		return mutate.Annotations(img, map[string]string{readAnnotation: strconv.FormatInt(recorded.residentBytes, 10)}).(v1.Image), nil
	})
}

// byLayer gives each layer those files that are seen from it: a file that several
// layers have is the topmost one's.
func byLayer(files []string, stock v1.Image, work string) ([][]string, error) {
	layers, err := stock.Layers()
	if err != nil {
		return nil, err
	}
	readers := make([]*estargz.Reader, len(layers))
	for i, l := range layers {
		file, size, err := toFile(l, work)
		if err != nil {
			return nil, err
		}
		defer file.Close() // read only
		if readers[i], err = estargz.Open(io.NewSectionReader(file, 0, size)); err != nil {
			return nil, err
		}
	}
	first := make([][]string, len(layers))
	for _, name := range files {
		for i := len(readers) - 1; i >= 0; i-- {
			if _, ok := readers[i].Lookup(name); ok {
				first[i] = append(first[i], name)
				break
			}
		}
	}
	return first, nil
}

// toFile writes a compressed layer into an unlinked file.
func toFile(l v1.Layer, work string) (_ *os.File, sizeBytes int64, err error) {
	rc, err := l.Compressed()
	if err != nil {
		return nil, 0, err
	}
	file, err := os.CreateTemp(work, "layer-")
	if err != nil {
		return nil, 0, errors.Join(err, rc.Close())
	}
	sizeBytes, err = io.Copy(file, rc)
	if err := errors.Join(err, rc.Close(), os.Remove(file.Name())); err != nil {
		return nil, 0, errors.Join(err, file.Close())
	}
	return file, sizeBytes, nil
}

// stockConvert makes every layer eStargz by the stock library, with the given
// files first.
func stockConvert(ctx context.Context, src v1.Image, first [][]string, work string) (v1.Image, error) {
	layers, err := src.Layers()
	if err != nil {
		return nil, err
	}
	cfg, err := src.ConfigFile()
	if err != nil {
		return nil, err
	}
	bare := cfg.DeepCopy()
	bare.RootFS.DiffIDs, bare.History = nil, nil
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.ConfigFile(img, bare); err != nil {
		return nil, err
	}
	for i, l := range layers {
		var files []string
		if first != nil {
			files = first[i]
		}
		made, err := stockLayer(ctx, l, files, work, fmt.Sprint("made", i))
		if err != nil {
			return nil, err
		}
		if img, err = mutate.Append(img, made); err != nil {
			return nil, err
		}
	}
	return img, nil
}

func stockLayer(ctx context.Context, l v1.Layer, first []string, work, name string) (_ mutate.Addendum, err error) {
	in, size, err := toFile(l, work)
	if err != nil {
		return mutate.Addendum{}, err
	}
	defer in.Close() // read only
	options := []estargz.Option{estargz.WithContext(ctx)}
	var missed []string
	if len(first) > 0 {
		options = append(options, estargz.WithPrioritizedFiles(first), estargz.WithAllowPrioritizeNotFound(&missed))
	}
	blob, err := estargz.Build(io.NewSectionReader(in, 0, size), options...)
	if err != nil {
		return mutate.Addendum{}, err
	}
	out, err := os.Create(filepath.Join(work, name))
	if err != nil {
		return mutate.Addendum{}, errors.Join(err, blob.Close())
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), blob)
	if err := errors.Join(err, blob.Close(), out.Close()); err != nil {
		return mutate.Addendum{}, err
	}
	if len(missed) > 0 {
		return mutate.Addendum{}, fmt.Errorf("%d recorded files are not in their layer, such as %s", len(missed), missed[0])
	}
	uncompressed, err := blob.UncompressedSize()
	if err != nil {
		return mutate.Addendum{}, err
	}
	diffID, err := v1.NewHash(blob.DiffID().String())
	return mutate.Addendum{
		Layer: fileLayer{path: out.Name(), sizeBytes: n, digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", h.Sum(nil))}, diffID: diffID},
		Annotations: map[string]string{
			estargz.TOCJSONDigestAnnotation:         blob.TOCDigest().String(),
			estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(uncompressed, 10),
		},
	}, err
}

// fileLayer is a compressed layer in a file.
type fileLayer struct {
	path           string
	sizeBytes      int64
	digest, diffID v1.Hash
}

func (l fileLayer) Digest() (v1.Hash, error)             { return l.digest, nil }
func (l fileLayer) DiffID() (v1.Hash, error)             { return l.diffID, nil }
func (l fileLayer) Size() (int64, error)                 { return l.sizeBytes, nil }
func (l fileLayer) MediaType() (types.MediaType, error)  { return types.OCILayer, nil }
func (l fileLayer) Compressed() (io.ReadCloser, error)   { return os.Open(l.path) }
func (l fileLayer) Uncompressed() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

// cleanName is a path as layers have it.
func cleanName(path string) string { return strings.TrimPrefix(path, "/") }
