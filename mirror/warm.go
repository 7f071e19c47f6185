package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"accel"
	"accel/cache"
	"accel/registry"

	"github.com/containerd/platforms"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// warmParallel layers are brought at a time, as containerd does for a client.
	warmParallel = 3
)

// Warm brings image ("host/path:tag", "host/path@digest" or "host/path:tag@digest") and its layers for platform
// ("os/arch[/variant]"; empty: this machine's), with the node's own credentials and behind what clients wait
// for. With both, what the digest names is brought, and the tag is remembered where the registry says that it
// points there, so that clients may ask by it while the registry is away. progress, which may be nil, is told the layer bytes that were brought and those of the
// whole image. It returns what image was resolved to, also with an error where that much was known. What is
// there already is not brought again.
func (m *Mirror) Warm(ctx context.Context, image, platform string, progress func(fetchedBytes, totalBytes int64)) (accel.Tally, digest.Digest, error) {
	ref, err := accel.ParseReference(image)
	if err != nil {
		return accel.Tally{}, "", err
	}
	want := platforms.DefaultSpec()
	if platform != "" {
		if want, err = platforms.Parse(platform); err != nil {
			return accel.Tally{}, "", fmt.Errorf("%w: platform %q: %w", accel.ErrInvalid, platform, err)
		}
	}
	a, err := m.access(ref.Registry, ref.Repository, "")
	if err != nil {
		return accel.Tally{}, "", err
	}
	var top resolved
	if ref.Digest != "" {
		top, err = a.manifestByDigest(ctx, ref.Digest)
	} else {
		top, err = a.manifestByTag(ctx, ref.Tag, 0)
	}
	if err != nil {
		return accel.Tally{}, ref.Digest, err
	}
	chosen, err := a.choose(ctx, top.Manifest, want)
	if err != nil {
		return accel.Tally{}, top.Digest, fmt.Errorf("%s: %w", image, err)
	}
	tally, err := a.bring(ctx, chosen, progress)
	if err == nil && ref.Tag != "" && ref.Digest != "" {
		err = a.confirm(ctx, ref.Tag, ref.Digest)
	}
	return tally, top.Digest, err
}

// confirm remembers that tag points to d, where upstream says so. A tag that moved on, or is gone, is no
// error: d was brought all the same.
func (a access) confirm(ctx context.Context, tag string, d digest.Digest) error {
	known, err := a.m.o.Store.Tag(a.repository(), tag)
	have := err == nil && known.Digest == d
	var now v1.Descriptor
	err = a.ask(ctx, have, func(ctx context.Context) (err error) {
		now, err = a.source.Head(ctx, tag)
		return err
	})
	switch {
	case err == nil && now.Digest.String() == d.String():
		a.keep(a.m.o.Store.PutTag(a.repository(), tag, cache.Tag{Digest: d, CheckedAt: a.m.o.Now()}))
		return nil
	case err == nil, errors.Is(err, accel.ErrNotFound):
		a.m.o.Log.Debug("a tag moved on from what was brought", "repository", a.repository(), "tag", tag, "digest", d)
		return nil
	case have && registry.Unreachable(err):
		return nil
	default:
		return fmt.Errorf("ask what tag %s points to: %w", tag, err)
	}
}

// choose finds the image of a platform in an index; an image that stands alone is it.
func (a access) choose(ctx context.Context, held cache.Manifest, want ocispec.Platform) (cache.Manifest, error) {
	fits := platforms.Only(want)
	for range registry.MaxIndexDepth {
		a.describe(held)
		if !types.MediaType(held.MediaType).IsIndex() {
			return held, nil
		}
		var index ocispec.Index
		if err := json.Unmarshal(held.Raw, &index); err != nil {
			return cache.Manifest{}, fmt.Errorf("%w: index %s: %w", accel.ErrInvalid, held.Digest, err)
		}
		best, err := registry.Member(index.Manifests, fits)
		if err != nil {
			return cache.Manifest{}, fmt.Errorf("index %s: %w", held.Digest, err)
		}
		next, err := a.manifestByDigest(ctx, best.Digest)
		if err != nil {
			return cache.Manifest{}, err
		}
		held = next.Manifest
	}
	return cache.Manifest{}, fmt.Errorf("%w: index nested more than %d deep", accel.ErrInvalid, registry.MaxIndexDepth)
}

// bring has the store fetch an image's config and layers.
func (a access) bring(ctx context.Context, held cache.Manifest, progress func(fetchedBytes, totalBytes int64)) (accel.Tally, error) {
	var image ocispec.Manifest
	if err := json.Unmarshal(held.Raw, &image); err != nil {
		return accel.Tally{}, fmt.Errorf("%w: manifest %s: %w", accel.ErrInvalid, held.Digest, err)
	}
	var blobs []ocispec.Descriptor
	var total int64
	seen := map[digest.Digest]bool{}
	for i, d := range append(slices.Clone(image.Layers), image.Config) {
		if seen[d.Digest] || !types.MediaType(d.MediaType).IsDistributable() || d.Digest == "" {
			continue // foreign layers come from elsewhere, if at all
		}
		seen[d.Digest] = true
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return accel.Tally{}, fmt.Errorf("%w: manifest %s names blob %q of %d bytes", accel.ErrInvalid, held.Digest, d.Digest, d.Size)
		}
		blobs = append(blobs, d)
		if i < len(image.Layers) {
			total += d.Size
		}
	}
	var mu sync.Mutex
	var fetched int64
	report := func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		fetched += n
		if progress != nil {
			progress(min(fetched, total), total)
		}
	}
	report(0)
	var tally accel.Tally
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(warmParallel)
	for _, d := range blobs {
		group.Go(func() error {
			var came atomic.Int64
			f := &fetcher{access: a, digest: d.Digest, sizeBytes: d.Size}
			layer := d.Digest != image.Config.Digest
			if layer {
				f.count = func(n int) {
					came.Add(int64(n))
					report(int64(n))
				}
			}
			got, err := a.m.o.Store.Ensure(ctx, accel.BlobDescriptor{Digest: d.Digest, SizeBytes: d.Size}, f, true)
			mu.Lock()
			tally.Add(got)
			mu.Unlock()
			if layer { // what came by another's fetcher was not counted on the way
				report(got.RegistryBytes + got.PeerBytes + got.SharedBytes - came.Load())
			}
			if err != nil {
				return fmt.Errorf("blob %s: %w", d.Digest, err)
			}
			return a.prove(ctx, d.Digest)
		})
	}
	err := group.Wait()
	a.m.metrics.tally(tally)
	return tally, err
}

// prove finds out whether this repository holds what the store has from another
// one, so that clients need not ask.
func (a access) prove(ctx context.Context, d digest.Digest) error {
	_, err := a.blobAccess(ctx, d, true)
	return err
}
