package registry

import (
	"context"
	"fmt"
	"io"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	// maxIndexDepth bounds indexes within indexes; a digest cannot contain
	// itself, but a hostile chain of them could be long.
	maxIndexDepth = 4
	// maxMembers bounds the manifests below one digest.
	maxMembers = 10_000
)

// Verify reads the manifest d and everything below it back and checks each byte against its digest. full=false: blobs are only looked at by HEAD (size).
// Layers of a non-distributable media type are not looked at. The error wraps
// accel.ErrNotFound where something is missing.
func (c *Client) Verify(ctx context.Context, repository string, d digest.Digest, full bool) error {
	r, err := c.target(repository, d.String())
	if err != nil {
		return err
	}
	v := verification{c: c, r: r, blobs: map[v1.Hash]v1.Descriptor{}, seen: map[v1.Hash]bool{}}
	raw, desc, err := c.manifest(ctx, r, d.String())
	if err != nil {
		return err
	}
	if err := v.collect(ctx, raw, desc, 0); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, desc := range v.blobs {
		g.Go(func() error { return blob{c: c, r: r, desc: desc}.verify(ctx, full) })
	}
	return g.Wait()
}

// verification gathers the blobs below a manifest, each once.
type verification struct {
	c     *Client
	r     repo
	blobs map[v1.Hash]v1.Descriptor
	seen  map[v1.Hash]bool // manifests
}

func (v *verification) collect(ctx context.Context, raw []byte, desc v1.Descriptor, depth int) error {
	m, err := v.c.open(ctx, v.r, raw, desc)
	if err != nil {
		return err
	}
	switch {
	case m.Image != nil:
		im, err := m.Image.Manifest()
		if err != nil {
			return err
		}
		for _, d := range append([]v1.Descriptor{im.Config}, im.Layers...) {
			if d.MediaType.IsDistributable() {
				v.blobs[d.Digest] = d
			}
		}
		return nil
	case m.Index == nil:
		return nil // an artifact of another type: its manifest is all we know of it
	}
	im, err := m.Index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range im.Manifests {
		if v.seen[d.Digest] {
			continue
		}
		v.seen[d.Digest] = true
		if depth >= maxIndexDepth || len(v.seen) > maxMembers {
			return accel.Permanent(fmt.Errorf("%w: index %s@%s is nested more than %d deep or has more than %d members", accel.ErrInvalid, v.r, desc.Digest, maxIndexDepth, maxMembers))
		}
		raw, child, err := v.c.manifest(ctx, v.r, d.Digest.String())
		if err != nil {
			return fmt.Errorf("member %s of index %s@%s: %w", d.Digest, v.r, desc.Digest, err)
		}
		if child.Size != d.Size {
			return &corruptError{fmt.Sprintf("%s@%s has %d bytes, its index says %d", v.r, d.Digest, child.Size, d.Size)}
		}
		if err := v.collect(ctx, raw, child, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func (b blob) verify(ctx context.Context, full bool) error {
	if !full {
		size, err := b.head(ctx)
		if err == nil && size >= 0 && size != b.desc.Size {
			err = &corruptError{fmt.Sprintf("it has %d bytes, its descriptor says %d", size, b.desc.Size)}
		}
		if err != nil {
			return fmt.Errorf("blob %s@%s: %w", b.r, b.desc.Digest, err)
		}
		return nil
	}
	rc, err := b.open(ctx)
	if err != nil {
		return err
	}
	defer rc.Close()
	_, err = io.Copy(io.Discard, rc)
	return err
}
