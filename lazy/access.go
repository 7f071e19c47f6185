package lazy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"accel"
	"accel/cache"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// questions to a registry about one image's layers are asked at a time.
	questions = 16
	// defaultGrantTTL and defaultGrantGrace are package mirror's.
	defaultGrantTTL, defaultGrantGrace = 5 * time.Minute, 24 * time.Hour
)

// granted says whether the node's own credentials were let into a repository lately enough to be believed without
// a question, and lately enough while the registry cannot be asked. What opened it to a client's counts for nothing here:
// a mount is read with the node's.
func (l *Lazy) granted(repository string) (fresh, graced bool) {
	at, known := l.o.Store.Granted(repository, l.o.Own)
	if !known || l.o.Own == "" {
		return false, false
	}
	age := time.Since(at)
	return age < l.o.GrantTTL, age < max(l.o.GrantTTL, l.o.GrantGrace)
}

// learn keeps what a registry said to a question that was asked with the node's own credentials; grant: that they were let in is
// to be remembered too.
func (l *Lazy) learn(repository string, d digest.Digest, err error, grant bool) {
	switch {
	case err == nil:
		err = l.o.Store.Link(repository, d)
		if l.o.Own != "" && grant {
			err = errors.Join(err, l.o.Store.Grant(repository, l.o.Own, time.Now()))
		}
	case l.o.Own != "" && (errors.Is(err, accel.ErrUnauthenticated) || errors.Is(err, accel.ErrForbidden)):
		err = l.o.Store.Revoke(repository, l.o.Own)
	default:
		return
	}
	if err != nil && !errors.Is(err, cache.ErrClosed) {
		l.o.Log.Warn("access cannot be remembered", "repository", repository, "error", err)
	}
}

// manifest brings a platform manifest that the node may read with its own credentials: from the store, where these were let
// into the repository lately, and that is known to hold it; or from the registry.
func (l *Lazy) manifest(ctx context.Context, source *registry.Source, d digest.Digest) (content ocispec.Manifest, err error) {
	held, err := l.o.Store.Manifest(d)
	have := err == nil
	linked := have && l.o.Store.Linked(source.Repository(), d)
	fresh, graced := l.granted(source.Repository())
	if !linked || !fresh {
		if have {
			_, err = source.Head(ctx, d.String())
		} else {
			held, err = l.fetchManifest(ctx, source, d)
		}
		l.learn(source.Repository(), d, err, true)
		olderWillDo := linked && graced && registry.Unreachable(err) && ctx.Err() == nil
		if err != nil && !olderWillDo {
			return content, err
		}
	}
	if !types.MediaType(held.MediaType).IsImage() {
		return content, declined("%s is a %s, not an image", d, held.MediaType)
	}
	if err := json.Unmarshal(held.Raw, &content); err != nil {
		return content, declined("manifest %s: %v", d, err)
	}
	if len(content.Layers) == 0 || len(content.Layers) > maxLayers {
		return content, declined("manifest %s has %d layers", d, len(content.Layers))
	}
	for _, y := range content.Layers {
		// They become names of files.
		if y.Digest.Validate() != nil || y.Digest.Algorithm() != digest.SHA256 || y.Size <= 0 {
			return content, declined("manifest %s names a layer %.100q of %d bytes", d, y.Digest, y.Size)
		}
	}
	return content, nil
}

func (l *Lazy) fetchManifest(ctx context.Context, source *registry.Source, d digest.Digest) (cache.Manifest, error) {
	raw, desc, err := source.Manifest(ctx, d.String())
	if err != nil {
		return cache.Manifest{}, err
	}
	m := cache.Manifest{Digest: d, MediaType: string(desc.MediaType), Raw: raw}
	if err := l.o.Store.PutManifest(m); err != nil {
		l.o.Log.Warn("the cache takes nothing in", "manifest", d, "error", err)
	}
	return m, nil
}

// holds requires that a repository, which the node's credentials open, holds an image's layers. A registry is asked about those of
// which that is not known.
func (l *Lazy) holds(ctx context.Context, source *registry.Source, layers []ocispec.Descriptor) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(questions)
	for _, y := range layers {
		if l.o.Store.Linked(source.Repository(), y.Digest) {
			continue
		}
		g.Go(func() error {
			size, err := source.BlobSize(ctx, y.Digest)
			l.learn(source.Repository(), y.Digest, err, false) // many at a time
			switch {
			case errors.Is(err, accel.ErrNotFound):
				return declined("repository %s does not have layer %s, which its manifest names", source.Repository(), y.Digest)
			case err != nil:
				return fmt.Errorf("the node cannot read layer %s of %s: %w", y.Digest, source.Repository(), err)
			case size != y.Size:
				return declined("layer %s has %d bytes in %s, not %d as the manifest says", y.Digest, size, source.Repository(), y.Size)
			}
			return nil
		})
	}
	return g.Wait()
}

// same reports whether a repository that a mapping names is the one that was asked for.
func (l *Lazy) same(source *registry.Source, repository string) bool {
	named, err := l.o.Registry.Source(repository, "")
	return err == nil && named.Repository() == source.Repository()
}
