// Package debimage makes the images that tests and benchmarks measure with, from
// the machine's own Debian mirror, and keeps them in the user's cache directory.
// Those that are made here share the layer below, Minbase's.
package debimage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// image is the one in the cache, built at first.
func (r recipe) image(ctx context.Context, log io.Writer) (v1.Image, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "accel-images", r.name)
	if _, err := os.Stat(filepath.Join(dir, "index.json")); errors.Is(err, os.ErrNotExist) {
		if err := r.build(ctx, dir, log); err != nil {
			return nil, fmt.Errorf("build the image %s: %w", r.name, err)
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
