package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Ensure brings the whole of b without a client, and returns when it is complete
// and its digest is checked. Where low is set, its fill waits while others fetch for clients; a Reader
// that comes to wait for it makes it a fill like theirs. ErrNoSpace when it cannot be kept.
func (s *Store) Ensure(ctx context.Context, b accel.BlobDescriptor, f Fetcher, low bool) (accel.Tally, error) {
	r, err := (&Reader{s: s, desc: b, fetcher: f, low: low, ensure: true}).open(ctx, 0, -1)
	if err != nil {
		return accel.Tally{}, err
	}
	defer func() { _ = r.Close() }()
	for {
		n, err := r.await()
		if errors.Is(err, io.EOF) {
			return r.Tally(), nil
		}
		if err != nil {
			return r.Tally(), err
		}
		r.given(n)
	}
}

// PutBlob stores small content, checked against its digest (ErrDigest). Run must be running.
func (s *Store) PutBlob(ctx context.Context, d digest.Digest, content []byte) error {
	if _, err := keyOf(d); err != nil {
		return err
	}
	if got := d.Algorithm().FromBytes(content); got != d {
		return fmt.Errorf("%w: blob %s has digest %s", ErrDigest, d, got)
	}
	_, err := s.Ensure(ctx, accel.BlobDescriptor{Digest: d, SizeBytes: int64(len(content))}, memory(content), false)
	return err
}

// memory is the Fetcher of content that is here.
type memory []byte

func (m memory) Fetch(_ context.Context, offset, _ int64) (Stream, error) {
	return Stream{ReadCloser: io.NopCloser(bytes.NewReader(m[offset:])), From: offset}, nil
}
