package lazy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"accel"
	"accel/lazyfs"
	"accel/profile"

	"github.com/opencontainers/go-digest"
)

// recording is one start whose reads are taken down.
type recording struct {
	img      *image
	began    time.Time
	recorder *profile.Recorder
	start    Start // without what is known at the end; starts.mu guards it and failed
	failed   bool  // the program did, or what it read was of no use for another reason

	mu     sync.Mutex
	layers map[digest.Digest]bool
	cut    map[digest.Digest]time.Time // layers that others read too, since when

	tables map[digest.Digest]*lazyfs.Table // of layers that are open; of the goroutine that records
	seen   map[digest.Digest][]uint64      // a bit for each chunk that the recorder knows
}

// cutOff ends the recording of a layer that somebody else is about to read.
func (r *recording) cutOff(d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, was := r.cut[d]; !was {
		r.cut[d] = time.Now()
	}
}

// until is when reads of a layer stop to count.
func (r *recording) until(d digest.Digest) (end time.Time, cut bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	end, cut = r.cut[d]
	return end, cut
}

func (r *recording) has(d digest.Digest, chunk int) bool {
	bits := r.seen[d]
	return chunk/64 < len(bits) && bits[chunk/64]&(1<<(chunk%64)) != 0
}

// record takes down what a start reads until it is over, and keeps and reports it.
func (l *Lazy) record(ctx context.Context, r *recording) {
	before := map[digest.Digest]counts{}
	for d := range r.layers {
		before[d] = l.counts(d)
	}
	var report profile.Report
	err := lazyfs.Guarded(func() error {
		defer r.closeTables()
		if err := l.watch(ctx, r); err != nil {
			return err
		}
		var err error
		report, err = l.reportOf(r)
		return err
	})
	done := r.start
	done.End, done.Took, done.Complete = report.End, report.Took, report.Complete
	files := map[string]bool{}
	for _, i := range report.Items {
		files[fmt.Sprint(i.Layer, i.Path)] = true
		done.Bytes += i.Bytes
	}
	done.Files = len(files)
	for d, was := range before {
		now := l.counts(d)
		done.Misses += max(0, now.misses-was.misses)
		done.MissBytes += max(0, now.missBytes-was.missBytes)
		done.DemandedBytes += max(0, now.demanded-was.demanded)
		done.Waited += max(0, now.waited-was.waited)
	}
	if w := r.img.wave.Load(); w != nil && err == nil {
		a := w.used(l.chunkBytes, r.has)
		done.Ahead = &a
		next := *w
		next.Ahead = a
		r.img.wave.Store(&next)
		l.metrics.ended(a)
	}
	l.starts.mu.Lock()
	if r.failed && err == nil {
		err = errFailed
	}
	l.starts.mu.Unlock()
	if err == nil && len(report.Items) > 0 {
		err = l.keepStart(report)
	}
	log := l.o.Log.With("image", done.Image, "container", done.Container)
	switch {
	case err == nil:
		log.Info("a start was recorded", "end", string(done.End), "complete", done.Complete, "files", done.Files, "bytes", done.Bytes, "misses", done.Misses)
	case errors.Is(err, errFailed):
		log.Info("a start failed, and what it read is not kept")
	default:
		log.Warn("the recording of a start is lost", "error", err)
	}
	if err != nil {
		done.Problem = err.Error()
	}
	l.metrics.recorded(done)
	l.starts.mu.Lock()
	r.start = done
	l.starts.mu.Unlock()
	l.starts.end(r)
}

// errFailed: somebody said that the start failed.
var errFailed = errors.New("the start failed")

// watch hands the holder's notes to the recorder until it says that the start is over.
func (l *Lazy) watch(ctx context.Context, r *recording) error {
	r.tables, r.seen = map[digest.Digest]*lazyfs.Table{}, map[digest.Digest][]uint64{}
	over := make(chan struct{})
	go func() {
		defer close(over)
		r.recorder.Wait(ctx)
	}()
	defer func() {
		r.recorder.Answered() // where it goes on still, something is wrong
		<-over
	}()
	tick := time.NewTicker(scanTime)
	defer tick.Stop()
	for {
		if err := l.scan(r); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-over:
			return l.scan(r)
		}
	}
}

// scan takes over what was read since the last time.
func (l *Lazy) scan(r *recording) error {
	for d := range r.layers {
		l.mu.Lock()
		y := l.open[d]
		l.mu.Unlock()
		if y == nil {
			continue
		}
		if r.tables[d] == nil {
			t, err := lazyfs.OpenTable(y.stored.Files().Table)
			if err != nil {
				return err
			}
			r.tables[d], r.seen[d] = t, make([]uint64, (t.Len()+63)/64)
		}
		t, bits := r.tables[d], r.seen[d]
		end, cut := r.until(d)
		for chunk, at := range y.Reads() {
			if chunk/64 >= len(bits) || r.has(d, chunk) || at.Before(r.began.Add(-clockGrain)) || cut && at.After(end) {
				continue
			}
			bits[chunk/64] |= 1 << (chunk % 64)
			r.recorder.Chunks(d, t, chunk, 1, at)
		}
	}
	return nil
}

// reportOf makes the report of a recording that is over. One at a time: a TOC takes memory.
func (l *Lazy) reportOf(r *recording) (profile.Report, error) {
	l.reporting.Lock()
	defer l.reporting.Unlock()
	layers := make([]*profile.Layer, len(r.img.layers))
	for n, y := range r.img.layers {
		l.mu.Lock()
		open := l.open[y.Digest]
		l.mu.Unlock()
		t := r.tables[y.Digest]
		if open == nil || t == nil || !anySet(r.seen[y.Digest]) {
			continue
		}
		var err error
		if layers[n], err = profileLayer(y.Digest, open.stored.Files(), t); err != nil {
			return profile.Report{}, err
		}
	}
	report := r.recorder.Report(layers)
	r.mu.Lock()
	report.Complete = report.Complete && len(r.cut) == 0 && l.allLazy(r)
	r.mu.Unlock()
	return report, nil
}

// allLazy reports whether nothing of a recording's layers is mounted otherwise than through a holder.
func (l *Lazy) allLazy(r *recording) bool {
	mounts, err := l.host.Mounts()
	for _, m := range mounts {
		if r.layers[m.Digest] && !m.Lazy {
			return false
		}
	}
	return err == nil
}

func anySet(bits []uint64) bool {
	for _, word := range bits {
		if word != 0 {
			return true
		}
	}
	return false
}

func (r *recording) closeTables() {
	for _, t := range r.tables {
		_ = t.Close() // only mapped to read
	}
}

// chunkBytes is a chunk's content; 0 where the layer is not open.
func (l *Lazy) chunkBytes(d digest.Digest, chunk int) int64 {
	l.mu.Lock()
	y := l.open[d]
	l.mu.Unlock()
	if y == nil {
		return 0
	}
	return y.Chunk(chunk).Bytes
}

// keepStart keeps a report here, and for the server where there is one.
func (l *Lazy) keepStart(r profile.Report) error {
	kept, err := l.profiles.add(r)
	if l.o.Server != nil {
		return errors.Join(err, l.reports.put(r))
	}
	l.starts.more(r.Manifest, kept < profile.MaxReportsOfNode)
	if errors.Is(err, accel.ErrInvalid) {
		return fmt.Errorf("the recording of %s: %w", r.Manifest, err)
	}
	return err
}
