package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxReferrersPages bounds a listing of up to MaxManifestBytes each.
const maxReferrersPages = 64

// emptyConfig is the config and the one layer of an artifact that is all in its
// annotations (image spec, "Guidance for an Empty Descriptor").
var emptyConfig = v1.Descriptor{MediaType: types.MediaType(ocispec.DescriptorEmptyJSON.MediaType), Digest: hashOf(ocispec.DescriptorEmptyJSON.Data), Size: ocispec.DescriptorEmptyJSON.Size}

// Blob is content of an attachment that is too much for its annotations.
type Blob struct {
	MediaType string
	Content   []byte
}

// BuildAttachment makes the manifest that Attach pushes, and its descriptor as a
// referrers listing has it. Equal input gives equal bytes.
func BuildAttachment(subject v1.Descriptor, artifactType string, annotations map[string]string, blobs ...Blob) (raw []byte, desc v1.Descriptor, err error) {
	if artifactType == "" {
		return nil, v1.Descriptor{}, fmt.Errorf("%w: an attachment to %s needs an artifact type", accel.ErrInvalid, subject.Digest)
	}
	if err := validDigest(digest.Digest(subject.Digest.String())); err != nil {
		return nil, v1.Descriptor{}, fmt.Errorf("subject of an attachment: %w", err)
	}
	layers := []v1.Descriptor{emptyConfig}
	if len(blobs) > 0 {
		layers = nil
	}
	for _, b := range blobs {
		layers = append(layers, v1.Descriptor{MediaType: types.MediaType(b.MediaType), Digest: hashOf(b.Content), Size: int64(len(b.Content))})
	}
	raw, err = json.Marshal(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  artifactType,
		Config:        emptyConfig,
		Layers:        layers,
		Subject:       &v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
		Annotations:   annotations,
	})
	if err != nil {
		return nil, v1.Descriptor{}, fmt.Errorf("encode an attachment to %s: %w", subject.Digest, err)
	}
	if len(raw) > MaxManifestBytes {
		return nil, v1.Descriptor{}, accel.Permanent(fmt.Errorf("%w: an attachment to %s has %d bytes, more than %d", accel.ErrInvalid, subject.Digest, len(raw), MaxManifestBytes))
	}
	_, desc, err = referrerOf(raw)
	return raw, desc, err
}

// Attach pushes an artifact manifest of the given type that refers to subject, with annotations, an empty config and
// the blobs, if any, as its layers; returns its digest. BuildAttachment computes the same without pushing.
func (c *Client) Attach(ctx context.Context, repository string, subject v1.Descriptor, artifactType string, annotations map[string]string, blobs ...Blob) (digest.Digest, error) {
	r, err := c.repository(repository)
	if err != nil {
		return "", err
	}
	raw, desc, err := BuildAttachment(subject, artifactType, annotations, blobs...)
	if err != nil {
		return "", err
	}
	if err := c.pushLayer(ctx, r, emptyBlob{}); err != nil {
		return "", err
	}
	for _, b := range blobs {
		if err := c.pushLayer(ctx, r, static.NewLayer(b.Content, types.MediaType(b.MediaType))); err != nil {
			return "", err
		}
	}
	if err := c.ensureManifest(ctx, r, raw, desc.MediaType); err != nil {
		return "", err
	}
	return digest.Digest(desc.Digest.String()), nil
}

// referrerOf reads what a listing says of a manifest: its subject (nil where it
// has none) and its descriptor with artifact type and annotations (distribution
// spec, "Listing Referrers").
func referrerOf(raw []byte) (subject *v1.Descriptor, desc v1.Descriptor, err error) {
	var m struct {
		MediaType    types.MediaType   `json:"mediaType"`
		ArtifactType string            `json:"artifactType"`
		Config       *v1.Descriptor    `json:"config"`
		Subject      *v1.Descriptor    `json:"subject"`
		Annotations  map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, v1.Descriptor{}, err
	}
	desc = v1.Descriptor{MediaType: m.MediaType, Digest: hashOf(raw), Size: int64(len(raw)), ArtifactType: m.ArtifactType, Annotations: m.Annotations}
	if desc.ArtifactType == "" && m.Config != nil {
		desc.ArtifactType = string(m.Config.MediaType)
	}
	return m.Subject, desc, nil
}

