package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"accel"
	"accel/cache"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// resolved is a manifest that the client may have.
type resolved struct {
	cache.Manifest
	note error // why upstream could not be asked, where it should have been
}

// manifestByDigest answers from the store where this client is known, and asks
// upstream otherwise.
func (a access) manifestByDigest(ctx context.Context, d digest.Digest) (resolved, error) {
	unlock, err := a.m.asking.Lock(ctx, a.client+" "+a.repository()+"@"+d.String())
	if err != nil {
		return resolved{}, err
	}
	defer unlock()
	held, have := a.held(d)
	linked := a.linked(d)
	fresh, graced := a.granted()
	if have && linked && fresh {
		return resolved{Manifest: held}, nil
	}
	olderWillDo := have && linked && graced
	err = a.ask(ctx, olderWillDo, func(ctx context.Context) error {
		if have {
			_, err := a.source.Head(ctx, d.String())
			return err
		}
		held, err = a.fetch(ctx, d.String())
		return err
	})
	switch {
	case err == nil:
		a.admit(d)
		return resolved{Manifest: held}, nil
	case olderWillDo && registry.Unreachable(err):
		return resolved{held, err}, nil
	default:
		return resolved{}, err
	}
}

// manifestByTag is the same for a tag, which is looked at upstream when it is older than ttl.
func (a access) manifestByTag(ctx context.Context, tag string, ttl time.Duration) (resolved, error) {
	unlock, err := a.m.asking.Lock(ctx, a.client+" "+a.repository()+":"+tag)
	if err != nil {
		return resolved{}, err
	}
	defer unlock()
	var held cache.Manifest
	known, err := a.m.o.Store.Tag(a.repository(), tag)
	have := err == nil
	if have {
		held, have = a.held(known.Digest)
	}
	linked := have && a.linked(known.Digest)
	fresh, graced := a.granted()
	if linked && fresh && a.m.o.Now().Sub(known.CheckedAt) < ttl {
		return resolved{Manifest: held}, nil
	}
	olderWillDo := linked && graced
	var now cache.Manifest
	err = a.ask(ctx, olderWillDo, func(ctx context.Context) (err error) {
		now, err = a.look(ctx, tag, have)
		return err
	})
	switch {
	case err == nil:
		a.admit(now.Digest)
		a.keep(a.m.o.Store.PutTag(a.repository(), tag, cache.Tag{Digest: now.Digest, CheckedAt: a.m.o.Now()}))
		return resolved{Manifest: now}, nil
	case errors.Is(err, accel.ErrNotFound):
		a.keep(a.m.o.Store.RemoveTag(a.repository(), tag))
		return resolved{}, err
	case olderWillDo && registry.Unreachable(err):
		return resolved{held, err}, nil
	default:
		return resolved{}, err
	}
}

// look asks upstream what a tag points to. A HEAD does where the manifest is likely to be
// here; else it is fetched at once, which saves a round trip.
func (a access) look(ctx context.Context, tag string, likely bool) (cache.Manifest, error) {
	if !likely {
		return a.fetch(ctx, tag)
	}
	desc, err := a.source.Head(ctx, tag)
	if err != nil {
		return cache.Manifest{}, err
	}
	if held, have := a.held(digest.Digest(desc.Digest.String())); have {
		return held, nil
	}
	return a.fetch(ctx, desc.Digest.String())
}

// held is the store's copy. One that cannot be read counts as not there.
func (a access) held(d digest.Digest) (cache.Manifest, bool) {
	held, err := a.m.o.Store.Manifest(d)
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		a.m.o.Log.Warn("a manifest cannot be read from the cache", "digest", d, "error", err)
	}
	return held, err == nil
}

// fetch brings a manifest, which was checked against its digest, and keeps it.
func (a access) fetch(ctx context.Context, tagOrDigest string) (cache.Manifest, error) {
	raw, desc, err := a.source.Manifest(ctx, tagOrDigest)
	if err != nil {
		return cache.Manifest{}, err
	}
	got := cache.Manifest{Digest: digest.Digest(desc.Digest.String()), MediaType: string(desc.MediaType), Raw: raw}
	a.keep(a.m.o.Store.PutManifest(got))
	return got, nil
}

// keep notes that something could not be stored; the client is served all the same.
func (a access) keep(err error) {
	if err != nil && !errors.Is(err, cache.ErrClosed) {
		a.m.o.Log.Warn("the cache takes nothing in", "repository", a.repository(), "error", err)
	}
}

// describe reads what a manifest or index names, and remembers the sizes for this repository.
func (a access) describe(held cache.Manifest) *accel.ManifestContent {
	found := &accel.ManifestContent{MediaType: held.MediaType}
	var content struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(held.Raw, &content); err != nil {
		return found // an artifact of a kind of its own, or a malformed one: the client will say
	}
	if mediaType := types.MediaType(held.MediaType); mediaType.IsIndex() {
		for _, d := range content.Manifests {
			if d.Digest.Validate() == nil {
				found.Manifests = append(found.Manifests, d.Digest)
			}
		}
		return found
	}
	if content.Config != nil && a.remember(*content.Config) {
		found.Config = content.Config.Digest
	}
	for _, d := range content.Layers {
		if a.remember(d) {
			found.Layers = append(found.Layers, accel.BlobDescriptor{Digest: d.Digest, SizeBytes: d.Size})
		}
	}
	return found
}

func (a access) remember(d ocispec.Descriptor) bool {
	if d.Digest.Validate() != nil || d.Size < 0 {
		return false
	}
	a.m.sizes.Add(sizeKey{a.repository(), d.Digest}, d.Size)
	return true
}
