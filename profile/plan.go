package profile

import (
	"cmp"
	"slices"

	"accel"
)

// Limits bound a plan and say what its requests cost.
type Limits struct {
	// HotBytes bounds the content that the plan brings; 0 means MaxHotBytes.
	HotBytes int64
	// RequestBytes is what one more request costs, in bytes of the blob that would have
	// come in that time: the link's latency times its rate. Chunks that are not hot
	// are fetched along where the gap is smaller. 0 means 16 KiB, the cost of one more of 16 requests
	// at a time at 20 ms and 100 Mbit/s.
	RequestBytes int64
	// Has says that a chunk is there already; nil: none is.
	Has func(layer, chunk int) bool
}

const (
	defaultRequestBytes = 16 << 10
	// maxRequestBytes: a range ends here, so that it can go over several connections.
	maxRequestBytes = 8 << 20
	// Chunks are grouped into requests within a window of their first use, lest what is
	// needed late is fetched before what is needed now. Windows grow: the longer the
	// wait anyhow, the less exact the order has to be.
	firstWindowBytes = 1 << 20
	maxWindowBytes   = 16 << 20
)

// Range is a run of chunks that one request brings.
type Range struct {
	Layer    int // in the image
	First, N int // chunks
	// BlobBytes is what is fetched, HotBytes the content in it that the profile named.
	BlobBytes, HotBytes int64
}

// hotChunk is one chunk to fetch, in the order of first use.
type hotChunk struct {
	layer, chunk int
}

// Plan is which chunks to fetch for p, in the order of first use, all layers
// mixed. A layer that the node does not mount lazily is nil. What p names and the image
// does not have is left out; the bounds hold whatever it says.
func Plan(p accel.Profile, layers []*Layer, limits Limits) []Range {
	if limits.HotBytes <= 0 || limits.HotBytes > MaxHotBytes {
		limits.HotBytes = MaxHotBytes
	}
	if limits.RequestBytes <= 0 {
		limits.RequestBytes = defaultRequestBytes
	}
	limits.RequestBytes = min(limits.RequestBytes, maxRequestBytes)
	c := &planner{layers: layers, limits: limits, planned: map[hotChunk]bool{}}
	var window []hotChunk
	windowBytes, left := int64(0), int64(firstWindowBytes)
	for _, h := range c.chunks(p.Items) {
		window = append(window, h)
		windowBytes += c.at(h).BlobBytes
		if windowBytes >= left {
			c.group(window)
			window, windowBytes, left = window[:0], 0, min(2*left, maxWindowBytes)
		}
	}
	c.group(window)
	return c.ranges
}

type planner struct {
	layers  []*Layer
	limits  Limits
	planned map[hotChunk]bool
	ranges  []Range
	// useful and vain are bytes of the blobs: what is fetched along never exceeds what
	// was asked for.
	useful, vain int64
}

func (c *planner) at(h hotChunk) accel.Chunk { return c.layers[h.layer].table.At(h.chunk) }

// chunks are those of the items, each once, within the bound.
func (c *planner) chunks(items []Item) (hot []hotChunk) {
	left := c.limits.HotBytes
	named := map[hotChunk]bool{}
	for _, i := range items[:min(len(items), MaxItems)] {
		if check(i) != nil || i.Layer >= len(c.layers) || c.layers[i.Layer] == nil {
			continue
		}
		first, n := c.layers[i.Layer].Chunks(i.Path, i.Offset, i.Bytes)
		for k := first; k < first+n; k++ {
			h := hotChunk{i.Layer, k}
			if named[h] || (c.limits.Has != nil && c.limits.Has(h.layer, h.chunk)) {
				continue
			}
			named[h] = true
			if left -= c.at(h).Bytes; left < 0 {
				return hot
			}
			hot = append(hot, h)
		}
	}
	return hot
}

// group makes requests of one window's chunks. It goes by the first use of what is
// in each of them.
func (c *planner) group(window []hotChunk) {
	type ordered struct {
		hotChunk
		use int
	}
	var sorted []ordered
	for use, h := range window {
		if !c.planned[h] {
			sorted = append(sorted, ordered{h, use})
		}
	}
	slices.SortFunc(sorted, func(a, b ordered) int {
		return cmp.Or(cmp.Compare(a.layer, b.layer), cmp.Compare(a.chunk, b.chunk))
	})
	type request struct {
		Range
		use int
	}
	var requests []request
	for n, h := range sorted {
		chunk := c.at(h.hotChunk)
		if n > 0 {
			last := &requests[len(requests)-1]
			begin := c.at(hotChunk{last.Layer, last.First}).BlobOffset
			before := c.at(sorted[n-1].hotChunk)
			end := chunk.BlobOffset + chunk.BlobBytes
			gap := chunk.BlobOffset - before.BlobOffset - before.BlobBytes // negative in one gzip member
			if last.Layer == h.layer && gap < c.limits.RequestBytes && c.vain+gap <= c.useful && end-begin <= maxRequestBytes && c.free(last.Range, h.chunk) {
				last.N, last.BlobBytes = h.chunk-last.First+1, end-begin
				last.HotBytes += chunk.Bytes
				last.use = min(last.use, h.use)
				c.useful += chunk.BlobBytes
				c.vain += max(gap, 0)
				continue
			}
		}
		c.useful += chunk.BlobBytes
		requests = append(requests, request{Range{Layer: h.layer, First: h.chunk, N: 1, BlobBytes: chunk.BlobBytes, HotBytes: chunk.Bytes}, h.use})
	}
	slices.SortFunc(requests, func(a, b request) int { return cmp.Compare(a.use, b.use) })
	for _, r := range requests {
		for k := r.First; k < r.First+r.N; k++ {
			c.planned[hotChunk{r.Layer, k}] = true
		}
		c.ranges = append(c.ranges, r.Range)
	}
}

// free says that nothing between r's end and a chunk is planned or there already: a
// range brings no chunk twice.
func (c *planner) free(r Range, chunk int) bool {
	for k := r.First + r.N; k < chunk; k++ {
		if c.planned[hotChunk{r.Layer, k}] || (c.limits.Has != nil && c.limits.Has(r.Layer, k)) {
			return false
		}
	}
	return true
}
