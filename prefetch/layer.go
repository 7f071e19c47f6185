package prefetch

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// maxBlobOffset bounds where things are in a blob, so that sums do not overflow.
const maxBlobOffset = 1 << 50

// layer is a Layer with the state of its filling. A member here is the gzip members that hold one chunk, or several
// small ones; it is what a blob can be cut into. Members are numbered as they lie in the blob. A chunk costs
// 8 to 20 bytes here, the rest of what is known about it Content tells.
type layer struct {
	Layer
	digest  digest.Digest
	link    *link
	n       int     // chunks
	members int     // of them
	order   []int32 // the chunks as they lie in the blob; nil: as they are numbered
	place   []int32 // the inverse of order; nil with it
	starts  []int32 // of each member, its first chunk's place in order; nil: each chunk has its own
	twins   twins

	// Guarded by Filler.mu:
	flights    []*flight
	waiters    map[*waiter]struct{}
	reads      [maxSequences]sequence
	bad        map[int]badMember // that came with a wrong digest
	hot        []uint64          // a bit for each member of the hot set; nil: none is
	unranged   bool
	toldFailed time.Time // when a failed read was logged last
	touched    uint64    // Filler.touches at its last miss
	cursor     int       // where the background goes on
	// Until pausedUntil nothing is fetched that nobody waits for; failures doubles the next pause.
	pausedUntil time.Time
	failures    int

	pending      []int // chunks that were put and are not persisted
	pendingBytes int64
	releases     []func()
	persistAfter time.Time // not before, after a failure
	completed    bool

	promised map[int]promise // chunks that a Stream brings; nil: none
	putting  int             // Puts of Streams that are under way

	users   int // of Content or of its functions, beside flights
	removed bool
	idle    *sync.Cond // on Filler.mu; set by newLayer's caller
	stats   Stats
}

// badMember remembers corrupt content: the first time it is fetched again, the second who waits for it gets an error.
type badMember struct {
	tries int
	// until then a Fill fails at once; until quiet the background leaves it alone.
	until, quiet time.Time
}

const (
	// maxBad bounds layer.bad.
	maxBad = 1024
	// badTTL is how long corruption is believed without asking again, badQuiet the same for
	// the background: where the registry's blob is bad, each try costs the whole member.
	badTTL   = time.Second
	badQuiet = time.Minute
)

func newLayer(given Layer) (*layer, error) {
	if given.Content == nil || given.Source == nil {
		return nil, fmt.Errorf("%w: a layer needs content and a source", accel.ErrInvalid)
	}
	l := &layer{Layer: given, digest: given.Content.Digest(), n: given.Content.Len(), waiters: map[*waiter]struct{}{}}
	if l.n < 0 || l.n > accel.MaxLayerChunks {
		return nil, fmt.Errorf("%w: layer %s has %d chunks, more than %d", accel.ErrInvalid, l.digest, l.n, accel.MaxLayerChunks)
	}
	if err := l.sort(); err != nil {
		return nil, fmt.Errorf("%w: layer %s: %w", accel.ErrInvalid, l.digest, err)
	}
	l.twins = newTwins(l.Content, l.n)
	if l.Persisted != nil {
		for i := range l.n {
			if l.Content.Has(i) && !l.Persisted(i) {
				l.pending = append(l.pending, i)
			}
		}
	}
	return l, nil
}

func compareChunks(a, b accel.Chunk) int {
	return cmp.Or(cmp.Compare(a.BlobOffset, b.BlobOffset), cmp.Compare(a.InnerOffset, b.InnerOffset), cmp.Compare(a.Bytes, b.Bytes))
}

