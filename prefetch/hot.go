package prefetch

import (
	"context"
	"math/bits"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Piece is a run of a layer's chunks.
type Piece struct {
	Digest   digest.Digest
	First, N int
}

const (
	// maxPieces of one call are looked at; a profile of 30,000 files has fewer.
	maxPieces = 1 << 17
	// hotFlightBytes bounds one flight: the hot set comes over several connections, in order.
	hotFlightBytes = 4 << 20
	// The hot set is cut into epochs. Inside of one, what lies near in the blob is fetched together; epochs come in
	// order of first use. The first is small, because its pieces are needed at once.
	firstEpochBytes = 1 << 20
	mostEpochBytes  = 16 << 20
)

// hotSet is what waits to be fetched ahead of need over one link: what one registry is slow with keeps no other's back.
// Filler.mu guards it.
type hotSet struct {
	wants []want   // in order of first use
	runs  []hotRun // of the epochs that have begun
	epoch int64    // bytes of the next
}

type want struct {
	l *layer
	m int
}

type hotRun struct {
	l          *layer
	first, end int
}

// Hot has the pieces fetched, in their order, before anything that nobody waits for, and returns at
// once; Stats tells how far it is. Pieces of layers that are not there, and what is not in a layer, are
// left out. It may be called again with more. Errors: ErrClosed, and ctx's cause.
func (f *Filler) Hot(ctx context.Context, pieces []Piece) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	now := time.Now()
	// Pieces may overlap: what they name twice is bounded too.
	steps := 0
	for _, l := range f.list {
		steps += 2 * l.n
	}
	for _, p := range pieces[:min(len(pieces), maxPieces)] {
		l := f.layers[p.Digest]
		if l == nil || p.N <= 0 || p.First >= l.n || p.First < 0 && p.N <= -p.First {
			continue
		}
		from := max(p.First, 0)
		to := p.First + min(p.N, l.n-p.First)
		to = from + min(to-from, steps)
		steps -= to - from
		if l.hot == nil {
			l.hot = make([]uint64, (l.members+63)/64)
		}
		l.link.starting, l.link.foretold, l.link.arrived = now.Add(startTime), true, now
		h := &l.link.hot
		if len(h.wants) == 0 && len(h.runs) == 0 {
			h.epoch = firstEpochBytes
		}
		for i := from; i < to; i++ {
			m := l.memberOf(i)
			if l.hot[m/64]&(1<<(m%64)) != 0 {
				continue
			}
			l.hot[m/64] |= 1 << (m % 64)
			h.wants = append(h.wants, want{l, m})
		}
	}
	kick(f.dispatching)
	return nil
}

// want puts the hot members of [first, end) that are not there behind the others, when a flight has not brought them. Those whose
// content came wrong are left to the background.
func (h *hotSet) want(l *layer, first, end int) {
	if l.removed || l.hot == nil {
		return
	}
	for m := first; m < end; m++ {
		if _, bad := l.bad[m]; !bad && l.hot[m/64]&(1<<(m%64)) != 0 && l.free(m) {
			h.wants = append(h.wants, want{l, m})
		}
	}
}

// drop forgets a layer.
func (h *hotSet) drop(l *layer) {
	h.wants = slices.DeleteFunc(h.wants, func(w want) bool { return w.l == l })
	h.runs = slices.DeleteFunc(h.runs, func(r hotRun) bool { return r.l == l })
}

// hotLeft counts the hot members that are missing.
func (l *layer) hotLeft() (n int) {
	for k, word := range l.hot {
		for ; word != 0; word &= word - 1 {
			if !l.present(k*64 + bits.TrailingZeros64(word)) {
				n++
			}
		}
	}
	return n
}

// launchHot starts what may start of a link's hot set. f.mu is held.
func (f *Filler) launchHot(h *hotSet, now time.Time) {
	if h.ready(now) < mostHotConnections {
		h.nextEpoch()
	}
	left := h.runs[:0]
	for _, r := range h.runs {
		if r.first = f.launchRun(r, now); r.first < r.end {
			left = append(left, r)
		}
	}
	clear(h.runs[len(left):])
	h.runs = left
	if h.ready(now) == 0 && len(h.wants) > 0 {
		kick(f.dispatching)
	}
}

// ready counts the runs of layers that are not paused, whose failures are not the others'.
func (h *hotSet) ready(now time.Time) (n int) {
	for _, r := range h.runs {
		if !now.Before(r.l.pausedUntil) {
			n++
		}
	}
	return n
}

// launchRun starts flights for a run, and returns from where on it could not. f.mu is held.
func (f *Filler) launchRun(r hotRun, now time.Time) (rest int) {
	l, k := r.l, r.l.link
	if l.unranged {
		return r.end // the whole comes anyway
	}
	m := r.first
	for m < r.end {
		if l.present(m) {
			m++
			continue
		}
		if fl := l.owner(m); fl != nil {
			fl.hasten()
			m++
			continue
		}
		if l.promises(m) { // wanted again where that is not kept
			m++
			continue
		}
		if !k.takesHot() || now.Before(l.pausedUntil) {
			return m
		}
		end := l.run(m, r.end, hotFlightBytes, k.hotBridge(), nil)
		f.start(l, hot, m, m, end)
		m = end
	}
	return m
}

// nextEpoch turns the next wants into runs.
func (h *hotSet) nextEpoch() {
	var taken []want
	bytes := int64(0)
	k := 0
	for ; k < len(h.wants) && bytes < h.epoch; k++ {
		w := h.wants[k]
		if w.l.present(w.m) {
			continue
		}
		offset, end := w.l.span(w.m)
		bytes += end - offset
		taken = append(taken, w)
	}
	h.wants = h.wants[k:]
	if len(h.wants) == 0 {
		h.wants = nil
	}
	h.epoch = min(2*h.epoch, mostEpochBytes)
	h.runs = append(h.runs, runsOf(taken)...)
}

// runsOf puts wants together that lie near each other. A run comes where its first want does.
func runsOf(wants []want) []hotRun {
	first := map[*layer][]int{} // indices of wants
	var layers []*layer
	for i, w := range wants {
		if first[w.l] == nil {
			layers = append(layers, w.l)
		}
		first[w.l] = append(first[w.l], i)
	}
	type placed struct {
		hotRun
		at int // of its earliest want
	}
	var runs []placed
	for _, l := range layers {
		at := first[l]
		slices.SortFunc(at, func(a, b int) int { return wants[a].m - wants[b].m })
		bridge := l.link.hotBridge()
		for k, i := range at {
			m := wants[i].m
			offset, end := l.span(m)
			if k > 0 {
				r := &runs[len(runs)-1]
				start, _ := l.span(r.first)
				_, reached := l.span(r.end - 1)
				if offset-reached <= bridge && end-start <= hotFlightBytes {
					r.end, r.at = m+1, min(r.at, i)
					continue
				}
			}
			runs = append(runs, placed{hotRun{l: l, first: m, end: m + 1}, i})
		}
	}
	slices.SortStableFunc(runs, func(a, b placed) int { return a.at - b.at })
	out := make([]hotRun, len(runs))
	for i, r := range runs {
		out[i] = r.hotRun
	}
	return out
}
