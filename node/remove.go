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
	content, missing := c.Stat(ctx, what)
	if missing != nil && !errors.Is(missing, accel.ErrNotFound) {
		return r, missing
	}
	manifests := content.manifests
	if missing != nil { // but what is mounted for it may be here
		m, err := c.mountedBy(what)
		if err != nil {
			return r, err
		}
		if m != "" {
			manifests = append(manifests, m)
		}
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
	for _, m := range manifests {
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
			return r, fmt.Errorf("%w: %s of %s is pinned by %s%s", accel.ErrConflict, d, what, strings.Join(by, ", "), release(by))
		}
	}
	var errs []error
	for _, d := range all {
		there, err := c.remove(ctx, d, &r)
		if there {
			missing = nil
		}
		errs = append(errs, err)
	}
	return r, errors.Join(append(errs, missing)...)
}

// release says how owners are made to let go of what they hold.
func release(owners []string) (how string) {
	person, mounted := "", false
	for _, by := range owners {
		name, isPerson := strings.CutPrefix(by, pinOwner(""))
		if isPerson {
			person = name
		}
		mounted = mounted || strings.HasPrefix(by, snapshotPins)
	}
	if person != "" {
		how += fmt.Sprintf("; a person pinned it: accel cache unpin %s", person)
	}
	if mounted {
		how += "; an image or a container of containerd has it mounted, and has to go first: see ctr namespaces ls, then " +
			"ctr -n NAMESPACE containers ls, and ctr -n NAMESPACE images ls and rm"
	}
	return how
}

// mountedBy is the manifest that something may be mounted for by a name or digest; empty: nothing is, as far as is known.
func (c *Contents) mountedBy(what string) (digest.Digest, error) {
	if d, err := digest.Parse(what); err == nil {
		return d, nil
	}
	ref, err := accel.ParseReference(what)
	if err != nil || c.mounted == nil {
		return "", err
	}
	if ref.Registry, err = c.canonical(ref.Registry); err != nil {
		return "", err
	}
	return c.mounted(ref), nil
}

// remove drops one digest, and says whether there was something of it.
func (c *Contents) remove(ctx context.Context, d digest.Digest, r *cache.Report) (there bool, err error) {
	forms, err := c.forms(d)
	if err != nil {
		return false, err
	}
	if c.forget != nil {
		if err := c.forget(ctx, d); err != nil {
			return true, err
		}
	}
	if err := c.store.Remove(d); err != nil {
		if errors.Is(err, accel.ErrNotFound) {
			return false, nil // of this image, there is nothing of it
		}
		return true, err
	}
	for _, e := range forms {
		if e.Form == cache.FormLayer {
			r.RemovedLayers++
		} else {
			r.RemovedBlobs++
		}
		r.FreedBytes += e.AllocatedBytes
	}
	return true, nil
}
