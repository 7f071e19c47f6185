package lazy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"accel"
	"accel/cache"
	"accel/lazyfs"
	"accel/prefetch"
	"accel/profile"

	"github.com/opencontainers/go-digest"
)

const (
	// untrustedBytes is how much content a profile may bring that anybody could have attached to the image, where
	// that is more than half of the image.
	untrustedBytes = 16 << 20
	// PlainTime is how long FetchAhead counts.
	PlainTime = 10 * time.Minute
)

// Ahead is what is fetched ahead of a start, by a profile.
type Ahead struct {
	From    string              `json:"from" enum:"node,server,registry" doc:"where the profile was found"`
	Origin  accel.ProfileOrigin `json:"origin" doc:"how it came about"`
	Version digest.Digest       `json:"version"`
	// PlannedBytes of content were asked for. Of them UsedBytes were read by the start that was recorded
	// last, VainBytes were not; both 0 before.
	PlannedBytes int64 `json:"plannedBytes"`
	UsedBytes    int64 `json:"usedBytes"`
	VainBytes    int64 `json:"vainBytes"`
	Requests     int   `json:"requests" doc:"ranges that were asked for, before neighbours are joined"`
}

// wave is the plan of one image.
type wave struct {
	Ahead
	chunks map[digest.Digest][]span // by layer
}

// span is a run of chunks.
type span struct{ first, n int }

// fetchAhead plans by the profile and has the plan fetched before all that nobody waits for. What b has brought, or has not,
// is known by then.
func (l *Lazy) fetchAhead(ctx context.Context, img *image, p *prospect, b *boot) {
	defer func() { img.layouts = nil }() // they take memory
	f := <-p.profile
	if l.starts.isPlain(img.manifest, time.Now()) {
		return
	}
	if f.from == "" && ctx.Err() == nil {
		f = l.profileAtTarget(ctx, p)
	}
	if f.from == "" || ctx.Err() != nil {
		return
	}
	select {
	case l.plans <- struct{}{}:
		defer func() { <-l.plans }()
	case <-ctx.Done():
		return
	}
	began := time.Now()
	var w *wave
	var pieces []prefetch.Piece
	err := lazyfs.Guarded(func() (err error) {
		w, pieces, err = l.plan(img, f, b)
		return err
	})
	if err == nil {
		err = l.filler.Hot(ctx, pieces)
	}
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, prefetch.ErrClosed) {
			l.o.Log.Warn("what the start of an image reads is not fetched ahead", "image", img.name, "manifest", img.manifest, "error", err)
		}
		return
	}
	img.wave.Store(w)
	l.metrics.planned(w)
	l.o.Log.Debug("fetching ahead what the start of an image reads", "image", img.name, "from", w.From, "origin", w.Origin, "bytes", w.PlannedBytes, "ranges", w.Requests, "took", time.Since(began))
}

