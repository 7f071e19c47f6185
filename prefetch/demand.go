package prefetch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

const (
	// splitBytes: a window that is larger is fetched over several connections, at most splitParts, since one
	// may be bound by its latency.
	splitBytes = 2 << 20
	splitParts = 4
	// maxWindowBytes are fetched ahead of a program that reads on and on. Linux' read-ahead doubles in the same way.
	maxWindowBytes = 16 << 20
	// spareConnections are not used for reading ahead.
	spareConnections = 2
	// leastOvertakeBytes: what is nearer than this in a flight is waited for, whatever was measured.
	leastOvertakeBytes = 256 << 10
	// overtakeFactor is how much later than by a request of its own a miss has to expect its bytes.
	overtakeFactor = 1.5
	// maxSequences of reading are told apart in one layer.
	maxSequences = 8

	// The pauses between attempts: for who waits, and for what nobody waits for.
	firstBackoff       = 100 * time.Millisecond
	longestWaitBackoff = 5 * time.Second
	longestBackoff     = time.Minute
)

// backoff is the pause after so many failures, with jitter.
func backoff(failures int, longest time.Duration) time.Duration {
	d := min(firstBackoff<<min(failures, 16), longest)
	return d - time.Duration(rand.Int64N(int64(d)/4))
}

// sequence is a program that reads members one after the other.
type sequence struct {
	last   int // member that it asked for
	end    int // to here it is fetched
	mark   int // when it asks for this, more is fetched
	window int64
	used   uint64 // Filler.touches then; 0: never
}

// waiter is one Fill. Filler.mu guards it.
type waiter struct {
	l     *layer
	need  map[int]struct{} // chunks
	done  chan struct{}    // closed at the end
	over  bool
	err   error
	again chan error // told where what was under way for it is not any more, and why
}

func (w *waiter) finish(err error) {
	if !w.over {
		w.over, w.err = true, err
		close(w.done)
	}
}

func (w *waiter) fail(err error) { w.finish(err) }

func (w *waiter) lookAgain(err error) {
	select {
	case w.again <- err:
	default:
	}
}

// forgotten reports whether nobody brings something that w waits for.
func (w *waiter) forgotten() bool {
	for i := range w.need {
		if !w.l.Content.Has(i) && w.l.owner(w.l.memberOf(i)) == nil {
			return true
		}
	}
	return false
}

// Fill returns when the chunks [first, first+n) of a layer are there. It waits for Run to begin. Errors beside the
// package's: what the Source said where another try is pointless, what Content.Put said, and ctx's cause.
func (f *Filler) Fill(ctx context.Context, d digest.Digest, first, n int) error {
	began := time.Now()
	select {
	case <-f.begun:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(f.o.Patience):
		return fmt.Errorf("%w: filling has not begun", ErrImpatient)
	}
	f.mu.Lock()
	l := f.layers[d]
	switch {
	case f.closed:
		f.mu.Unlock()
		return ErrClosed
	case l == nil:
		f.mu.Unlock()
		return fmt.Errorf("%w: layer %s is not being filled", accel.ErrNotFound, d)
	case first < 0 || n < 0 || first > l.n || n > l.n-first:
		f.mu.Unlock()
		return fmt.Errorf("%w: chunks %d to %d of layer %s, which has %d", accel.ErrInvalid, first, first+n, d, l.n)
	}
	w := &waiter{l: l, need: map[int]struct{}{}, done: make(chan struct{}), again: make(chan error, 1)}
	bytes := int64(0)
	for i := first; i < first+n; i++ {
		if !l.Content.Has(i) {
			w.need[i] = struct{}{}
			bytes += l.Content.Chunk(i).Bytes
		}
	}
	if len(w.need) == 0 {
		f.mu.Unlock()
		return nil
	}
	f.touches++
	l.touched = f.touches
	l.waiters[w] = struct{}{}
	l.users++
	f.mu.Unlock()
	err := f.await(ctx, w)
	f.missed(w, first, n, time.Since(began), bytes, err)
	return err
}

