package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"accel"
	"accel/cache"
	"accel/registry"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Blob is one blob or layer of the store and who holds it there.
type Blob struct {
	cache.Entry
	PinnedBy []string `json:"pinnedBy,omitempty" doc:"owners of pins"`
}

// Usage is how full the store is and what is pinned.
type Usage struct {
	accel.CacheUsage
	CompleteBlobs int `json:"completeBlobs"`
	// Layers are kept inflated for mounts, beside the blobs.
	Layers         int                        `json:"layers"`
	CompleteLayers int                        `json:"completeLayers"`
	Pins           map[string][]digest.Digest `json:"pins,omitempty" doc:"what each owner holds"`
}

// Content is an image as the store has it.
type Content struct {
	Image  string        `json:"image" doc:"an image as it was asked for, or a digest"`
	Digest digest.Digest `json:"digest"`
	// Complete: everything is here that this machine pulls of it. Layers that are here inflated alone can be mounted, not pulled; asked
	// for one by its digest, either form will do.
	Complete bool   `json:"complete"`
	Blobs    []Blob `json:"blobs" doc:"config and layers for this machine, also those that are not here; layers kept inflated too"`

	manifests []digest.Digest
}

// Contents is what people do with a node's store: on a live node behind its
// admin API, on a stopped one directly.
type Contents struct {
	store     *cache.Store
	canonical func(host string) (string, error)
	// mounted is the manifest that containerd asked for by a name, layersOf are the layers that are mounted for a manifest, and
	// forget closes one that is not mounted; each may be nil.
	mounted  func(ref accel.Reference) digest.Digest
	layersOf func(manifest digest.Digest) []digest.Digest
	forget   func(ctx context.Context, d digest.Digest) error
}

// List returns all blobs and layers, those used last first.
func (c *Contents) List(context.Context) ([]Blob, error) {
	owners := c.owners()
	entries := c.store.List()
	blobs := make([]Blob, 0, len(entries))
	for _, e := range entries {
		blobs = append(blobs, Blob{e, owners[e.Digest]})
	}
	return blobs, nil
}

// owners are the owners of each pinned digest.
func (c *Contents) owners() map[digest.Digest][]string {
	owners := map[digest.Digest][]string{}
	for owner, held := range c.store.Pins() {
		for _, d := range held {
			owners[d] = append(owners[d], owner)
		}
	}
	for _, names := range owners {
		slices.Sort(names)
	}
	return owners
}

// Usage says how full the store is.
func (c *Contents) Usage(context.Context) (Usage, error) {
	u := Usage{CacheUsage: c.store.Usage(), Pins: c.store.Pins()}
	for _, e := range c.store.List() {
		switch {
		case e.Form == cache.FormLayer && e.Complete:
			u.CompleteLayers++
			u.Layers++
		case e.Form == cache.FormLayer:
			u.Layers++
		case e.Complete:
			u.CompleteBlobs++
		}
	}
	return u, nil
}

// Stat says what there is of an image or a digest. accel.ErrNotFound where its manifest,
// or the blob, is not here.
func (c *Contents) Stat(_ context.Context, what string) (Content, error) {
	if d, err := digest.Parse(what); err == nil {
		forms, err := c.forms(d)
		if err == nil && len(forms) == 0 {
			return c.image(what, "", d)
		}
		if err != nil {
			return Content{}, err
		}
		content := Content{Image: what, Digest: d}
		for _, e := range forms {
			content.Complete = content.Complete || e.Complete
			content.Blobs = append(content.Blobs, Blob{e, c.owners()[d]})
		}
		return content, nil
	}
	ref, err := accel.ParseReference(what)
	if err != nil {
		return Content{}, err
	}
	host, err := c.canonical(ref.Registry)
	if err != nil {
		return Content{}, err
	}
	ref.Registry = host
	d := ref.Digest
	if d == "" {
		tag, err := c.store.Tag(ref.Name(), ref.Tag)
		if d = tag.Digest; err != nil && c.mounted != nil {
			d = c.mounted(ref)
		}
		if d == "" {
			return Content{}, fmt.Errorf("%s: %w", what, err)
		}
	}
	return c.image(what, ref.Name(), d)
}

