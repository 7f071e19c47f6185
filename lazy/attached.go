package lazy

import (
	"context"
	"encoding/json"
	"fmt"

	"accel"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxCandidates bounds what is looked at of one kind that refers to a manifest: whoever may push to
// the repository can attach any number.
const maxCandidates = 16

// attached is what refers to a manifest in its repository. The registry is asked once, for
// the mapping and the profile.
type attached struct {
	source   *registry.Source
	manifest digest.Digest
	done     chan struct{}
	all      []v1.Descriptor // readable when done is closed
	err      error
}

// attachedTo begins to ask. It is work of l that ends with ctx.
func (l *Lazy) attachedTo(ctx context.Context, source *registry.Source, manifest digest.Digest) *attached {
	a := &attached{source: source, manifest: manifest, done: make(chan struct{})}
	l.work.Go(func() {
		defer close(a.done)
		if a.all, a.err = source.Referrers(ctx, manifest, accel.MediaTypeMapping, accel.MediaTypeProfile); a.err != nil {
			a.err = fmt.Errorf("list what refers to %s: %w", manifest, a.err)
		}
	})
	return a
}

// of gives what is of one type, at most maxCandidates. The error is the registry's or ctx's.
func (a *attached) of(ctx context.Context, artifactType string) (found []v1.Descriptor, err error) {
	select {
	case <-a.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for _, d := range a.all {
		if d.ArtifactType == artifactType && len(found) < maxCandidates {
			found = append(found, d)
		}
	}
	return found, a.err
}

// artifactOf reads an artifact's manifest.
func artifactOf(ctx context.Context, source *registry.Source, d digest.Digest) (m ocispec.Manifest, err error) {
	raw, _, err := source.Manifest(ctx, d.String())
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("%w: artifact %s: %w", accel.ErrInvalid, d, err)
	}
	return m, nil
}
