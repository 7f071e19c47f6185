package artifact

import (
	"encoding/base64"

	"accel"
	"accel/bundle"
	"accel/profile"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

// WithBundle is f with a boot bundle beside the profile. The listing of referrers tells what it is worth.
func (f Form) WithBundle(m bundle.Made) (Form, error) {
	text, err := m.Encode()
	if err != nil {
		return f, err
	}
	with := Form{Annotations: map[string]string{accel.AnnotationBundle: text}}
	for name, value := range f.Annotations {
		with.Annotations[name] = value
	}
	with.Blobs = append(append(with.Blobs, f.Blobs...), registry.Blob{MediaType: accel.MediaTypeBundle, Content: m.Content})
	return with, nil
}

// BundleIn is the bundle of a source PLATFORM manifest in a listing of what refers to it: of several that of the best profile,
// as FindIn takes it. Nothing is asked for: where the listing leaves annotations out, there is none.
func BundleIn(list []v1.Descriptor, manifest digest.Digest) (best bundle.Description, found bool) {
	var of accel.Profile
	looked := 0
	for _, d := range list {
		text := d.Annotations[accel.AnnotationBundle]
		if d.ArtifactType != accel.MediaTypeProfile || text == "" {
			continue
		}
		if looked++; looked > maxCandidates {
			break
		}
		b, err := bundle.ParseDescription(text)
		if err != nil || d.Annotations[accel.AnnotationSourceDigest] != manifest.String() {
			continue
		}
		if p := inlined(d); !found || better(p, of) > 0 {
			best, of, found = b, p, true
		}
	}
	return best, found
}

// inlined is the profile in an annotation; one that is elsewhere counts as the least.
func inlined(d v1.Descriptor) accel.Profile {
	text := d.Annotations[accel.AnnotationProfile]
	if text == "" || len(text) > maxInlineBytes {
		return accel.Profile{}
	}
	packed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return accel.Profile{}
	}
	encoded, err := profile.Unpack(packed, profile.MaxEncodedBytes)
	if err != nil {
		return accel.Profile{}
	}
	p, err := profile.Decode(encoded)
	if err != nil {
		return accel.Profile{}
	}
	return p
}
