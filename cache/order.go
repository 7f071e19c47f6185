package cache

import (
	"slices"

	"github.com/opencontainers/go-digest"
)

// item is what is kept and evicted as one: a blob, or a layer kept inflated. Everything in it is guarded by
// Store.mu.
type item struct {
	digest digest.Digest
	blob   *blob  // itself, where it is one
	layer  *Layer // itself, where it is one
	// allocated is what it takes on disk: counted while it is filled, asked of the
	// file system after.
	allocated int64
	seq       uint64 // when it came, as a count
	usedAt    int64  // nanoseconds since 1970
	pins      int
	visited   bool // used again since it came (SIEVE's mark)
	touched   bool // usedAt or visited are not as in the index
	listed    bool
	gone      error // why it was dropped; the Store knows it no more
	older     *item
	newer     *item
}

// itemKey names one item: a blob and a layer of the same digest are two.
type itemKey struct {
	form   Form
	digest digest.Digest
}

func (k itemKey) String() string { return string(k.form) + " " + k.digest.String() }

func (i *item) key() itemKey {
	if i.layer != nil {
		return itemKey{FormLayer, i.digest}
	}
	return itemKey{FormBlob, i.digest}
}

func (i *item) busy() bool {
	if i.layer != nil {
		return i.layer.busy()
	}
	return i.blob.busy()
}

// evictable: nobody holds it or does anything with it.
func (i *item) evictable() bool { return i.pins == 0 && i.allocated > 0 && !i.busy() }

// order is SIEVE's queue (Zhang et al., NSDI '24): items in the order of their coming, and a
// hand that goes from the oldest to the newest, spares those that were used again since
// it came by, and takes the first that was not. One scan through much new content pushes
// out itself and not what is in use.
type order struct {
	oldest, newest *item
	hand           *item // looked at next; nil: the oldest
	n              int
}

func (o *order) add(i *item) {
	if o.newest == nil {
		o.oldest = i
	} else {
		o.newest.newer, i.older = i, o.newest
	}
	o.newest = i
	i.listed = true
	o.n++
}

func (o *order) remove(i *item) {
	if !i.listed {
		return
	}
	if o.hand == i {
		o.hand = i.newer
	}
	if i.older != nil {
		i.older.newer = i.newer
	} else {
		o.oldest = i.newer
	}
	if i.newer != nil {
		i.newer.older = i.older
	} else {
		o.newest = i.older
	}
	i.older, i.newer, i.listed = nil, nil, false
	o.n--
}

// next is the item to evict, nil where none may be. Twice around is enough: once to
// take the marks off, once to find one without.
func (o *order) next() *item {
	for range 2 * o.n {
		i := o.hand
		if i == nil {
			i = o.oldest
		}
		o.hand = i.newer
		if !i.evictable() {
			continue
		}
		if i.visited {
			i.visited = false
			continue
		}
		return i
	}
	return nil
}

// fill makes the queue anew.
func (o *order) fill(all []*item) {
	*o = order{}
	slices.SortFunc(all, func(a, b *item) int { return int(int64(a.seq - b.seq)) })
	for _, i := range all {
		o.add(i)
	}
}

func (o *order) all() []*item {
	all := make([]*item, 0, o.n)
	for i := o.oldest; i != nil; i = i.newer {
		all = append(all, i)
	}
	return all
}
