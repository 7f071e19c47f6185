package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"

	"accel"
	"accel/prefetch"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// source is where a layer's blob is read from: the store where the mirror brought it, else the
// registries that are known to have it.
type source struct {
	l *Lazy
	y *openLayer
	d digest.Digest
}

// Range implements prefetch.Source.
func (s *source) Range(ctx context.Context, offset, length int64) (io.ReadCloser, error) {
	s.l.mu.Lock()
	o := s.y.origin
	s.l.mu.Unlock()
	whole := length < 0
	if whole {
		offset, length = 0, o.SizeBytes
	}
	var errs []error
	for _, repository := range o.Repositories {
		from, err := s.l.o.Registry.Source(repository, "")
		if err == nil {
			var r io.ReadCloser
			if r, err = s.l.blob(ctx, from, s.d, o.SizeBytes, offset, length, whole); err == nil || ctx.Err() != nil {
				return r, err
			}
		}
		errs = append(errs, fmt.Errorf("%s: %w", repository, err))
	}
	return nil, errors.Join(errs...)
}

// blob opens bytes of a blob, which are not checked against its digest. The error wraps prefetch.ErrUnranged where the
// registry has no ranges; whole says that the blob is read to its end, so that this is no matter.
func (l *Lazy) blob(ctx context.Context, source *registry.Source, d digest.Digest, sizeBytes, offset, length int64, whole bool) (io.ReadCloser, error) {
	if e, err := l.o.Store.Stat(d); err == nil && e.Complete {
		if r, err := l.o.Store.OpenBlob(ctx, accel.BlobDescriptor{Digest: d, SizeBytes: sizeBytes}, offset, length, nil); err == nil {
			return r, nil
		}
	}
	r, err := source.Range(ctx, d, sizeBytes, offset, length)
	if err != nil {
		return nil, err
	}
	if r.Unranged && !whole {
		return nil, errors.Join(fmt.Errorf("%w: %s", prefetch.ErrUnranged, source.Host()), r.Close())
	}
	return r, nil
}
