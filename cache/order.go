package cache

import (
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
)

// order is SIEVE's queue (Zhang et al., NSDI '24): blobs in the order of their coming, and a
// hand that goes from the oldest to the newest, spares those that were opened again since
// it came by, and takes the first that was not. One scan through much new content pushes
// out itself and not what is in use.
type order struct {
	oldest, newest *blob
	hand           *blob // looked at next; nil: the oldest
	n              int
}

func (o *order) add(b *blob) {
	if o.newest == nil {
		o.oldest = b
	} else {
		o.newest.newer, b.older = b, o.newest
	}
	o.newest = b
	b.listed = true
	o.n++
}

func (o *order) remove(b *blob) {
	if !b.listed {
		return
	}
	if o.hand == b {
		o.hand = b.newer
	}
	if b.older != nil {
		b.older.newer = b.newer
	} else {
		o.oldest = b.newer
	}
	if b.newer != nil {
		b.newer.older = b.older
	} else {
		o.newest = b.older
	}
	b.older, b.newer, b.listed = nil, nil, false
	o.n--
}

// next is the blob to evict, nil where none may be. Twice around is enough: once to
// take the marks off, once to find one without.
func (o *order) next() *blob {
	for range 2 * o.n {
		b := o.hand
		if b == nil {
			b = o.oldest
		}
		o.hand = b.newer
		if !b.evictable() {
			continue
		}
		if b.visited {
			b.visited = false
			continue
		}
		return b
	}
	return nil
}

// fill makes the queue anew.
func (o *order) fill(blobs map[digest.Digest]*blob) {
	*o = order{}
	for _, b := range slices.SortedFunc(maps.Values(blobs), func(a, b *blob) int {
		return int(int64(a.seq - b.seq))
	}) {
		o.add(b)
	}
}

func (o *order) all() []*blob {
	all := make([]*blob, 0, o.n)
	for b := o.oldest; b != nil; b = b.newer {
		all = append(all, b)
	}
	return all
}
