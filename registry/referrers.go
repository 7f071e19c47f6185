package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Bounds of a listing: whoever may push to a repository can attach any number. What is beyond them is not
// listed.
const (
	maxReferrersPages = 64
	maxReferrersBytes = 16 << 20
	maxReferrers      = 4096
	// maxReferrerReads is how many of them are read for what the listing does not say of them, and
	// referrerReaders how many at a time.
	maxReferrerReads = 64
	referrerReaders  = 8
	// maxReferrerBytes is the largest manifest whose annotations are taken; a mapping of 127 layers has 70 kB.
	maxReferrerBytes = 1 << 20
)

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

// Referrers lists what refers to subject: referrers API, or the fallback tag. Of the types that are named, or of all
// where none is, or an empty one. What refers has its type and annotations where types are named, also where
// the registry's listing leaves them out; what cannot be read is not in it. Nothing that refers is no error.
func (c *Client) Referrers(ctx context.Context, repository string, subject digest.Digest, artifactTypes ...string) ([]v1.Descriptor, error) {
	r, err := c.target(repository, subject.String())
	if err != nil {
		return nil, err
	}
	return c.referrers(ctx, r, subject, artifactTypes...)
}

func (c *Client) referrers(ctx context.Context, r repo, subject digest.Digest, artifactTypes ...string) ([]v1.Descriptor, error) {
	all, err := c.allReferrers(ctx, r, subject.String())
	if err == nil && len(artifactTypes) > 0 && !slices.Contains(artifactTypes, "") {
		all, err = c.ofTypes(ctx, r, all, artifactTypes)
	}
	if err != nil {
		return nil, fmt.Errorf("list what refers to %s@%s: %w", r, subject, err)
	}
	if all == nil {
		all = []v1.Descriptor{}
	}
	return all, nil
}

// descriptorsOf leaves out what makes no sense: one bad entry is no reason to find none of the others.
func descriptorsOf(entries []json.RawMessage) (all []v1.Descriptor) {
	for _, raw := range entries {
		var d v1.Descriptor
		if json.Unmarshal(raw, &d) == nil && validDigest(digest.Digest(d.Digest.String())) == nil && len(all) < maxReferrers {
			all = append(all, d)
		}
	}
	return all
}

// typeUnknown says that a listing does not tell an artifact's type: the registry has left it out, or has looked at the
// config alone.
func typeUnknown(d v1.Descriptor) bool {
	return d.ArtifactType == "" || d.ArtifactType == string(emptyConfig.MediaType)
}

// ofTypes keeps what is of one of the types, each with what its manifest says where the listing does not. Where nothing is
// left because the registry did not answer, that is the error.
func (c *Client) ofTypes(ctx context.Context, r repo, all []v1.Descriptor, artifactTypes []string) ([]v1.Descriptor, error) {
	wanted := func(d v1.Descriptor) bool { return slices.Contains(artifactTypes, d.ArtifactType) }
	kept := make([]v1.Descriptor, 0, len(all))
	errs := make([]error, 0, maxReferrerReads)
	var readers errgroup.Group
	readers.SetLimit(referrerReaders)
	for _, d := range all {
		if !typeUnknown(d) && !wanted(d) {
			continue
		}
		kept = append(kept, d)
		if n := len(kept) - 1; (typeUnknown(d) || len(d.Annotations) == 0) && len(errs) < maxReferrerReads {
			errs = append(errs, nil)
			failed, read := &errs[len(errs)-1], &kept[n] // neither list is moved: both have room
			readers.Go(func() error {
				*failed = c.complete(ctx, r, read)
				return nil
			})
		}
	}
	readers.Wait() //nolint:errcheck // none returns one
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	kept = slices.DeleteFunc(kept, func(d v1.Descriptor) bool { return !wanted(d) })
	if len(kept) == 0 {
		for _, err := range errs {
			if Unreachable(err) {
				return nil, err
			}
		}
	}
	return kept, nil
}

// complete gives a referrer the type and the annotations that its manifest has; one that is gone has none.
func (c *Client) complete(ctx context.Context, r repo, d *v1.Descriptor) error {
	raw, _, err := c.manifest(ctx, r, d.Digest.String())
	if errors.Is(err, accel.ErrNotFound) {
		d.ArtifactType = ""
	}
	if err != nil {
		return err
	}
	_, known, err := referrerOf(raw)
	if err != nil {
		return err
	}
	d.ArtifactType = known.ArtifactType
	if len(raw) <= maxReferrerBytes {
		d.Annotations = known.Annotations
	}
	return nil
}

// DeleteReferrer deletes the artifact d of that type which refers to subject; none is gone already. The manifest itself
// says what it is, not a listing, which may name anything that the Client may delete. accel.ErrConflict
// where it is something else, which stays.
func (c *Client) DeleteReferrer(ctx context.Context, repository string, subject digest.Digest, artifactType string, d digest.Digest) error {
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
	of, desc, err := referrerOf(raw)
	if err != nil || of == nil || of.Digest.String() != subject.String() || artifactType == "" || desc.ArtifactType != artifactType {
		return fmt.Errorf("%w: manifest %s@%s is no %q that refers to %s; it is not deleted", accel.ErrConflict, r, d, artifactType, subject)
	}
	return c.remove(ctx, r, of, d)
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
			all = descriptorsOf(tag.Manifests)
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
	bytes := 0
	for page := 0; at != "" && page < maxReferrersPages && bytes < maxReferrersBytes && len(all) < maxReferrers; page++ {
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
		var list struct {
			Manifests []json.RawMessage `json:"manifests"`
		}
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, fmt.Errorf("%w: referrers listing: %w", accel.ErrInvalid, err)
		}
		bytes += len(raw)
		found := descriptorsOf(list.Manifests)
		all = append(all, found[:min(len(found), maxReferrers-len(all))]...)
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
