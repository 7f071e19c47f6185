package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strings"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

const (
	// MaxManifestBytes bounds a manifest; the distribution spec lets registries
	// refuse larger ones (section "Pushing Manifests").
	MaxManifestBytes = 4 << 20

	digestHeader = "Docker-Content-Digest"
)

// acceptManifests are the kinds that are asked for. Docker's schema 1 is not:
// registries would then convert to it, and the digest would not be the one meant.
var acceptManifests = strings.Join([]string{
	string(types.OCIImageIndex),
	string(types.DockerManifestList),
	string(types.OCIManifestSchema1),
	string(types.DockerManifestSchema2),
	"application/vnd.oci.artifact.manifest.v1+json",
	"*/*;q=0.1",
}, ", ")

// Manifest is a fetched manifest, checked against its digest; Image or Index is set by media type, neither for an artifact of another type.
//
// Image and Index fetch what they are asked for from the registry, under the
// context that the manifest was pulled with. A layer's Compressed goes on where
// a broken connection left off; its last bytes are withheld until the digest of
// the whole has been checked. Layers can be mounted into other repositories of
// the registry (see Mountable).
type Manifest struct {
	Descriptor v1.Descriptor
	Raw        []byte
	Image      v1.Image
	Index      v1.ImageIndex
}

// Head resolves ref ("host/path:tag" or "@digest"): digest, media type, size. ErrNotFound when it is not there.
func (c *Client) Head(ctx context.Context, repository, tagOrDigest string) (v1.Descriptor, error) {
	r, err := c.target(repository, tagOrDigest)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return c.head(ctx, r, tagOrDigest)
}