// sort finds out how the chunks lie in the blob, and checks that they do not overlap there.
func (l *layer) sort() error {
	sorted := true
	for i := range l.n {
		c := l.Content.Chunk(i)
		if c.BlobOffset < 0 || c.BlobOffset > maxBlobOffset || c.BlobBytes <= 0 || c.BlobBytes > accel.MaxMemberBytes ||
			c.InnerOffset < 0 || c.InnerOffset > maxBlobOffset || c.Bytes < 0 || c.Bytes > accel.MaxChunkBytes {
			return fmt.Errorf("chunk %d is out of bounds: %d bytes at %d of the blob, %d bytes at %d inside", i, c.BlobBytes, c.BlobOffset, c.Bytes, c.InnerOffset)
		}
		sorted = sorted && (i == 0 || compareChunks(l.Content.Chunk(i-1), c) <= 0)
	}
	if !sorted {
		l.order, l.place = make([]int32, l.n), make([]int32, l.n)
		for i := range l.order {
			l.order[i] = int32(i)
		}
		slices.SortStableFunc(l.order, func(a, b int32) int {
			return compareChunks(l.Content.Chunk(int(a)), l.Content.Chunk(int(b)))
		})
		for p, i := range l.order {
			l.place[i] = int32(p)
		}
	}
	var starts []int32
	var before accel.Chunk
	for p := range l.n {
		c := l.Content.Chunk(l.at(p))
		switch {
		case p == 0 || c.BlobOffset >= before.BlobOffset+before.BlobBytes:
			starts = append(starts, int32(p))
		case c.BlobOffset != before.BlobOffset || c.BlobBytes != before.BlobBytes:
			return fmt.Errorf("chunks %d and %d overlap in the blob", l.at(p-1), l.at(p))
		case c.InnerOffset < before.InnerOffset+before.Bytes && !sameInside(c, before):
			return fmt.Errorf("chunks %d and %d overlap in what they inflate from", l.at(p-1), l.at(p))
		}
		before = c
	}
	l.members = len(starts)
	if l.members < l.n {
		l.starts = slices.Clip(starts)
	}
	return nil
}

// sameInside reports whether two chunks of one member are the same bytes.
func sameInside(a, b accel.Chunk) bool { return a.InnerOffset == b.InnerOffset && a.Bytes == b.Bytes }

// at is the chunk at a place of the blob's order.
func (l *layer) at(place int) int {
	if l.order == nil {
		return place
	}
	return int(l.order[place])
}

// memberOf is the member that holds chunk i.
func (l *layer) memberOf(i int) int {
	if l.place != nil {
		i = int(l.place[i])
	}
	if l.starts == nil {
		return i
	}
	m, found := slices.BinarySearch(l.starts, int32(i))
	if !found {
		m--
	}
	return m
}

// places of member m's chunks.
func (l *layer) places(m int) (from, to int) {
	if l.starts == nil {
		return m, m + 1
	}
	if m+1 == l.members {
		return int(l.starts[m]), l.n
	}
	return int(l.starts[m]), int(l.starts[m+1])
}

// span is where member m lies in the blob.
func (l *layer) span(m int) (offset, end int64) {
	p, _ := l.places(m)
	c := l.Content.Chunk(l.at(p))
	return c.BlobOffset, c.BlobOffset + c.BlobBytes
}

// present reports whether all chunks of m are there.
func (l *layer) present(m int) bool {
	for p, to := l.places(m); p < to; p++ {
		if !l.Content.Has(l.at(p)) {
			return false
		}
	}
	return true
}

// missingBytes is the content that the missing chunks of members [from, to) will be.
func (l *layer) missingBytes(from, to int) (n int64) {
	for m := from; m < to; m++ {
		for p, end := l.places(m); p < end; p++ {
			if i := l.at(p); !l.Content.Has(i) {
				n += l.Content.Chunk(i).Bytes
			}
		}
	}
	return n
}

// owner is the flight that will bring m. Filler.mu is held.
func (l *layer) owner(m int) *flight {
	for _, fl := range l.flights {
		if fl.owns(m) {
			return fl
		}
	}
	return nil
}

// free reports whether m is missing and nobody brings some of it. Filler.mu is held.
func (l *layer) free(m int) bool { return !l.present(m) && l.owner(m) == nil && !l.promises(m) }

// run is how far from first, which is free, one flight may go: over free members until the blob's bytes
// from first on reach maxBytes, and over present ones and what belongs to none as long as that is at most bridgeBytes
// at a time. It ends where stop says so; nil: nowhere. Filler.mu is held.
func (l *layer) run(first, limit int, maxBytes, bridgeBytes int64, stop func(m int) bool) (end int) {
	start, reached := l.span(first)
	end = first + 1
	for m := first + 1; m < limit; m++ {
		offset, after := l.span(m)
		if offset-reached > bridgeBytes || after-start > maxBytes {
			break
		}
		if l.present(m) {
			continue
		}
		if l.owner(m) != nil || l.promises(m) || stop != nil && stop(m) {
			break
		}
		reached, end = after, m+1
	}
	return end
}

// quiet reports whether the background leaves m alone. Filler.mu is held.
func (l *layer) quiet(m int, now time.Time) bool {
	bad, ok := l.bad[m]
	return ok && now.Before(bad.quiet)
}

// leave ends a use of l's Content; Filler.mu is held.
func (l *layer) leave() {
	l.users--
	l.idle.Broadcast()
}
