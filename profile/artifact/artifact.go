// Package artifact is the form in which profiles stand in registries: an artifact that
// refers to the source PLATFORM manifest, beside its mapping. Package worker publishes what
// package ledger says is due; nodes find it there when no control plane tells them. It is
// not signed: a profile is a hint, and a hostile one costs bounded bytes.
package artifact

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"accel"
	"accel/profile"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

const (
	// maxInlineBytes is the largest annotation: below, a listing of referrers delivers the
	// profile with the mapping, in one request. 2,000 items take 55 kB.
	maxInlineBytes = 64 << 10
	// maxPackedBytes bounds a profile as it is packed.
	maxPackedBytes = profile.MaxEncodedBytes
	// maxCandidates bounds how many artifacts are looked at: anybody may attach some.
	maxCandidates = 8
	// blobType is a packed profile's that is a layer.
	blobType = accel.MediaTypeProfile + "+gzip"
)

// Form is an artifact's content, for registry.BuildAttachment and registry.Client.Attach.
type Form struct {
	Annotations map[string]string
	Blobs       []registry.Blob
}

// FormOf makes a profile's artifact. Equal profiles make equal ones. The error is an
// accel.ErrInvalid.
func FormOf(p accel.Profile) (Form, error) {
	encoded, err := profile.Encode(p)
	if err != nil {
		return Form{}, err
	}
	packed := profile.Pack(encoded)
	// The source's digest marks our own output.
	f := Form{Annotations: map[string]string{accel.AnnotationSourceDigest: p.Manifest.String()}}
	if base64.StdEncoding.EncodedLen(len(packed)) <= maxInlineBytes {
		f.Annotations[accel.AnnotationProfile] = base64.StdEncoding.EncodeToString(packed)
	} else {
		f.Blobs = []registry.Blob{{MediaType: blobType, Content: packed}}
	}
	return f, nil
}

// Find looks for the profile of a source PLATFORM manifest among what refers to it in a
// repository, the converted image's. Of several, the best recorded and newest counts.
// accel.ErrNotFound where there is none that makes sense.
func Find(ctx context.Context, source *registry.Source, manifest digest.Digest) (accel.Profile, error) {
	list, err := source.Referrers(ctx, manifest, accel.MediaTypeProfile)
	if err != nil {
		return accel.Profile{}, fmt.Errorf("list what refers to %s: %w", manifest, err)
	}
	return FindIn(ctx, source, manifest, list)
}

// FindIn is Find in a listing of referrers of this type that is there already.
func FindIn(ctx context.Context, source *registry.Source, manifest digest.Digest, list []v1.Descriptor) (best accel.Profile, err error) {
	found, looked := false, 0
	var errs []error
	for _, d := range list {
		if d.ArtifactType != accel.MediaTypeProfile {
			continue
		}
		if looked++; looked > maxCandidates {
			break
		}
		p, err := read(ctx, source, d)
		if err == nil && p.Manifest != manifest {
			err = fmt.Errorf("%w: it is about manifest %s", accel.ErrInvalid, p.Manifest)
		}
		switch {
		case ctx.Err() != nil:
			return accel.Profile{}, context.Cause(ctx)
		case err != nil:
			errs = append(errs, fmt.Errorf("profile %s of %s: %w", d.Digest, manifest, err))
		case !found || better(p, best) > 0:
			best, found = p, true
		}
	}
	if found {
		return best, nil
	}
	for _, err := range errs {
		if registry.Unreachable(err) {
			return accel.Profile{}, errors.Join(errs...)
		}
	}
	return accel.Profile{}, fmt.Errorf("%w: nothing that refers to %s is a profile: %w", accel.ErrNotFound, manifest, errors.Join(errs...))
}

func better(a, b accel.Profile) int {
	recorded := func(p accel.Profile) int {
		if p.Origin == accel.ProfileRecorded {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(recorded(a), recorded(b)), a.RecordedAt.Compare(b.RecordedAt), cmp.Compare(a.Starts, b.Starts),
		cmp.Compare(profile.Version(a), profile.Version(b)))
}

// read takes the profile out of one artifact.
func read(ctx context.Context, source *registry.Source, d v1.Descriptor) (accel.Profile, error) {
	inline := d.Annotations[accel.AnnotationProfile]
	var layers []v1.Descriptor
	if inline == "" { // it is a layer
		raw, _, err := source.Manifest(ctx, d.Digest.String())
		if err != nil {
			return accel.Profile{}, err
		}
		var m v1.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			return accel.Profile{}, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
		}
		layers = m.Layers
	}
	var packed []byte
	var err error
	switch {
	case inline != "" && len(inline) <= maxInlineBytes:
		if packed, err = base64.StdEncoding.DecodeString(inline); err != nil {
			return accel.Profile{}, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
		}
	case len(layers) > 0 && layers[0].MediaType == types.MediaType(blobType) && layers[0].Size > 0 && layers[0].Size <= maxPackedBytes:
		if packed, err = blob(ctx, source, digest.Digest(layers[0].Digest.String()), layers[0].Size); err != nil {
			return accel.Profile{}, err
		}
	default:
		return accel.Profile{}, fmt.Errorf("%w: it holds no profile", accel.ErrInvalid)
	}
	encoded, err := profile.Unpack(packed, profile.MaxEncodedBytes)
	if err != nil {
		return accel.Profile{}, err
	}
	return profile.Decode(encoded)
}

// blob reads a small blob, checked against its digest.
func blob(ctx context.Context, source *registry.Source, d digest.Digest, sizeBytes int64) ([]byte, error) {
	r, err := source.Range(ctx, d, sizeBytes, 0, sizeBytes)
	if err != nil {
		return nil, err
	}
	b := make([]byte, sizeBytes)
	if _, err = io.ReadFull(r, b); err == nil && d.Algorithm().FromBytes(b) != d {
		err = fmt.Errorf("%w: blob %s has another content", accel.ErrInvalid, d)
	}
	return b, errors.Join(err, r.Close())
}