// missed takes the account of a miss.
func (f *Filler) missed(w *waiter, first, n int, waited time.Duration, bytes int64, err error) {
	l := w.l
	result := "ok"
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		result = "canceled"
	case err != nil:
		result = "error"
		f.log.Warn("a read failed for want of its content", "layer", l.digest, "chunk", first, "chunks", n, "waited", waited, "err", err)
	}
	f.metrics.missed(result, waited)
	f.mu.Lock()
	delete(l.waiters, w)
	l.stats.Misses++
	l.stats.MissBytes += bytes
	l.stats.Waited += waited
	if err != nil {
		l.stats.FailedMisses++
	}
	f.mu.Unlock()
	if l.OnDemand != nil {
		l.OnDemand(first, n, waited, bytes, err)
	}
	f.giveBack(l)
}

// await has what w needs fetched, again where that fails, until it is there or cannot be had.
func (f *Filler) await(ctx context.Context, w *waiter) error {
	patience := time.NewTimer(f.o.Patience)
	defer patience.Stop()
	pause := time.NewTimer(0)
	pause.Stop()
	defer pause.Stop()
	var last error
	failures := 0
	f.ensure(w, true)
	for {
		select {
		case <-w.done:
			return w.err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-f.ended:
			return ErrClosed
		case <-patience.C:
			if last == nil {
				return fmt.Errorf("%w: %s", ErrImpatient, f.o.Patience)
			}
			return fmt.Errorf("%w: %s, and at last %w", ErrImpatient, f.o.Patience, last)
		case <-pause.C:
			f.ensure(w, false)
		case err := <-w.again:
			if final(err) {
				return err
			}
			if err == nil {
				f.ensure(w, false)
				continue
			}
			last = err
			f.metrics.retries.Inc()
			f.mu.Lock()
			w.l.stats.Retries++
			f.mu.Unlock()
			d := max(backoff(failures, longestWaitBackoff), accel.RetryAfter(err))
			if failures == 0 && errors.Is(err, errStalled) {
				d = 0 // the wait was long enough
			}
			failures++
			pause.Reset(d)
		}
	}
}

// final reports whether another try is pointless. Refused credentials are none of these: they may be changing, and
// a read that fails ends a program.
func final(err error) bool {
	return accel.IsPermanent(err) || errors.Is(err, accel.ErrNotFound) || errors.Is(err, accel.ErrRegistryNotAllowed) || errors.Is(err, accel.ErrInvalid)
}

// arrived says that chunk i was put.
func (f *Filler) arrived(l *layer, i int, bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l.completed = false
	l.pending = append(l.pending, i)
	l.pendingBytes += bytes
	if l.pendingBytes >= persistBytes {
		kick(f.persisting)
	}
	for w := range l.waiters {
		if _, ok := w.need[i]; ok {
			if delete(w.need, i); len(w.need) == 0 {
				w.finish(nil)
			}
		}
	}
}

// failMember ends the wait for the missing chunks of m. f.mu is held.
func (f *Filler) failMember(l *layer, m int, err error) {
	for w := range l.waiters {
		for p, to := l.places(m); p < to; p++ {
			i := l.at(p)
			if _, ok := w.need[i]; ok && !l.Content.Has(i) {
				w.fail(err)
			}
		}
	}
}

// ensure has everything that w needs brought by some flight. The first time, what its program
// will want next is fetched too.
func (f *Filler) ensure(w *waiter, first bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := w.l
	if w.over || l.removed || f.closed {
		return // done or ended says so
	}
	members := w.members()
	if len(members) == 0 {
		w.finish(nil)
		return
	}
	now := time.Now()
	for _, m := range members {
		if now.Before(l.bad[m].until) {
			w.fail(fmt.Errorf("%w: layer %s, a moment ago", ErrCorrupt, l.digest))
			return
		}
	}
	if l.unranged {
		f.ensureWhole(l)
		return
	}
	window := int64(leastWindowBytes)
	var s *sequence
	if first {
		s = l.sequence(f.touches, members)
		window = s.window
	}
	for k, m := range members {
		if l.present(m) {
			continue
		}
		if fl := l.owner(m); fl != nil {
			f.join(l, fl, m)
			continue
		}
		must := k + 1
		for must < len(members) && members[must] == m+must-k {
			must++
		}
		end := f.cover(l, m, m+must-k, window)
		if k == 0 && s != nil {
			s.reach(m, end)
		}
	}
	if s != nil && s.last >= s.mark {
		if l.link.flying[demand] < f.o.DemandConnections-spareConnections {
			from := max(s.end, s.last)
			s.reach(from, f.cover(l, from, from, s.window))
		}
	}
}