// Referrers lists what refers to subject: referrers API, or the fallback tag.
// An empty artifactType lists all types. Nothing that refers is no error.
func (c *Client) Referrers(ctx context.Context, repository string, subject digest.Digest, artifactType string) ([]v1.Descriptor, error) {
	r, err := c.target(repository, subject.String())
	if err != nil {
		return nil, err
	}
	return c.referrers(ctx, r, subject, artifactType)
}

func (c *Client) referrers(ctx context.Context, r repo, subject digest.Digest, artifactType string) ([]v1.Descriptor, error) {
	all, err := c.allReferrers(ctx, r, subject.String())
	if err != nil {
		return nil, fmt.Errorf("list what refers to %s@%s: %w", r, subject, err)
	}
	found := []v1.Descriptor{}
	for _, d := range all {
		if artifactType != "" && d.ArtifactType == string(emptyConfig.MediaType) {
			// The registry has looked at the config alone; the manifest says the type.
			raw, _, err := c.manifest(ctx, r, d.Digest.String())
			if errors.Is(err, accel.ErrNotFound) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list what refers to %s@%s: %w", r, subject, err)
			}
			if _, known, err := referrerOf(raw); err == nil {
				d.ArtifactType = known.ArtifactType
			}
		}
		if artifactType == "" || d.ArtifactType == artifactType {
			found = append(found, d)
		}
	}
	return found, nil
}

// allReferrers asks the referrers API, and at the same time for the fallback tag, unless the host has shown that it has
// the API: a start waits for the answer.
func (c *Client) allReferrers(ctx context.Context, r repo, subject string) ([]v1.Descriptor, error) {
	type answer struct {
		all []v1.Descriptor
		err error
	}
	bounded, cancel := context.WithCancel(ctx)
	defer cancel()
	tagged := make(chan answer, 1)
	ask := func() {
		var all []v1.Descriptor
		tag, err := c.fallback(bounded, r, subject)
		if err == nil {
			all, err = tag.descriptors()
		}
		tagged <- answer{all, err}
	}
	known := r.listsReferrers.Load()
	if !known {
		go ask()
	}
	all, err := c.referrersAPI(ctx, r, subject)
	switch {
	case errors.Is(err, errNoReferrersAPI):
		r.listsReferrers.Store(false)
		if known {
			go ask()
		}
		a := <-tagged
		return a.all, a.err
	case err == nil:
		r.listsReferrers.Store(true)
	}
	if !known {
		cancel()
		<-tagged
	}
	return all, err
}

var errNoReferrersAPI = errors.New("the registry has no referrers API")

// referrersAPI asks the registry itself. errNoReferrersAPI where it answers as
// one that does not know the question. Its filter by type is not used: not all
// mean the same by it.
func (c *Client) referrersAPI(ctx context.Context, r repo, subject string) ([]v1.Descriptor, error) {
	at := r.url("referrers/" + subject)
	var all []v1.Descriptor
	for page := 0; at != ""; page++ {
		if page == maxReferrersPages {
			return nil, fmt.Errorf("%w: a listing of more than %d pages", accel.ErrInvalid, maxReferrersPages)
		}
		header, raw, err := c.read(ctx, r, request{
			method: http.MethodGet,
			url:    at,
			header: map[string]string{"Accept": string(types.OCIImageIndex)},
			scopes: r.pull(),
			ok:     []int{http.StatusOK},
		}, MaxManifestBytes, nil)
		if unknownEndpoint(err) || err == nil && mediaTypeOf(header) != types.OCIImageIndex {
			return nil, errNoReferrersAPI
		}
		if err != nil {
			return nil, err
		}
		m, err := v1.ParseIndexManifest(bytes.NewReader(raw))
		if err != nil {
			return nil, fmt.Errorf("%w: referrers listing: %w", accel.ErrInvalid, err)
		}
		all = append(all, m.Manifests...)
		if at, err = nextPage(r, at, header); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// unknownEndpoint reports whether the registry does not know what it was asked.
// The spec wants 404 then; others are seen too.
func unknownEndpoint(err error) bool {
	var e *responseError
	if !errors.As(err, &e) {
		return false
	}
	switch e.answer.StatusCode {
	case http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusNotImplemented:
		return true
	}
	return false
}
