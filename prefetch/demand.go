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

func (w *waiter) lookAgain(err error) {
	select {
	case w.again <- err:
	default:
	}
}

// forgotten reports whether nobody brings something that w waits for.
func (w *waiter) forgotten() bool {
	for i := range w.need {
		if _, promised := w.l.promised[i]; !promised && !w.l.Content.Has(i) && w.l.owner(w.l.memberOf(i)) == nil {
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
	l.link.missed = began
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
		f.tellFailed(l, first, n, waited, err)
	}
	f.metrics.missed(result, waited)
	f.mu.Lock()
	delete(l.waiters, w)
	l.stats.Misses++
	l.stats.MissBytes += bytes
	l.stats.Waited += waited
	f.mu.Unlock()
	if l.OnDemand != nil {
		l.OnDemand(err)
	}
	f.giveBack(l)
}

// failedEvery is how often failed reads of a layer are told of: a program that reads on may fail a thousand times a
// second. The metric counts them all.
const failedEvery = time.Second

func (f *Filler) tellFailed(l *layer, first, n int, waited time.Duration, err error) {
	f.mu.Lock()
	now := time.Now()
	tell := now.Sub(l.toldFailed) >= failedEvery
	if tell {
		l.toldFailed = now
	}
	f.mu.Unlock()
	if tell {
		f.log.Warn("a read failed for want of its content", "layer", l.digest, "chunk", first, "chunks", n, "waited", waited, "err", err)
	}
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
				w.finish(err)
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
			w.finish(fmt.Errorf("%w: layer %s, a moment ago", ErrCorrupt, l.digest))
			return
		}
	}
	if l.unranged {
		f.ensureWhole(l)
		return
	}
	window := int64(leastWindowBytes)
	var s *sequence
	switch {
	case len(l.promised) > 0:
		window = 0 // a stream brings what else is wanted soon; nothing takes its link for a guess
	case first:
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
		if f.promisedTo(w, m) {
			continue
		}
		must := k + 1
		for must < len(members) && members[must] == m+must-k {
			must++
		}
		for _, m := range members[k:must] {
			l.withdraw(m)
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