// members that hold what is missing of w's chunks, in their order. Filler.mu is held.
func (w *waiter) members() []int {
	members := make([]int, 0, len(w.need))
	for i := range w.need {
		if w.l.Content.Has(i) {
			delete(w.need, i)
			continue
		}
		members = append(members, w.l.memberOf(i))
	}
	slices.Sort(members)
	return slices.Compact(members)
}

// sequence finds the program that reads these members, by where it was, and doubles its window where
// it has come far enough into what was fetched for it. Filler.mu is held.
func (l *layer) sequence(touches uint64, members []int) *sequence {
	m, last := members[0], members[len(members)-1]
	oldest := &l.reads[0]
	for i := range l.reads {
		s := &l.reads[i]
		if s.used > 0 && s.last <= m && m <= s.end {
			if s.used, s.last = touches, last; m >= s.mark {
				s.window = min(2*s.window, maxWindowBytes)
				l.cursor = max(s.end, m) // the background helps it
			}
			return s
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	*oldest = sequence{last: last, end: last + 1, mark: last + 1, window: l.link.window(), used: touches}
	return oldest
}

// reach notes that s was fetched for from one member to another.
func (s *sequence) reach(from, end int) {
	s.end = max(s.end, end)
	s.mark = max(from+(end-from)/2, s.last+1)
}

// ensureWhole starts the one flight of a layer whose registry knows no ranges. f.mu is held.
func (f *Filler) ensureWhole(l *layer) {
	for _, fl := range l.flights {
		if fl.whole {
			fl.hasten()
			return
		}
	}
	f.start(l, demand, 0, 0, l.members)
}

// cover starts flights for what is free from member `from` on, for as many of the blob's bytes as the window
// has, and at least to must. It returns where it ended. f.mu is held.
func (f *Filler) cover(l *layer, from, must int, window int64) (end int) {
	if from >= l.members {
		return l.members
	}
	base, _ := l.span(from)
	m := from
	for m < l.members {
		offset, _ := l.span(m)
		if m >= must && offset-base >= window {
			break
		}
		if !l.free(m) {
			m++
			continue
		}
		length := window - (offset - base)
		if must > m {
			_, reached := l.span(must - 1)
			length = max(length, reached-offset)
		}
		stop := l.run(m, l.members, length, l.link.bridge(), nil)
		f.split(l, m, must, stop)
		m = stop
	}
	return m
}

// split starts one flight or several over [from, end). f.mu is held.
func (f *Filler) split(l *layer, from, must, end int) {
	offset, _ := l.span(from)
	_, reached := l.span(end - 1)
	parts := min(max((reached-offset)/splitBytes, 1), splitParts)
	each := (reached - offset) / parts
	for from < end {
		stop := from + 1
		for ; stop < end; stop++ {
			if _, after := l.span(stop); parts > 1 && after-offset > each {
				break
			}
		}
		f.start(l, demand, from, min(max(must, from), stop), stop)
		// What the next part begins with may be there.
		for from = stop; from < end && !l.free(from); from++ {
		}
		if from < end {
			offset, _ = l.span(from)
		}
	}
}

// join waits for what fl brings, or overtakes it where a request of its own brings m earlier. f.mu is held.
func (f *Filler) join(l *layer, fl *flight, m int) {
	fl.hasten()
	if fl.whole || m < fl.must || m < fl.next || l.link.flying[demand] >= f.o.DemandConnections {
		return
	}
	latency, rate := l.link.estimate()
	offset, end := l.span(m)
	distance := end - fl.position
	if distance < leastOvertakeBytes {
		return
	}
	own := rate
	var wait time.Duration
	if fl.begun.IsZero() {
		wait = latency
		if !fl.requested.IsZero() {
			wait = max(0, latency-time.Since(fl.requested))
		}
	} else if since := time.Since(fl.begun); !fl.paced && fl.received >= leastSampleBytes && since > 0 {
		own = float64(fl.received) / since.Seconds()
	}
	wait += seconds(float64(distance) / own)
	if float64(wait) <= overtakeFactor*float64(latency+seconds(float64(end-offset)/rate)) {
		return
	}
	l.stats.Overtakes++
	f.metrics.overtakes.Inc()
	f.truncate(fl, m)
	if l.owner(m) == nil {
		f.cover(l, m, m+1, l.link.window())
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
