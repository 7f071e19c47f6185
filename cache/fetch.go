package cache

import (
	"context"
	"io"
)

// Fetcher brings bytes of one blob. Fetch is called from goroutines of the store,
// under the store's context, mostly once for many readers; for a Reader that is served without
// caching, under its own. It is asked for whole parts. An error ends the fill, and
// is what every Reader that waits for it gets; one of accel.ErrUnauthenticated and
// accel.ErrForbidden only the Reader whose Fetcher it was: others try theirs.
// A stream that ends early after it brought a part or more is followed by another Fetch.
type Fetcher interface {
	Fetch(ctx context.Context, offset, lengthBytes int64) (Stream, error)
}

// Stream is content of the blob, from From on, which is at most the offset asked for
// (0 where the source knows no ranges). It may go on past the length asked for.
type Stream struct {
	io.ReadCloser
	From int64
	Peer bool // from another node, not from the registry
}
