package profile

import (
	"accel"
)

// maxPlannedChunks bounds a plan: MaxHotBytes in chunks of a page each.
const maxPlannedChunks = MaxHotBytes / pageBytes

// Limits bound a plan.
type Limits struct {
	// HotBytes bounds the content that the plan brings; 0 means MaxHotBytes.
	HotBytes int64
	// Has says that a chunk is there already; nil: none is.
	Has func(layer, chunk int) bool
}

// Range is a run of chunks, each of which the profile names.
type Range struct {
	Layer    int // in the image
	First, N int // chunks
}

// Plan is which chunks to fetch for p, each once, in the order of first use, all layers
// mixed. What lies near each other is brought together by whoever fetches it: only there it is known what
// a request costs. A layer that the node does not mount lazily is nil. What p names and the image
// does not have is left out; the bounds hold whatever it says.
func Plan(p accel.Profile, layers []*Layer, limits Limits) (plan []Range) {
	left := limits.HotBytes
	if left <= 0 || left > MaxHotBytes {
		left = MaxHotBytes
	}
	type chunk struct{ layer, n int }
	named := map[chunk]bool{}
	for _, i := range p.Items[:min(len(p.Items), MaxItems)] {
		if check(i) != nil || i.Layer >= len(layers) || layers[i.Layer] == nil {
			continue
		}
		l := layers[i.Layer]
		first, n := l.Chunks(i.Path, i.Offset, i.Bytes)
		for k := first; k < first+n; k++ {
			c := chunk{i.Layer, k}
			if named[c] || (limits.Has != nil && limits.Has(i.Layer, k)) {
				continue
			}
			named[c] = true
			if left -= l.table.At(k).Bytes; left < 0 || len(named) > maxPlannedChunks {
				return plan
			}
			if last := len(plan) - 1; last >= 0 && plan[last].Layer == i.Layer && plan[last].First+plan[last].N == k {
				plan[last].N++
				continue
			}
			plan = append(plan, Range{Layer: i.Layer, First: k, N: 1})
		}
	}
	return plan
}
