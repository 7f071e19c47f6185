package lazy

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"accel"
	"accel/prefetch"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// warmTick is how often a warm looks at how far it is.
	warmTick = 200 * time.Millisecond
	// stallTime is how long nothing of what a warm waits for may come until it is given up: what cannot be had would keep
	// all other warms waiting. It is generous, because what containers read comes first.
	stallTime = 5 * time.Minute
)

// ErrStalled: what a warm waits for does not come.
var ErrStalled = errors.New("nothing comes any more")

// Warm brings ahead what a start of an image reads, in the form that is mounted: its layers' tables, and of their content
// what a profile names; with all, or where there is no profile, all of it. It returns when that is there, with what
// image was resolved to. progress, which may be nil, is told the bytes that came and those of the whole
// image. The error is *Declined where the image cannot be mounted lazily, and wraps ErrStalled where its content does not come.
func (l *Lazy) Warm(ctx context.Context, image string, all bool, progress func(fetched, total int64)) (digest.Digest, error) {
	ref, err := l.reference(image)
	if err != nil {
		return "", err
	}
	source, err := l.o.Registry.Source(ref.Name(), "")
	if err != nil {
		return "", declined("registry of %s: %v", image, err)
	}
	top, manifest, err := platformManifest(ctx, source, ref)
	if err != nil {
		return top, err
	}
	a, err := l.ask(imageKey{ref.Name(), manifest}, image) // not by image: nobody refuses it when this ends early
	if err != nil {
		return top, err
	}
	if err := await(ctx, a.done); err != nil {
		return top, err
	}
	if a.err != nil {
		return top, a.err
	}
	img := a.img
	l.starts.asked(img)
	if err := await(ctx, img.planned); err != nil {
		return top, err
	}
	all = all || img.wave.Load() == nil
	if all {
		var pieces []prefetch.Piece
		for _, y := range img.layers {
			pieces = append(pieces, prefetch.Piece{Digest: y.Digest, N: l.filler.Stats(y.Digest).Chunks})
		}
		if err := l.filler.Hot(ctx, pieces); err != nil {
			return top, err
		}
	}
	return top, l.awaitContent(ctx, img, all, progress)
}

func await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitContent waits until what is wanted of an image is there. It keeps the layers open.
func (l *Lazy) awaitContent(ctx context.Context, img *image, all bool, progress func(fetched, total int64)) error {
	tick := time.NewTicker(warmTick)
	defer tick.Stop()
	came := stall{limit: stallTime}
	for {
		var left int
		var fetched, total int64
		for _, y := range img.layers {
			l.mu.Lock()
			open := l.open[y.Digest]
			if open != nil {
				open.at = time.Now()
			}
			l.mu.Unlock()
			if open == nil {
				return fmt.Errorf("%w: layer %s was closed while it was brought ahead", accel.ErrConflict, y.Digest)
			}
			s := l.filler.Stats(y.Digest)
			fetched, total = fetched+s.FetchedBytes, total+y.origin.SizeBytes
			if left += s.HotLeft; all {
				left += open.Left()
			}
		}
		if progress != nil {
			progress(fetched, total)
		}
		if left == 0 {
			return nil
		}
		if err := came.look(left, time.Now()); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// stall sees that nothing comes. What is fetched and turns out to be wrong does not count: only what is left says how far it is.
type stall struct {
	limit time.Duration
	left  int
	since time.Time
}

func (s *stall) look(left int, now time.Time) error {
	if s.since.IsZero() || left != s.left {
		s.left, s.since = left, now
	}
	if now.Sub(s.since) > s.limit {
		return fmt.Errorf("%w: %d parts of the content were missing for %s", ErrStalled, left, s.limit)
	}
	return nil
}

// platformManifest is what an image is for this machine; top is what its name points to.
func platformManifest(ctx context.Context, source *registry.Source, ref accel.Reference) (top, manifest digest.Digest, err error) {
	asked := ref.Digest.String()
	if ref.Digest == "" {
		asked = ref.Tag
	}
	for range registry.MaxIndexDepth {
		raw, desc, err := source.Manifest(ctx, asked)
		if err != nil {
			return cmp.Or(top, ref.Digest), "", err
		}
		d := digest.Digest(desc.Digest.String())
		if top == "" {
			top = d
		}
		if !desc.MediaType.IsIndex() {
			return top, d, nil
		}
		var index ocispec.Index
		if err := json.Unmarshal(raw, &index); err != nil {
			return top, "", fmt.Errorf("%w: index %s: %w", accel.ErrInvalid, d, err)
		}
		member, err := registry.Member(index.Manifests, registry.ThisMachine())
		if err != nil {
			return top, "", declined("index %s: %v", d, err)
		}
		if !types.MediaType(member.MediaType).IsIndex() {
			return top, member.Digest, member.Digest.Validate()
		}
		asked = member.Digest.String()
	}
	return top, "", declined("index %s is nested more than %d deep", top, registry.MaxIndexDepth)
}
