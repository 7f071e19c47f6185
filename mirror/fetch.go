package mirror

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"accel"
	"accel/cache"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// fetcher brings one blob from its registry for the store, with the credential of the
// request that it was made for. It outlives the request where the store goes on filling.
type fetcher struct {
	access
	digest    digest.Digest
	sizeBytes int64
	// count, if not nil, is told the bytes that come.
	count    func(n int)
	unranged atomic.Bool // the registry knew no ranges
}

var _ cache.Fetcher = (*fetcher)(nil)

// Fetch implements cache.Fetcher. An answer of upstream proves that this client may have
// the blob, and that the repository holds it.
func (f *fetcher) Fetch(ctx context.Context, offset, lengthBytes int64) (cache.Stream, error) {
	bounded, cancel := context.WithCancelCause(ctx) // lasts as long as the stream
	impatient := time.AfterFunc(f.m.o.AnswerPatience, func() { cancel(errImpatient) })
	r, err := f.source.Range(bounded, f.digest, f.sizeBytes, offset, lengthBytes)
	if !impatient.Stop() && err == nil {
		r.Close()
		err = errImpatient
	}
	if ctx.Err() == nil {
		f.learn(err)
	}
	if err != nil {
		cancel(context.Canceled)
		return cache.Stream{}, err
	}
	f.admit(f.digest)
	if r.Unranged {
		f.unranged.Store(true)
	}
	f.m.metrics.fetches.Inc()
	return cache.Stream{ReadCloser: &stream{Range: r, f: f, cancel: cancel}, From: r.From}, nil
}

// stream is a blob on its way. It ends when nothing comes for too long, and tells what passes.
type stream struct {
	registry.Range
	f      *fetcher
	cancel context.CancelCauseFunc
}

func (s *stream) Read(p []byte) (int, error) {
	stalled := time.AfterFunc(s.f.m.o.StallPatience, func() { s.cancel(errStalled) })
	n, err := s.Range.Read(p)
	stalled.Stop()
	if s.f.count != nil {
		s.f.count(n)
	}
	return n, err
}

func (s *stream) Close() error {
	defer s.cancel(context.Canceled)
	return s.Range.Close()
}

// blobAccess says that this client may have a blob as far as is known, and its size.
type blobAccess struct {
	sizeBytes int64
	complete  bool  // in the store
	proven    bool  // this repository is known to hold it
	note      error // why upstream could not be asked, where it should have been
}

// blobAccess asks upstream only where the store does not know enough. proveNow: also where it is not
// known that the repository holds the blob, which fetching it would show as well.
func (a access) blobAccess(ctx context.Context, d digest.Digest, proveNow bool) (blobAccess, error) {
	b, fresh, _ := a.blobKnown(d)
	if fresh && b.sizeBytes >= 0 && (b.proven || !proveNow) {
		return b, nil
	}
	unlock, err := a.m.asking.Lock(ctx, a.client+" "+a.repository()+"@"+d.String())
	if err != nil {
		return blobAccess{}, err
	}
	defer unlock()
	b, fresh, graced := a.blobKnown(d)
	if fresh && b.sizeBytes >= 0 && (b.proven || !proveNow) {
		return b, nil
	}
	olderWillDo := b.proven && graced && b.sizeBytes >= 0
	var size int64
	err = a.ask(ctx, olderWillDo, func(ctx context.Context) (err error) {
		size, err = a.source.BlobSize(ctx, d)
		return err
	})
	switch {
	case err == nil:
		if b.complete && size != b.sizeBytes {
			return blobAccess{}, fmt.Errorf("%s says that blob %s has %d bytes; it has %d", a.source.Host(), d, size, b.sizeBytes)
		}
		a.admit(d)
		b.sizeBytes, b.proven = size, true
		a.m.sizes.Add(sizeKey{a.repository(), d}, size)
		return b, nil
	case olderWillDo && registry.Unreachable(err):
		b.note = err
		return b, nil
	default:
		return blobAccess{}, err
	}
}

// blobKnown is what is known without asking.
func (a access) blobKnown(d digest.Digest) (b blobAccess, fresh, graced bool) {
	b = blobAccess{sizeBytes: -1, proven: a.linked(d)}
	entry, err := a.m.o.Store.Stat(d)
	switch {
	case err == nil && entry.Complete:
		b.sizeBytes, b.complete = entry.SizeBytes, true
	case err == nil || errors.Is(err, accel.ErrNotFound):
		if size, ok := a.m.sizes.Get(sizeKey{a.repository(), d}); ok {
			b.sizeBytes = size
		}
	}
	fresh, graced = a.granted()
	return b, fresh, graced
}
