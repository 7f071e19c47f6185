package lazy

import (
	"context"
	"errors"
	"fmt"

	"accel"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// maxCandidates bounds the mappings of one manifest that are looked at: whoever may push to
// the repository can attach any number.
const maxCandidates = 16

// mapping finds the signed mapping of a source manifest: the server and the registry are asked at
// once, and the first good answer counts. accel.ErrNotFound where neither has one, also where all there
// are cannot be believed; that is logged.
func (l *Lazy) mapping(ctx context.Context, source *registry.Source, manifest digest.Digest) (accel.Mapping, error) {
	ctx, cancel := context.WithCancel(ctx)
	type answer struct {
		m   accel.Mapping
		err error
	}
	ask := []func() (accel.Mapping, error){
		func() (accel.Mapping, error) { return l.attached(ctx, source, manifest) },
	}
	if l.o.Server != nil {
		ask = append(ask, func() (accel.Mapping, error) {
			envelope, err := l.o.Server.Mapping(ctx, "", manifest)
			if err != nil {
				return accel.Mapping{}, fmt.Errorf("ask the server for the mapping of %s: %w", manifest, err)
			}
			return l.believe(ctx, envelope, manifest, "the server")
		})
	}
	answers := make(chan answer, len(ask))
	for _, a := range ask {
		go func() {
			m, err := a()
			answers <- answer{m, err}
		}()
	}
	var found *accel.Mapping
	var errs []error
	for range ask { // all are waited for, so that none outlives its question
		a := <-answers
		switch {
		case a.err == nil && found == nil:
			found = &a.m
			cancel()
		case a.err != nil && found == nil:
			errs = append(errs, a.err)
		}
	}
	cancel()
	if found != nil {
		return *found, nil
	}
	for _, err := range errs {
		if !errors.Is(err, accel.ErrNotFound) {
			return accel.Mapping{}, errors.Join(errs...)
		}
	}
	return accel.Mapping{}, fmt.Errorf("%w: no signed mapping of %s", accel.ErrNotFound, manifest)
}

// attached looks among what refers to the manifest in its repository.
func (l *Lazy) attached(ctx context.Context, source *registry.Source, manifest digest.Digest) (accel.Mapping, error) {
	list, err := source.Referrers(ctx, manifest, accel.MediaTypeMapping)
	if err != nil {
		return accel.Mapping{}, fmt.Errorf("list what refers to %s: %w", manifest, err)
	}
	for _, desc := range list[:min(len(list), maxCandidates)] {
		if desc.ArtifactType != accel.MediaTypeMapping {
			continue
		}
		envelope := desc.Annotations[accel.AnnotationMapping]
		if envelope == "" { // a registry whose listing leaves the annotations out
			if envelope, err = l.envelope(ctx, source, digest.Digest(desc.Digest.String())); err != nil {
				return accel.Mapping{}, err
			}
		}
		m, err := l.believe(ctx, []byte(envelope), manifest, source.Repository())
		if err == nil {
			return m, nil
		}
		if ctx.Err() != nil {
			return accel.Mapping{}, ctx.Err()
		}
	}
	return accel.Mapping{}, fmt.Errorf("%w: nothing that refers to %s is a mapping that can be believed", accel.ErrNotFound, manifest)
}

// believe returns what a trusted key signed, for this manifest. Anything else is said in the log: it may be
// an attack.
func (l *Lazy) believe(ctx context.Context, envelope []byte, manifest digest.Digest, from string) (accel.Mapping, error) {
	m, err := l.o.Keys.Verify(ctx, envelope)
	if err == nil && m.SourceManifest != manifest {
		err = fmt.Errorf("%w: it is about manifest %s", accel.ErrInvalid, m.SourceManifest)
	}
	if err != nil && ctx.Err() == nil {
		l.metrics.refused.Inc()
		l.o.Log.Warn("a mapping is not believed", "manifest", manifest, "from", from, "error", err)
		return accel.Mapping{}, fmt.Errorf("%w: the mapping of %s from %s is not believed: %w", accel.ErrNotFound, manifest, from, err)
	}
	return m, err
}
