package prefetch

import (
	"context"
	"errors"
	"slices"
	"time"

	"accel"
)

const (
	// persistTime and persistBytes are how much may be put until it is synced and marked in the index.
	// What a crash finds unmarked is fetched again.
	persistTime  = time.Second
	persistBytes = 16 << 20
)

// persistAll persists until ctx ends.
func (f *Filler) persistAll(ctx context.Context) {
	ticker := time.NewTicker(persistTime)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.persisting:
		case <-ticker.C:
		}
		f.persistRound(false)
	}
}

// persistRound persists what was put of each layer; the last time without regard to failures before.
func (f *Filler) persistRound(last bool) {
	f.mu.Lock()
	layers := slices.Clone(f.list)
	f.mu.Unlock()
	for _, l := range layers {
		f.mu.Lock()
		skip := l.removed || !last && time.Now().Before(l.persistAfter)
		if !skip {
			l.users++
		}
		f.mu.Unlock()
		if skip {
			continue
		}
		complete := f.persist(l, last)
		f.mu.Lock()
		complete = complete && !l.removed
		l.leave()
		f.mu.Unlock()
		if complete && l.Completed != nil {
			l.Completed()
		}
	}
}

// persist syncs what was put of l and marks it. It reports whether l has become complete; the last time it gives back
// reservations whatever happens. One goroutine at a time.
func (f *Filler) persist(l *layer, last bool) (completed bool) {
	f.mu.Lock()
	pending, releases := l.pending, l.releases
	l.pending, l.releases, l.pendingBytes = nil, nil, 0
	f.mu.Unlock()
	// A Sync that failed took chunks back; only what is there before the next one is durable after it.
	pending = slices.DeleteFunc(pending, func(i int) bool { return !l.Content.Has(i) })
	var err error
	if len(pending) > 0 {
		slices.Sort(pending)
		pending = slices.Compact(pending)
		if err = l.Content.Sync(); err == nil && l.Persist != nil {
			err = l.Persist(pending)
		}
	}
	again := err != nil && !errors.Is(err, accel.ErrNotFound)
	if err != nil {
		f.log.Warn("filled content could not be made durable", "layer", l.digest, "chunks", len(pending), "again", again, "err", err)
	}
	if !again || last {
		for _, release := range releases {
			release()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		if again {
			l.pending = append(pending, l.pending...)
			if !last {
				l.releases = append(releases, l.releases...)
			}
		}
		l.persistAfter = time.Now().Add(persistTime)
		return false
	}
	// All Puts are made by flights and streams, so that with none there is nothing between Put and pending.
	if l.completed || len(l.flights) > 0 || l.putting > 0 || len(l.pending) > 0 || l.Content.Left() > 0 {
		return false
	}
	l.completed = true
	return true
}