func (c *Client) head(ctx context.Context, r repo, tagOrDigest string) (v1.Descriptor, error) {
	resp, err := c.do(ctx, r, request{
		method: http.MethodHead,
		url:    r.url("manifests/" + tagOrDigest),
		header: map[string]string{"Accept": acceptManifests},
		scopes: r.pull(),
		ok:     []int{http.StatusOK},
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	resp.Body.Close()
	hash, err := v1.NewHash(resp.Header.Get(digestHeader))
	mediaType := mediaTypeOf(resp.Header)
	if err != nil || resp.ContentLength < 0 || mediaType == "" {
		// Not every registry sends all three for a HEAD; the manifest itself has them.
		_, desc, err := c.manifest(ctx, r, tagOrDigest)
		return desc, err
	}
	if isDigest(tagOrDigest) && hash.String() != tagOrDigest {
		return v1.Descriptor{}, &corruptError{fmt.Sprintf("%s answers for %s with digest %s", r, tagOrDigest, hash)}
	}
	if resp.ContentLength > MaxManifestBytes {
		return v1.Descriptor{}, tooLarge(r, tagOrDigest, resp.ContentLength)
	}
	return v1.Descriptor{MediaType: mediaType, Digest: hash, Size: resp.ContentLength}, nil
}

// Pull fetches the manifest d. ErrNotFound when it is not there; a manifest of
// more than MaxManifestBytes or that is malformed is a permanent error.
func (c *Client) Pull(ctx context.Context, repository string, d digest.Digest) (*Manifest, error) {
	r, err := c.target(repository, d.String())
	if err != nil {
		return nil, err
	}
	raw, desc, err := c.manifest(ctx, r, d.String())
	if err != nil {
		return nil, err
	}
	return c.open(ctx, r, raw, desc)
}

// open gives raw the form that its media type says.
func (c *Client) open(ctx context.Context, r repo, raw []byte, desc v1.Descriptor) (*Manifest, error) {
	m := &Manifest{Descriptor: desc, Raw: raw}
	var err error
	switch {
	case desc.MediaType.IsIndex():
		m.Index, err = newIndex(ctx, c, r, raw, desc)
	case desc.MediaType.IsImage():
		m.Image, err = newImage(ctx, c, r, raw, desc)
	}
	if err != nil {
		return nil, accel.Permanent(fmt.Errorf("%w: manifest %s@%s: %w", accel.ErrInvalid, r, desc.Digest, err))
	}
	return m, nil
}

// manifest fetches a manifest and checks it against the digest that it was
// asked by, or else the one that the registry says it has.
func (c *Client) manifest(ctx context.Context, r repo, tagOrDigest string) ([]byte, v1.Descriptor, error) {
	var desc v1.Descriptor
	header, raw, err := c.read(ctx, r, request{
		method: http.MethodGet,
		url:    r.url("manifests/" + tagOrDigest),
		header: map[string]string{"Accept": acceptManifests},
		scopes: r.pull(),
		ok:     []int{http.StatusOK},
	}, MaxManifestBytes, func(header http.Header, raw []byte) error {
		hash, size, err := v1.SHA256(bytes.NewReader(raw))
		if err != nil {
			return err
		}
		desc = v1.Descriptor{Digest: hash, Size: size}
		want := header.Get(digestHeader)
		if isDigest(tagOrDigest) {
			want = tagOrDigest
		}
		if want != "" && want != hash.String() {
			return &corruptError{fmt.Sprintf("manifest %s:%s: its content has digest %s, not %s", r, tagOrDigest, hash, want)}
		}
		return nil
	})
	if err != nil {
		return nil, v1.Descriptor{}, err
	}
	if desc.MediaType, err = agreedMediaType(header, raw); err != nil {
		return nil, v1.Descriptor{}, accel.Permanent(fmt.Errorf("%w: manifest %s@%s: %w", accel.ErrInvalid, r, desc.Digest, err))
	}
	return raw, desc, nil
}

// agreedMediaType refuses a manifest that can be read in two ways, as the image
// spec asks since CVE-2021-41190: the digest covers the bytes, not the header.
func agreedMediaType(header http.Header, raw []byte) (types.MediaType, error) {
	var m struct {
		MediaType types.MediaType `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", err
	}
	said := mediaTypeOf(header)
	if m.Manifests != nil && m.Layers != nil {
		return "", errors.New("it has both manifests and layers")
	}
	switch {
	case m.MediaType == "":
		return said, nil
	case said == m.MediaType, !said.IsIndex() && !said.IsImage():
		return m.MediaType, nil
	default:
		return "", fmt.Errorf("it says that it is a %q, the registry that it is a %q", m.MediaType, said)
	}
}

func mediaTypeOf(header http.Header) types.MediaType {
	mediaType, _, err := mime.ParseMediaType(header.Get("Content-Type"))
	if err != nil {
		return types.MediaType(header.Get("Content-Type"))
	}
	return types.MediaType(mediaType)
}

func isDigest(tagOrDigest string) bool { return strings.Contains(tagOrDigest, ":") }

func tooLarge(r repo, tagOrDigest string, size int64) error {
	return accel.Permanent(fmt.Errorf("%w: manifest %s:%s has %d bytes, more than %d", accel.ErrInvalid, r, tagOrDigest, size, MaxManifestBytes))
}

// putManifest stores raw under a tag or its digest and returns the answer's headers.
func (c *Client) putManifest(ctx context.Context, r repo, tagOrDigest string, raw []byte, mediaType types.MediaType) (http.Header, error) {
	if len(raw) > MaxManifestBytes {
		return nil, tooLarge(r, tagOrDigest, int64(len(raw)))
	}
	header, err := c.discard(ctx, r, request{
		method: http.MethodPut,
		url:    r.url("manifests/" + tagOrDigest),
		header: map[string]string{"Content-Type": string(mediaType)},
		body:   raw,
		scopes: r.push(),
		ok:     []int{http.StatusCreated, http.StatusOK},
	})
	if err != nil {
		return nil, err
	}
	want := digest.FromBytes(raw).String()
	if got := header.Get(digestHeader); got != "" && got != want {
		return nil, &corruptError{fmt.Sprintf("%s stored manifest %s as %s", r, want, got)}
	}
	return header, nil
}

// Tag points tag at the manifest d that the repository already has.
func (c *Client) Tag(ctx context.Context, repository, tag string, d digest.Digest) error {
	r, err := c.target(repository, tag)
	if err != nil {
		return err
	}
	if err := validDigest(d); err != nil {
		return err
	}
	raw, desc, err := c.manifest(ctx, r, d.String())
	if err != nil {
		return err
	}
	_, err = c.putManifest(ctx, r, tag, raw, desc.MediaType)
	return err
}

// Delete removes a manifest by digest (not an error when it is gone already).
// Where it is listed in a referrers fallback tag, it is taken out of there
// first: an index that names what is gone could not be pushed again.
func (c *Client) Delete(ctx context.Context, repository string, d digest.Digest) error {
	r, err := c.target(repository, d.String())
	if err != nil {
		return err
	}
	raw, _, err := c.manifest(ctx, r, d.String())
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	subject, _, err := referrerOf(raw)
	if err != nil {
		return accel.Permanent(fmt.Errorf("%w: manifest %s@%s: %w", accel.ErrInvalid, r, d, err))
	}
	return c.remove(ctx, r, subject, d)
}

// remove deletes a manifest that refers to subject; nil: to none.
func (c *Client) remove(ctx context.Context, r repo, subject *v1.Descriptor, d digest.Digest) error {
	if subject != nil {
		if err := c.unlist(ctx, r, subject.Digest, d); err != nil {
			return err
		}
	}
	_, err := c.discard(ctx, r, request{
		method: http.MethodDelete,
		url:    r.url("manifests/" + d.String()),
		scopes: []string{"repository:" + r.path + ":pull,push,delete"},
		ok:     []int{http.StatusAccepted, http.StatusOK, http.StatusNoContent, http.StatusNotFound},
	})
	return err
}
