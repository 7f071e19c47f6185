package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"accel"
	"accel/cache"

	"github.com/opencontainers/go-digest"
)

// TestLayersWithoutTheirManifestAreRemoved: what is mounted for an image goes by its name when its manifest and blobs went
// before, and what is not there is said to be.
func TestLayersWithoutTheirManifestAreRemoved(t *testing.T) {
	store, err := cache.Open(cache.Options{
		Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		VerifyLayer: func(context.Context, digest.Digest, cache.LayerFiles, func(int) bool, func(int64)) ([]int, error) {
			return nil, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- store.Run(ctx) }()
	defer func() {
		cancel()
		if err := errors.Join(<-ended, store.Close()); err != nil {
			t.Error(err)
		}
	}()
	const image = "registry.example/app:v1"
	manifest, layer := digest.FromString("manifest"), digest.FromString("layer")
	c := &Contents{
		store: store, canonical: func(host string) (string, error) { return host, nil },
		mounted: func(ref accel.Reference) digest.Digest {
			if ref.String() != image {
				return ""
			}
			return manifest
		},
		layersOf: func(m digest.Digest) []digest.Digest {
			if m != manifest {
				return nil
			}
			return []digest.Digest{layer}
		},
	}
	for _, what := range []string{image, manifest.String(), "registry.example/app@" + manifest.String()} {
		if what != image && what != manifest.String() {
			c.mounted = func(ref accel.Reference) digest.Digest { return ref.Digest }
		}
		_, err := store.CreateLayer(ctx, layer, cache.LayerInfo{Chunks: 1, DataBytes: 8, FilesBytes: 100}, func(f cache.LayerFiles) error {
			return errors.Join(os.WriteFile(f.Meta, []byte("meta"), 0o600), os.WriteFile(f.Table, []byte("table"), 0o600),
				os.WriteFile(f.TOC, []byte("toc"), 0o600), os.WriteFile(f.Data, make([]byte, 8), 0o600))
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Pin("snapshot/39", layer); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Remove(ctx, what); !errors.Is(err, accel.ErrConflict) || !strings.Contains(err.Error(), "ctr -n NAMESPACE containers ls") {
			t.Errorf("%s while it is mounted: %v", what, err)
		}
		if err := store.Unpin("snapshot/39"); err != nil {
			t.Fatal(err)
		}
		if r, err := c.Remove(ctx, what); err != nil || r.RemovedLayers != 1 || r.FreedBytes == 0 {
			t.Errorf("%s: removed %+v, %v", what, r, err)
		}
		if _, err := store.Layer(layer); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("%s: the layer stays: %v", what, err)
		}
		if _, err := c.Remove(ctx, what); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("%s, of which nothing is left: %v", what, err)
		}
	}
	if _, err := c.Remove(ctx, "registry.example/other:v1"); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("what nobody knows: %v", err)
	}
}
