package cache

import (
	"context"
	"errors"
	"io"

	"accel"
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
