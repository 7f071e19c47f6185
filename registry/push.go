package registry

import (
	"context"
	"errors"
	"fmt"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// PushImage / PushIndex push by digest, children first; manifests with a subject also become listed as referrers (API or fallback tag, serialised by subject, read back).
// Layers of a non-distributable media type stay where they are.
func (c *Client) PushImage(ctx context.Context, repository string, img v1.Image) error {
	r, err := c.repository(repository)
	if err != nil {
		return err
	}
	return c.pushImage(ctx, r, img)
}

// PushIndex pushes idx by digest, its members first; see PushImage. A member
// that is neither an image nor an index must be in the repository already.
func (c *Client) PushIndex(ctx context.Context, repository string, idx v1.ImageIndex) error {
	r, err := c.repository(repository)
	if err != nil {
		return err
	}
	return c.pushIndex(ctx, r, idx, 0)
}

func (c *Client) pushImage(ctx context.Context, r repo, img v1.Image) error {
	layers, err := img.Layers()
	if err != nil {
		return fmt.Errorf("layers of the image for %s: %w", r, err)
	}
	config, err := partial.ConfigLayer(img)
	if err != nil {
		return fmt.Errorf("config of the image for %s: %w", r, err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	seen := map[v1.Hash]bool{}
	for _, l := range append(layers, config) {
		mediaType, err := l.MediaType()
		if err != nil {
			return err
		}
		h, err := l.Digest()
		if err != nil {
			return err
		}
		if seen[h] || !mediaType.IsDistributable() {
			continue
		}
		seen[h] = true
		g.Go(func() error { return c.pushLayer(gctx, r, l) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return c.pushManifest(ctx, r, img)
}

func (c *Client) pushIndex(ctx context.Context, r repo, idx v1.ImageIndex, depth int) error {
	if depth > maxIndexDepth {
		return accel.Permanent(fmt.Errorf("%w: indexes for %s are nested more than %d deep", accel.ErrInvalid, r, maxIndexDepth))
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return fmt.Errorf("index for %s: %w", r, err)
	}
	for _, d := range m.Manifests {
		switch {
		case d.MediaType.IsImage():
			var img v1.Image
			if img, err = idx.Image(d.Digest); err == nil {
				err = c.pushImage(ctx, r, img)
			}
		case d.MediaType.IsIndex():
			var sub v1.ImageIndex
			if sub, err = idx.ImageIndex(d.Digest); err == nil {
				err = c.pushIndex(ctx, r, sub, depth+1)
			}
		default:
			if _, err = c.head(ctx, r, d.Digest.String()); err != nil {
				err = fmt.Errorf("a %q that is neither image nor index, and is not there already: %w", d.MediaType, err)
			}
		}
		if err != nil {
			return fmt.Errorf("member %s of the index for %s: %w", d.Digest, r, err)
		}
	}
	return c.pushManifest(ctx, r, idx)
}

// pushManifest stores a manifest whose children are there, and lists it under
// its subject. A manifest that is there already is not sent again, which would
// make the registry send its webhook again.
func (c *Client) pushManifest(ctx context.Context, r repo, m interface {
	RawManifest() ([]byte, error)
	MediaType() (types.MediaType, error)
}) error {
	raw, err := m.RawManifest()
	if err != nil {
		return fmt.Errorf("manifest for %s: %w", r, err)
	}
	mediaType, err := m.MediaType()
	if err != nil {
		return fmt.Errorf("manifest for %s: %w", r, err)
	}
	return c.ensureManifest(ctx, r, raw, mediaType)
}

func (c *Client) ensureManifest(ctx context.Context, r repo, raw []byte, mediaType types.MediaType) error {
	subject, desc, err := referrerOf(raw)
	if err != nil {
		return accel.Permanent(fmt.Errorf("%w: manifest for %s: %w", accel.ErrInvalid, r, err))
	}
	desc.MediaType = mediaType
	d := digest.FromBytes(raw).String()
	var listed bool
	if _, err := c.head(ctx, r, d); errors.Is(err, accel.ErrNotFound) {
		header, err := c.putManifest(ctx, r, d, raw, mediaType)
		if err != nil {
			return err
		}
		listed = subject != nil && header.Get("OCI-Subject") == subject.Digest.String()
	} else if err != nil {
		return err
	}
	if subject == nil || listed {
		return nil
	}
	return c.list(ctx, r, subject.Digest, desc)
}
