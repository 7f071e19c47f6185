package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// maxRewrites is how often a referrers tag is written against other writers.
const maxRewrites = 10

// fallback is the index under the tag "sha256-<hex of the subject>", which
// stands in for the referrers API (distribution spec, "Referrers Tag Schema").
// It is kept as it came: entries of others may have fields that we do not know.
type fallback struct {
	SchemaVersion int64             `json:"schemaVersion"`
	MediaType     types.MediaType   `json:"mediaType"`
	Manifests     []json.RawMessage `json:"manifests"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

func fallbackTag(subject string) string { return strings.Replace(subject, ":", "-", 1) }

// fallback reads a subject's fallback tag; an empty one where there is none.
func (c *Client) fallback(ctx context.Context, r repo, subject string) (fallback, error) {
	empty := fallback{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []json.RawMessage{}}
	raw, desc, err := c.manifest(ctx, r, fallbackTag(subject))
	if errors.Is(err, accel.ErrNotFound) {
		return empty, nil
	}
	if err != nil {
		return fallback{}, err
	}
	f := empty
	if err := json.Unmarshal(raw, &f); err != nil || !desc.MediaType.IsIndex() {
		return fallback{}, fmt.Errorf("%w: tag %s:%s is not an index of referrers (a %q): remove the tag", accel.ErrInvalid, r, fallbackTag(subject), desc.MediaType)
	}
	return f, nil
}

// position of the entry with digest d, -1 where there is none.
func (f fallback) position(d string) int {
	return slices.IndexFunc(f.Manifests, func(raw json.RawMessage) bool {
		var entry struct{ Digest string }
		return json.Unmarshal(raw, &entry) == nil && entry.Digest == d
	})
}

// list makes desc found among the referrers of subject, where the registry
// does not see to that by itself.
func (c *Client) list(ctx context.Context, r repo, subject v1.Hash, desc v1.Descriptor) error {
	entry, err := json.Marshal(desc)
	if err != nil {
		return err
	}
	_, err = c.referrersAPI(ctx, r, subject.String())
	if err == nil {
		return nil
	}
	if errors.Is(err, errNoReferrersAPI) {
		d := desc.Digest.String()
		err = c.rewrite(ctx, r, subject.String(), func(f *fallback) bool {
			i := f.position(d)
			switch {
			case i < 0:
				f.Manifests = append(f.Manifests, entry)
			case sameJSON(f.Manifests[i], entry):
				return false
			default: // an entry without what a listing must deliver
				f.Manifests[i] = entry
			}
			return true
		})
	}
	if err != nil {
		return fmt.Errorf("list %s among the referrers of %s@%s: %w", desc.Digest, r, subject, err)
	}
	return nil
}

// unlist takes d out of the fallback tag of subject.
func (c *Client) unlist(ctx context.Context, r repo, subject v1.Hash, d digest.Digest) error {
	err := c.rewrite(ctx, r, subject.String(), func(f *fallback) bool {
		i := f.position(d.String())
		if i < 0 {
			return false
		}
		f.Manifests = slices.Delete(f.Manifests, i, i+1)
		return true
	})
	if err != nil {
		return fmt.Errorf("take %s out of the referrers of %s@%s: %w", d, r, subject, err)
	}
	return nil
}

// rewrite changes a fallback tag until a fresh read shows that nothing is left
// to change. Registries have no compare-and-swap: calls of this process take
// turns, and a write that another process has overwritten is made again.
func (c *Client) rewrite(ctx context.Context, r repo, subject string, change func(*fallback) (changed bool)) error {
	unlock, err := c.subjects.Lock(ctx, r.String()+"@"+subject)
	if err != nil {
		return err
	}
	defer unlock()
	b := c.budget()
	b.attempts, b.left = maxRewrites, maxRewrites-1
	for {
		f, err := c.fallback(ctx, r, subject)
		if err != nil {
			return err
		}
		if !change(&f) {
			return nil
		}
		err = c.putFallback(ctx, r, subject, f)
		if namesMissing(err) {
			// Some registries take no index that names a manifest which is gone.
			if f.Manifests, err = c.present(ctx, r, f.Manifests); err == nil {
				err = c.putFallback(ctx, r, subject, f)
			}
		}
		if err != nil {
			return err
		}
		if f, err = c.fallback(ctx, r, subject); err != nil {
			return err
		}
		if !change(&f) {
			return nil
		}
		lost := fmt.Errorf("tag %s:%s was overwritten by another writer", r, fallbackTag(subject))
		if err := b.again(ctx, lost); err != nil {
			return err
		}
	}
}

func (c *Client) putFallback(ctx context.Context, r repo, subject string, f fallback) error {
	raw, err := json.Marshal(f)
	if err != nil {
		return err
	}
	_, err = c.putManifest(ctx, r, fallbackTag(subject), raw, f.MediaType)
	return err
}

// namesMissing reports whether a manifest was refused for what it names.
func namesMissing(err error) bool {
	var e *responseError
	return errors.As(err, &e) && e.has(transport.ManifestUnknownErrorCode, transport.ManifestBlobUnknownErrorCode, transport.BlobUnknownErrorCode)
}

// present keeps the entries that the repository still has.
func (c *Client) present(ctx context.Context, r repo, entries []json.RawMessage) ([]json.RawMessage, error) {
	kept := []json.RawMessage{}
	for _, raw := range entries {
		var entry struct{ Digest digest.Digest }
		if err := json.Unmarshal(raw, &entry); err != nil || validDigest(entry.Digest) != nil {
			kept = append(kept, raw) // not ours to judge
			continue
		}
		switch _, err := c.head(ctx, r, entry.Digest.String()); {
		case err == nil:
			kept = append(kept, raw)
		case !errors.Is(err, accel.ErrNotFound):
			return nil, err
		}
	}
	return kept, nil
}

func sameJSON(a, b json.RawMessage) bool {
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}

func hashOf(raw []byte) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: digest.FromBytes(raw).Encoded()}
}

// emptyBlob is the content "{}" of emptyConfig, as a layer to push.
type emptyBlob struct{}

var _ v1.Layer = emptyBlob{}

func (emptyBlob) Digest() (v1.Hash, error)             { return emptyConfig.Digest, nil }
func (emptyBlob) DiffID() (v1.Hash, error)             { return emptyConfig.Digest, nil }
func (emptyBlob) Size() (int64, error)                 { return emptyConfig.Size, nil }
func (emptyBlob) MediaType() (types.MediaType, error)  { return emptyConfig.MediaType, nil }
func (emptyBlob) Uncompressed() (io.ReadCloser, error) { return emptyBlob{}.Compressed() }
func (emptyBlob) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader("{}")), nil
}
