package prefetch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"accel"
)

var (
	errRemoved  = errors.New("the layer was removed")
	errStalled  = errors.New("the registry sent nothing for too long")
	errNoRoom   = errors.New("no room in the store")
	errReplaced = errors.New("the layer is fetched as a whole now")
)

// localError is a failure of ours, not of the source.
type localError struct{ error }

func (e localError) Unwrap() error { return e.error }

// flight is one goroutine that brings the members [first, end) of a layer, as far as they are missing.
type flight struct {
	l        *layer
	kind     kind
	must     int  // members before it are waited for by who began the flight; first: none is
	whole    bool // it reads the blob from its beginning, and without a range
	cancel   context.CancelCauseFunc
	hurry    chan struct{}  // closed when somebody waits for what it brings: it does not hold back any more
	inflight sync.WaitGroup // goroutines that inflate its batches

	// Guarded by Filler.mu:
	first, next, end int   // members: begun with; to be read next; where it ends, which overtaking moves
	until            int   // where it was to end
	hotBytes         int64 // counted in link.hotBytes
	needed           bool
	requested        time.Time // the current request
	begun            time.Time // its first byte; zero: not yet
	position         int64     // of the blob, read
	received         int64     // since begun
	paced            bool      // it held back: its rate is none of the link's
	batches          []*batch  // that are read or inflated
	release          func()    // of what was reserved; nil: nothing
}

// owns reports whether fl will bring m.
func (fl *flight) owns(m int) bool {
	if fl.next <= m && m < fl.end {
		return true
	}
	for _, b := range fl.batches {
		if b.at <= m && m < b.end {
			return true
		}
	}
	return false
}

// start begins a flight over [first, end), of which first is free. Filler.mu is held.
func (f *Filler) start(l *layer, k kind, first, must, end int) *flight {
	if l.unranged {
		first, end = 0, l.members
	}
	ctx, cancel := context.WithCancelCause(f.running)
	fl := &flight{
		l: l, kind: k, must: must, whole: l.unranged, cancel: cancel, hurry: make(chan struct{}),
		first: first, next: first, end: end, until: end,
	}
	fl.position, _ = l.span(first)
	if k == hot {
		_, reached := l.span(end - 1)
		fl.hotBytes = reached - fl.position
		l.link.hotBytes += fl.hotBytes
	}
	if k == demand {
		fl.hasten()
		l.link.foretold = false
	}
	l.flights = append(l.flights, fl)
	l.link.flying[k]++
	f.flights.Add(1)
	go func() {
		defer f.flights.Done()
		err := f.fly(ctx, fl)
		fl.inflight.Wait()
		if cause := context.Cause(ctx); cause != nil {
			err = cause // also where all was read: what failed may be its last batch
		}
		f.land(fl, err)
		cancel(nil)
	}()
	return fl
}

// hasten says that somebody waits for what fl brings. Filler.mu is held.
func (fl *flight) hasten() {
	if !fl.needed {
		fl.needed = true
		close(fl.hurry)
	}
}

// land ends a flight: who waits for what it did not bring looks again.
func (f *Filler) land(fl *flight, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := fl.l
	for i, other := range l.flights {
		if other == fl {
			l.flights = append(l.flights[:i], l.flights[i+1:]...)
			break
		}
	}
	l.link.flying[fl.kind]--
	l.link.hotBytes -= fl.hotBytes
	l.idle.Broadcast()
	if fl.release != nil {
		l.releases = append(l.releases, fl.release)
	}
	if len(l.flights) == 0 && l.Content.Left() == 0 {
		kick(f.persisting)
	}
	kick(f.dispatching)
	if errors.Is(err, errReplaced) {
		err = nil
	}
	f.judge(l, fl, err)
	if fl.kind == hot {
		l.link.arrived = time.Now()
		l.link.hot.want(l, fl.first, fl.until)
	}
	for w := range l.waiters {
		if w.forgotten() {
			w.lookAgain(err)
		}
	}
}

// judge draws the conclusions for what nobody waits for. Filler.mu is held.
func (f *Filler) judge(l *layer, fl *flight, err error) {
	if err == nil {
		if fl.kind != demand {
			l.failures = 0
		}
		return
	}
	if l.removed || f.running.Err() != nil {
		return
	}
	if errors.Is(err, errStalled) {
		f.metrics.stalls.Inc()
		l.link.stalls++
	}
	pause := max(backoff(l.failures, longestBackoff), accel.RetryAfter(err))
	l.failures++
	l.pausedUntil = time.Now().Add(pause)
	if fl.kind == demand {
		return // who waits says so
	}
	f.metrics.retries.Inc()
	log := f.log.Debug
	if l.failures == 4 {
		log = f.log.Warn // once, when it does not mend itself
	}
	log("content could not be fetched and will be tried again", "layer", l.digest, "kind", fl.kind.String(), "after", pause, "err", err)
}

// fly brings what fl is for.
func (f *Filler) fly(ctx context.Context, fl *flight) error {
	to := fl.until
	if fl.must > fl.first {
		to = fl.must // to look for all of the window would keep waiting who waits
	}
	if err := f.makeRoom(fl); err != nil { // for what is copied too
		return err
	}
	f.copyTwins(ctx, fl, to)
	f.mu.Lock()
	satisfied := fl.must > fl.first && !fl.whole
	for m := fl.first; satisfied && m < fl.must; m++ {
		satisfied = fl.l.present(m)
	}
	if satisfied {
		fl.end = fl.next // no window, for which nobody asked
	}
	f.mu.Unlock()
	if satisfied {
		return nil
	}
	if fl.kind == demand {
		select {
		case fl.l.link.slots <- struct{}{}:
			defer func() { <-fl.l.link.slots }()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for {
		from, to, err := f.nextRequest(fl)
		if err != nil || from == to {
			return err
		}
		if err := f.request(ctx, fl, from, to); err != nil {
			return err
		}
	}
}

// makeRoom reserves what fl will write; what it reserved before goes when that is persisted. Where there is no room, what somebody waits for is tried nevertheless.
func (f *Filler) makeRoom(fl *flight) error {
	l := fl.l
	if l.Reserve == nil {
		return nil
	}
	f.mu.Lock()
	bytes := l.missingBytes(fl.next, fl.end)
	f.mu.Unlock()
	if bytes == 0 {
		return nil
	}
	release, err := l.Reserve(bytes)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		if fl.release != nil {
			l.releases = append(l.releases, fl.release)
		}
		fl.release = release
		return nil
	}
	if !fl.needed || fl.kind == demand && fl.must == fl.first {
		return fmt.Errorf("%w: %w", errNoRoom, err)
	}
	if fl.kind == demand && !fl.whole {
		f.truncate(fl, fl.must)
	}
	return nil
}

// truncate has fl end before m; who waits for more looks again. Filler.mu is held.
func (f *Filler) truncate(fl *flight, m int) {
	if m >= fl.end {
		return
	}
	fl.end = max(m, fl.next)
	for w := range fl.l.waiters {
		w.lookAgain(nil)
	}
	kick(f.dispatching)
}
