package profile

import (
	"slices"
	"sort"
)

// span is a run of bytes, from inclusive, to exclusive.
type span struct{ from, to int64 }

// spans is a set of bytes: ascending, neither touching nor overlapping.
type spans []span

// add puts s into the set and returns the parts of it that were not there.
func (set *spans) add(s span) (fresh []span) {
	if s.from >= s.to {
		return nil
	}
	old := *set
	first := sort.Search(len(old), func(i int) bool { return old[i].to >= s.from })
	whole, at, last := s, s.from, first
	for ; last < len(old) && old[last].from <= s.to; last++ {
		if o := old[last]; at < o.from {
			fresh = append(fresh, span{at, o.from})
		}
		at = max(at, old[last].to)
		whole = span{min(whole.from, old[last].from), max(whole.to, old[last].to)}
	}
	if at < s.to {
		fresh = append(fresh, span{at, s.to})
	}
	*set = slices.Replace(old, first, last, whole)
	return fresh
}

// shared is how many bytes of s are in the set.
func (set spans) shared(s span) (n int64) {
	first := sort.Search(len(set), func(i int) bool { return set[i].to > s.from })
	for _, o := range set[first:] {
		if o.from >= s.to {
			break
		}
		n += min(o.to, s.to) - max(o.from, s.from)
	}
	return n
}
