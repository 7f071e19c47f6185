package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"accel"
	"accel/cache"

	"github.com/opencontainers/go-digest"
)

// Remove drops what there is of an image or a digest: manifests, blobs, and the layers that are kept for
// mounts. accel.ErrNotFound where that is nothing. accel.ErrConflict where some of it is pinned, and then nothing is dropped; or
// mounted, read or filled just now, and then that stays and the rest is dropped. The report is right in each case.
func (c *Contents) Remove(ctx context.Context, what string) (r cache.Report, err error) {
	content, err := c.Stat(ctx, what)
	if err != nil {
		return r, err
	}
	var all []digest.Digest
	add := func(d digest.Digest) {
		if !slices.Contains(all, d) {
			all = append(all, d)
		}
	}
	for _, b := range content.Blobs {
		add(b.Digest)
	}
	for _, m := range content.manifests {
		if c.layersOf != nil {
			for _, d := range c.layersOf(m) {
				add(d)
			}
		}
		add(m)
	}
	owners := c.owners()
	for _, d := range all {
		if by := owners[d]; len(by) > 0 {
			return r, fmt.Errorf("%w: %s of %s is pinned by %s", accel.ErrConflict, d, what, strings.Join(by, ", "))
		}
	}
	var errs []error
	for _, d := range all {
		errs = append(errs, c.remove(ctx, d, &r))
	}
	return r, errors.Join(errs...)
}

// remove drops one digest.
func (c *Contents) remove(ctx context.Context, d digest.Digest, r *cache.Report) error {
	forms, err := c.forms(d)
	if err != nil {
		return err
	}
	if c.forget != nil {
		if err := c.forget(ctx, d); err != nil {
			return err
		}
	}
	if err := c.store.Remove(d); err != nil {
		if errors.Is(err, accel.ErrNotFound) {
			return nil // of this image, there is nothing of it
		}
		return err
	}
	for _, e := range forms {
		if e.Form == cache.FormLayer {
			r.RemovedLayers++
		} else {
			r.RemovedBlobs++
		}
		r.FreedBytes += e.AllocatedBytes
	}
	return nil
}
