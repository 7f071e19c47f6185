package mirror

import (
	"context"
	"encoding/json"
	"errors"

	"accel"
	"accel/cache"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// referrersOf is the list of what refers to subject, an index. It is kept and looked at again as what a
// tag points to is.
func (a access) referrersOf(ctx context.Context, subject digest.Digest, artifactType string) (resolved, error) {
	unlock, err := a.m.asking.Lock(ctx, a.client+" "+a.repository()+"@"+subject.String()+" "+artifactType)
	if err != nil {
		return resolved{}, err
	}
	defer unlock()
	var held cache.Manifest
	known, err := a.m.o.Store.Referrers(a.repository(), subject, artifactType)
	have := err == nil
	if have {
		held, have = a.held(known.Digest)
	}
	fresh, graced := a.granted()
	if have && fresh && a.m.o.Now().Sub(known.CheckedAt) < a.m.o.TagTTL {
		return resolved{Manifest: held}, nil
	}
	olderWillDo := have && graced
	var found []v1.Descriptor
	err = a.ask(ctx, olderWillDo, func(ctx context.Context) (err error) {
		found, err = a.source.Referrers(ctx, subject, artifactType)
		return err
	})
	switch {
	case err == nil:
		list, err := listOf(found)
		if err == nil {
			a.keepReferrers(subject, artifactType, list)
		}
		return resolved{Manifest: list}, err
	case olderWillDo && registry.Unreachable(err):
		return resolved{held, err}, nil
	default:
		return resolved{}, err
	}
}

// keepReferrers grants nothing: a registry without the API answers with an empty list to everybody.
func (a access) keepReferrers(subject digest.Digest, artifactType string, list cache.Manifest) {
	err := a.m.o.Store.PutManifest(list)
	if errors.Is(err, accel.ErrInvalid) {
		return // too long to be kept
	}
	if err == nil {
		err = a.m.o.Store.PutReferrers(a.repository(), subject, artifactType, cache.Tag{Digest: list.Digest, CheckedAt: a.m.o.Now()})
	}
	a.keep(err)
}

func listOf(found []v1.Descriptor) (cache.Manifest, error) {
	if found == nil {
		found = []v1.Descriptor{}
	}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageIndex, "manifests": found})
	return cache.Manifest{Digest: digest.FromBytes(raw), MediaType: ocispec.MediaTypeImageIndex, Raw: raw}, err
}
