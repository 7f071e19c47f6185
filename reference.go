package accel

import (
	"fmt"

	_ "crypto/sha256" // the digest algorithms that references may name
	_ "crypto/sha512"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// maxReferenceBytes bounds what ParseReference looks at: 255 for the name (the
// distribution spec's limit), 128 for a tag, 135 for a digest, and separators.
const maxReferenceBytes = 1024

// Reference names an image: Repository with a Tag, a Digest, or both.
type Reference struct {
	Registry   string // host[:port]; "docker.io" for short names
	Repository string // path below the host
	Tag        string
	Digest     digest.Digest
}

// ParseReference reads an image reference in the usual notation (grammar:
// github.com/distribution/reference). Without tag and digest it means the tag
// "latest". The error is an ErrInvalid that quotes the input.
func ParseReference(s string) (Reference, error) {
	if len(s) > maxReferenceBytes {
		return Reference{}, fmt.Errorf("%w: image reference of %d bytes is longer than %d", ErrInvalid, len(s), maxReferenceBytes)
	}
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Reference{}, fmt.Errorf("%w: image reference %q: %w (want HOST/PATH:TAG or HOST/PATH@sha256:DIGEST)", ErrInvalid, s, err)
	}
	ref := Reference{Registry: reference.Domain(named), Repository: reference.Path(named)}
	if t, ok := named.(reference.Tagged); ok {
		ref.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		ref.Digest = d.Digest()
	}
	if ref.Tag == "" && ref.Digest == "" {
		ref.Tag = "latest"
	}
	return ref, nil
}

// Name is "registry/repository", the form that Record.Repository has.
func (r Reference) Name() string { return r.Registry + "/" + r.Repository }

// String is the reference in the usual notation; ParseReference reads it back.
func (r Reference) String() string {
	s := r.Name()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}