// forms is what there is of a digest: a blob, a layer or both.
func (c *Contents) forms(d digest.Digest) (forms []cache.Entry, err error) {
	e, err := c.store.Stat(d)
	if err == nil {
		forms = append(forms, e)
	} else if !errors.Is(err, accel.ErrNotFound) {
		return nil, err
	}
	l, err := c.store.Layer(d)
	if err == nil {
		forms = append(forms, l.Stat())
	} else if !errors.Is(err, accel.ErrNotFound) {
		return nil, err
	}
	return forms, nil
}

// image follows a manifest or index to what this machine needs of it.
func (c *Contents) image(what, repository string, d digest.Digest) (Content, error) {
	content := Content{Image: what, Digest: d, Complete: true}
	owners := c.owners()
	pending := []digest.Digest{d}
	for len(pending) > 0 {
		d := pending[0]
		pending = pending[1:]
		if slices.Contains(content.manifests, d) {
			continue
		}
		m, err := c.store.Manifest(d)
		if err != nil {
			return content, fmt.Errorf("manifest %s of %s: %w", d, what, err)
		}
		content.manifests = append(content.manifests, d)
		var parsed struct {
			Config    *v1.Descriptor  `json:"config"`
			Layers    []v1.Descriptor `json:"layers"`
			Manifests []v1.Descriptor `json:"manifests"`
		}
		if err := json.Unmarshal(m.Raw, &parsed); err != nil {
			return content, fmt.Errorf("manifest %s of %s: %w", d, what, err)
		}
		if parsed.Config != nil {
			for _, l := range append([]v1.Descriptor{*parsed.Config}, parsed.Layers...) {
				forms, err := c.forms(l.Digest)
				if err != nil {
					return content, err
				}
				if len(forms) == 0 || forms[0].Form != cache.FormBlob {
					forms = slices.Insert(forms, 0, cache.Entry{Form: cache.FormBlob, Digest: l.Digest, SizeBytes: l.Size})
				}
				content.Complete = content.Complete && forms[0].Complete
				for _, e := range forms {
					content.Blobs = append(content.Blobs, Blob{e, owners[l.Digest]})
				}
			}
		}
		if member, err := registry.Member(parsed.Manifests, registry.ThisMachine()); err == nil { // else there is nothing for this machine
			pending = append(pending, member.Digest)
		}
	}
	return content, nil
}

// Check reads every complete blob and every layer again and drops what is damaged; see cache.Store.
func (c *Contents) Check(ctx context.Context, progress func(done, total int64)) (cache.Report, error) {
	return c.store.Check(ctx, progress)
}

// GC evicts down to the budget and removes what is of no use; see cache.Store.
func (c *Contents) GC(ctx context.Context) (cache.Report, error) { return c.store.GC(ctx) }

// pinOwner is who holds what a person pinned.
func pinOwner(what string) string { return "person:" + what }

// Pin keeps an image, or one digest, from being evicted. All of it must be here.
func (c *Contents) Pin(ctx context.Context, what string) (Content, error) {
	content, err := c.Stat(ctx, what)
	if err != nil {
		return content, err
	}
	if !content.Complete {
		return content, fmt.Errorf("%w: %s is not complete in the cache; pull it first, or pin it while the node runs", accel.ErrConflict, what)
	}
	held := make([]digest.Digest, 0, len(content.manifests)+len(content.Blobs))
	held = append(held, content.manifests...)
	for _, b := range content.Blobs {
		held = append(held, b.Digest)
	}
	if err := c.store.Pin(pinOwner(what), held...); err != nil {
		return content, err
	}
	return c.Stat(ctx, what)
}

// Unpin releases what Pin of the same name held. accel.ErrNotFound where that is nothing.
func (c *Contents) Unpin(_ context.Context, what string) error {
	if err := c.store.Unpin(pinOwner(what)); err != nil {
		return fmt.Errorf("%s is not pinned: %w", what, err)
	}
	return nil
}