// plan turns a profile's files into chunks. Layers that it does not name, and those that are complete, need not be
// looked at.
func (l *Lazy) plan(img *image, f found, b *boot) (*wave, []prefetch.Piece, error) {
	named := make([]bool, len(img.layers))
	for _, i := range f.Items {
		if i.Layer >= 0 && i.Layer < len(named) {
			named[i.Layer] = true
		}
	}
	var contentBytes int64
	layers := make([]*profile.Layer, len(img.layers))
	open := make([]*openLayer, len(img.layers))
	for n, y := range img.layers {
		l.mu.Lock()
		open[n] = l.open[y.Digest]
		l.mu.Unlock()
		if open[n] == nil {
			continue
		}
		t, err := lazyfs.OpenTable(open[n].stored.Files().Table)
		if err != nil {
			return nil, nil, err
		}
		defer func() { _ = t.Close() }() // only mapped to read
		contentBytes += t.DataBytes()
		if !named[n] || open[n].Complete() {
			continue
		}
		if made := img.layouts[n]; made != nil {
			layers[n], err = layoutLayer(y.Digest, made, n, f.Items, t)
		} else {
			layers[n], err = profileLayer(y.Digest, open[n].stored.Files(), t)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	limits := profile.Limits{Has: func(layer, chunk int) bool { return open[layer].Has(chunk) }}
	if f.from == fromRegistry {
		limits.HotBytes = max(contentBytes/2, untrustedBytes)
	}
	w := &wave{
		Ahead:  Ahead{From: f.from, Origin: f.Origin, Version: profile.Version(f.Profile)},
		chunks: map[digest.Digest][]span{},
	}
	bundled := w.bundled(b, img, open)
	if limits.HotBytes > 0 {
		limits.HotBytes = max(limits.HotBytes-bundled, 1) // 0 is no limit
	}
	var pieces []prefetch.Piece
	for _, r := range profile.Plan(f.Profile, layers, limits) {
		d, bytes := img.layers[r.Layer].Digest, int64(0)
		for i := r.First; i < r.First+r.N; i++ {
			bytes += open[r.Layer].Chunk(i).Bytes
		}
		w.PlannedBytes += bytes
		pieces = append(pieces, prefetch.Piece{Digest: d, First: r.First, N: r.N})
		w.chunks[d] = append(w.chunks[d], span{r.First, r.N})
		w.Requests++
	}
	w.PlannedBytes += bundled
	return w, pieces, nil
}

// layoutLayer is profileLayer for the files alone that the items of layer n name.
func layoutLayer(d digest.Digest, made *lazyfs.Layout, n int, items []accel.ProfileItem, t *lazyfs.Table) (*profile.Layer, error) {
	seen := map[string]bool{}
	var entries []lazyfs.Entry
	for _, i := range items {
		if i.Layer != n || seen[i.Path] {
			continue
		}
		seen[i.Path] = true
		if e, ok := made.File(i.Path); ok {
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b lazyfs.Entry) int {
		return cmp.Or(cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.InnerOffset, b.InnerOffset))
	})
	return profile.NewLayer(d, func(do func(profile.TOCEntry) error) error {
		for _, e := range entries {
			if err := do(profile.TOCEntry(e)); err != nil {
				return err
			}
		}
		return nil
	}, t)
}

// bundled takes in what an image's bundle has brought, and gives its bytes.
func (w *wave) bundled(b *boot, img *image, open []*openLayer) (bytes int64) {
	if b == nil {
		return 0
	}
	w.Requests++
	for n, y := range img.layers {
		if open[n] == nil || len(w.chunks[y.Digest]) > 0 { // a layer may be in an image twice
			continue
		}
		for _, i := range b.chunks[y.Digest] {
			if open[n].Has(i) {
				bytes += open[n].Chunk(i).Bytes
				w.chunks[y.Digest] = append(w.chunks[y.Digest], span{i, 1})
			}
		}
	}
	return bytes
}

// profileLayer joins a layer's TOC with its table, which the caller keeps open.
func profileLayer(d digest.Digest, f cache.LayerFiles, t *lazyfs.Table) (*profile.Layer, error) {
	packed, err := os.ReadFile(f.TOC)
	if err != nil {
		return nil, fmt.Errorf("table of contents of layer %s: %w", d, err)
	}
	toc, err := unpackTOC(packed, nil)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", d, err)
	}
	return profile.NewLayer(d, func(do func(profile.TOCEntry) error) error {
		return lazyfs.EachEntry(toc, func(e lazyfs.Entry) error { return do(profile.TOCEntry(e)) })
	}, t)
}

// used compares the plan with what a start has read.
func (w *wave) used(bytes func(d digest.Digest, chunk int) int64, read func(d digest.Digest, chunk int) bool) Ahead {
	a := w.Ahead
	a.UsedBytes, a.VainBytes = 0, 0
	for d, spans := range w.chunks {
		for _, s := range spans {
			for i := s.first; i < s.first+s.n; i++ {
				if read(d, i) {
					a.UsedBytes += bytes(d, i)
				} else {
					a.VainBytes += bytes(d, i)
				}
			}
		}
	}
	return a
}

// AheadOf is what was fetched ahead of an image's start, since the node started; nil where that is nothing.
func (l *Lazy) AheadOf(manifest digest.Digest) *Ahead {
	img, known := l.starts.images.Get(manifest)
	if !known {
		return nil
	}
	w := img.wave.Load()
	if w == nil {
		return nil
	}
	a := w.Ahead
	return &a
}

// FetchAhead says whether anything is fetched ahead of an image's starts, which is so unless it was turned off; for
// comparisons. It counts for pulls that begin within PlainTime, lest one that is broken off leaves all later starts slow.
func (l *Lazy) FetchAhead(manifest digest.Digest, on bool) {
	l.starts.setPlain(manifest, on, time.Now())
}

func (s *starts) setPlain(manifest digest.Digest, on bool, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, until := range s.plain {
		if !now.Before(until) || len(s.plain) >= maxAnswers { // full: any one goes, it is a matter of minutes
			delete(s.plain, d)
		}
	}
	if delete(s.plain, manifest); !on {
		s.plain[manifest] = now.Add(PlainTime)
	}
}

func (s *starts) isPlain(manifest digest.Digest, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Before(s.plain[manifest])
}
