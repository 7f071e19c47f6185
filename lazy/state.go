package lazy

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// LayerState is how a layer that is open stands.
type LayerState struct {
	Digest digest.Digest `json:"digest" doc:"of the blob that is mounted"`
	// Lazy: reads still go through the holder in some mount of it.
	Lazy         bool    `json:"lazy" doc:"some mount of it is served by the holder"`
	Mounts       int     `json:"mounts"`
	SizeBytes    int64   `json:"sizeBytes" doc:"of the blob"`
	LocalPercent float64 `json:"localPercent" doc:"share of its content that is on this node"`
	// What was done for it since the node started.
	FetchedBytes int64         `json:"fetchedBytes" doc:"of the blob, from the registry"`
	CopiedBytes  int64         `json:"copiedBytes" doc:"that other layers had"`
	Misses       int64         `json:"misses" doc:"reads that had to wait"`
	Waited       time.Duration `json:"waitedNs" doc:"how long all of them did"`
	// BytesPerSecond came over the network in the last seconds.
	BytesPerSecond float64 `json:"bytesPerSecond"`
}

// Layers says how the open layers stand, by their digests.
func (l *Lazy) Layers() []LayerState {
	mounts := map[digest.Digest]*LayerState{}
	l.mu.Lock()
	for d, y := range l.open {
		s := &LayerState{Digest: d, SizeBytes: y.origin.SizeBytes, LocalPercent: 100}
		if n := y.Len(); n > 0 {
			s.LocalPercent = 100 * float64(n-y.Left()) / float64(n)
		}
		mounts[d] = s
	}
	l.mu.Unlock()
	at, err := l.host.Mounts()
	if err != nil {
		l.o.Log.Warn("mounts cannot be listed", "error", err)
	}
	for _, m := range at {
		if s := mounts[m.Digest]; s != nil {
			s.Mounts++
			s.Lazy = s.Lazy || m.Lazy
		}
	}
	all := make([]LayerState, 0, len(mounts))
	for d, s := range mounts {
		f := l.filler.Stats(d)
		s.BytesPerSecond = l.rates.of(d)
		s.FetchedBytes, s.CopiedBytes, s.Misses, s.Waited = f.FetchedBytes, f.CopiedBytes, f.Misses, f.Waited
		all = append(all, *s)
	}
	slices.SortFunc(all, func(a, b LayerState) int { return cmp.Compare(a.Digest, b.Digest) })
	return all
}

// rateTime is over how long a rate is taken.
const rateTime = 2 * time.Second

// rates are how fast layers come.
type rates struct {
	mu     sync.Mutex
	at     time.Time
	before map[digest.Digest]int64
	now    map[digest.Digest]float64
}

// look takes the rates since the last look, when that is long enough ago.
func (r *rates) look(now time.Time, fetched map[digest.Digest]int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	since := now.Sub(r.at)
	if since < rateTime {
		return
	}
	r.now = make(map[digest.Digest]float64, len(fetched))
	for d, n := range fetched {
		if before, known := r.before[d]; known && n > before {
			r.now[d] = float64(n-before) / since.Seconds()
		}
	}
	r.at, r.before = now, fetched
}

func (r *rates) of(d digest.Digest) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now[d]
}

// fetched are the bytes that came for each open layer.
func (l *Lazy) fetched() map[digest.Digest]int64 {
	all := map[digest.Digest]int64{}
	l.mu.Lock()
	defer l.mu.Unlock()
	for d := range l.open {
		all[d] = l.filler.Stats(d).FetchedBytes
	}
	return all
}
