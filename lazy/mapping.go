package lazy

import (
	"context"
	"errors"
	"fmt"

	"accel"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// mapping finds the signed mapping of a source manifest: the server and the registry are asked at
// once, and the first good answer counts. accel.ErrNotFound where neither has one, also where all there
// are cannot be believed; that is logged.
func (l *Lazy) mapping(ctx context.Context, there *attached) (accel.Mapping, error) {
	manifest := there.manifest
	ctx, cancel := context.WithCancel(ctx)
	type answer struct {
		m   accel.Mapping
		err error
	}
	ask := []func() (accel.Mapping, error){
		func() (accel.Mapping, error) { return l.attachedMapping(ctx, there) },
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

// attachedMapping looks among what refers to the manifest in its repository.
func (l *Lazy) attachedMapping(ctx context.Context, there *attached) (accel.Mapping, error) {
	list, err := there.of(ctx, accel.MediaTypeMapping)
	if err != nil {
		return accel.Mapping{}, err
	}
	var unread []error // one that cannot be read may be anybody's; the next may be the service's
	for _, desc := range list {
		envelope := desc.Annotations[accel.AnnotationMapping]
		if envelope == "" { // a registry whose listing leaves the annotations out
			m, err := artifactOf(ctx, there.source, digest.Digest(desc.Digest.String()))
			if ctx.Err() != nil {
				return accel.Mapping{}, ctx.Err()
			}
			if err != nil {
				l.o.Log.Debug("what may be a mapping cannot be read", "manifest", there.manifest, "artifact", desc.Digest, "error", err)
				if registry.Unreachable(err) {
					unread = append(unread, err)
				}
				continue
			}
			envelope = m.Annotations[accel.AnnotationMapping]
		}
		m, err := l.believe(ctx, []byte(envelope), there.manifest, there.source.Repository())
		if err == nil {
			return m, nil
		}
		if ctx.Err() != nil {
			return accel.Mapping{}, ctx.Err()
		}
	}
	if len(unread) > 0 { // soon looked at again
		return accel.Mapping{}, errors.Join(unread...)
	}
	return accel.Mapping{}, fmt.Errorf("%w: nothing that refers to %s is a mapping that can be believed", accel.ErrNotFound, there.manifest)
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
