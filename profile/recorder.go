package profile

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Bounds of a recording.
const (
	defaultQuiet = 10 * time.Second
	defaultLimit = 2 * time.Minute
	// maxParts bounds memory: 64 Ki chunks are more than any start reads.
	maxParts = 1 << 16
)

// RecorderOptions say which start is recorded, and when it is over.
type RecorderOptions struct {
	// Manifest is the source PLATFORM manifest's digest.
	Manifest digest.Digest
	// Node is the node's name, which the service replaces with what the node's
	// credentials say.
	Node string
	// Cold says that all of the image's layers were mounted anew for this start, so that
	// no page of them was in the kernel's cache and every read is seen. See
	// Report.Complete.
	Cold bool
	// Profile is the version of the profile that is fetched ahead for this start; empty:
	// none is.
	Profile digest.Digest
	// Quiet is how long no new part may be read until the start counts as over; 0
	// means 10 s. Counted from the first part on.
	Quiet time.Duration
	// Limit ends a start that does not become quiet; 0 means 2 min.
	Limit time.Duration
}

// Recorder takes down what one start reads. Its methods may be called from several
// goroutines.
type Recorder struct {
	o       RecorderOptions
	started time.Time
	changed chan struct{} // one slot: something for Wait to look at

	mu    sync.Mutex
	parts map[part]*seen
	last  time.Time // when the newest part was read first
	end   End       // empty while it goes on
	ended time.Time
}

// part is one chunk of one layer.
type part struct {
	layer digest.Digest
	chunk int
}

// seen is what was read of a part.
type seen struct {
	first time.Time
	order int // among parts of the same instant
}

// NewRecorder begins a recording.
func NewRecorder(o RecorderOptions) *Recorder {
	if o.Quiet <= 0 {
		o.Quiet = defaultQuiet
	}
	if o.Limit <= 0 {
		o.Limit = defaultLimit
	}
	return &Recorder{o: o, started: time.Now(), changed: make(chan struct{}, 1), parts: map[part]*seen{}}
}

// Chunks notes that a program read all of some chunks of a layer, at a time that
// may have passed. Only what a program asked for counts, not what was fetched ahead
// of it; but a read that found its chunk there counts as well.
func (r *Recorder) Chunks(layer digest.Digest, table Table, first, n int, at time.Time) {
	if first < 0 || first >= table.Len() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := first; k < first+min(n, table.Len()-first); k++ {
		r.note(part{layer, k}, at)
	}
	r.wake()
}

// note takes a read down. r.mu is held.
func (r *Recorder) note(p part, at time.Time) {
	if r.end != "" && at.After(r.ended) {
		return
	}
	if old := r.parts[p]; old != nil {
		if at.Before(old.first) {
			old.first = at
		}
		return
	}
	if len(r.parts) == maxParts {
		return
	}
	r.parts[p] = &seen{first: at, order: len(r.parts)}
	if at.After(r.last) {
		r.last = at
	}
}

// Answered notes that the program is up: the start ends here.
func (r *Recorder) Answered() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finish(EndAnswered, time.Now())
	r.wake()
}

func (r *Recorder) finish(e End, at time.Time) {
	if r.end == "" {
		r.end, r.ended = e, at
	}
}

func (r *Recorder) wake() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Wait returns when the start is over: it answered, became quiet, reached its limit,
// or ctx ended, which cuts the recording short.
func (r *Recorder) Wait(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		left := r.look()
		if left <= 0 {
			return
		}
		timer.Reset(left)
		select {
		case <-r.changed:
		case <-timer.C:
		case <-ctx.Done():
			r.mu.Lock()
			r.finish(EndStopped, time.Now())
			r.mu.Unlock()
			return
		}
	}
}

// look applies the rules of the end, and tells how long until one may hold.
func (r *Recorder) look() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.end != "" {
		return 0
	}
	now := time.Now()
	limit, quiet := r.started.Add(r.o.Limit), r.last.Add(r.o.Quiet)
	switch {
	case len(r.parts) > 0 && !quiet.After(now) && !quiet.After(limit):
		r.finish(EndQuiet, quiet)
	case !limit.After(now):
		r.finish(EndLimit, limit)
	case len(r.parts) > 0 && quiet.Before(limit):
		return quiet.Sub(now)
	default:
		return limit.Sub(now)
	}
	return 0
}

// Report is what was recorded until now, as parts of the files of the image's
// layers, lowest first; nil stands for one that is not mounted lazily. What the bounds
// of a report do not hold is left out. It can be asked for once Wait has returned.
func (r *Recorder) Report(layers []*Layer) Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	end, took := r.end, time.Duration(0)
	switch end {
	case "":
		end = EndStopped
	case EndAnswered:
		took = min(max(r.ended.Sub(r.started), 0), maxTook)
	}
	index := map[digest.Digest]int{}
	for n, l := range layers {
		if l != nil {
			index[l.digest] = n
		}
	}
	type read struct {
		part
		*seen
	}
	reads := make([]read, 0, len(r.parts))
	for p, s := range r.parts {
		reads = append(reads, read{p, s})
	}
	slices.SortFunc(reads, func(a, b read) int { return cmp.Or(a.first.Compare(b.first), cmp.Compare(a.order, b.order)) })
	var items []Item
	for _, p := range reads {
		n, ok := index[p.layer]
		if !ok {
			continue
		}
		i, ok := layers[n].item(p.chunk)
		if !ok {
			continue
		}
		i.Layer = n
		if k := len(items) - 1; k >= 0 && placeOf(items[k]) == placeOf(i) && items[k].Offset+items[k].Bytes == i.Offset {
			items[k].Bytes += i.Bytes
			continue
		}
		items = append(items, i)
	}
	return Report{
		ID: newID(), Node: r.o.Node, Manifest: r.o.Manifest, StartedAt: r.started.UTC().Truncate(time.Second),
		Complete: r.o.Cold && (end == EndAnswered || end == EndQuiet), End: end, Took: took, Profile: r.o.Profile,
		Items: bounded(items, MaxItems, MaxHotBytes),
	}
}
