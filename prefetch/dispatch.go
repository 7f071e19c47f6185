package prefetch

import (
	"cmp"
	"context"
	"slices"
	"time"
)

const (
	// A background request is a part of what is left on its host, so that all connections end at about the same
	// time, within these bounds.
	leastBackgroundBytes = 1 << 20
	mostBackgroundBytes  = 16 << 20
	backgroundParts      = 8
	// While a program is active, a request is not more than comes in activeRequestTime, and the least of them: what has been sent
	// cannot be taken back, and the next miss waits behind it.
	activeRequestTime       = 100 * time.Millisecond
	leastActiveRequestBytes = 128 << 10
	// idleTime: after it, it is looked whether Content has lost chunks.
	idleTime = 30 * time.Second
)

// dispatch starts flights for what nobody waits for, as connections become free.
func (f *Filler) dispatch(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.dispatching:
		case <-timer.C:
		}
		timer.Reset(f.launch(time.Now()))
	}
}

// launch starts what may start, and says when to look again.
func (f *Filler) launch(now time.Time) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	wait := idleTime
	for _, l := range f.list {
		if pause := l.pausedUntil.Sub(now); pause > 0 && l.Content.Left() > 0 {
			wait = min(wait, pause)
		}
	}
	for _, l := range f.list {
		if l.link.spares(now) < f.o.BackgroundConnections {
			wait = min(wait, activeTime) // more connections then
		}
	}
	for _, k := range f.links {
		f.launchHot(&k.hot, now)
	}
	if f.o.BackgroundBytesPerSecond >= 0 {
		for f.launchBackground(now) {
		}
	}
	return wait
}

// launchBackground starts one flight, where programs read if they do: the last miss's layer first, else the one
// that was added first. f.mu is held.
func (f *Filler) launchBackground(now time.Time) bool {
	order := slices.Clone(f.list)
	slices.SortStableFunc(order, func(a, b *layer) int { return cmp.Compare(b.touched, a.touched) })
	for _, l := range order {
		if l.Held || now.Before(l.pausedUntil) || l.Content.Left() == 0 || l.unranged && len(l.flights) > 0 {
			continue
		}
		if l.link.flying[background] >= min(l.link.spares(now), f.o.BackgroundConnections) {
			continue
		}
		m := l.nextFree(now)
		if m < 0 {
			continue
		}
		end := l.run(m, l.members, f.backgroundBytes(l.link, now), l.link.bridge(), func(m int) bool { return l.quiet(m, now) })
		l.cursor = end
		f.start(l, background, m, m, end)
		return true
	}
	return false
}

// nextFree is the first free member from the cursor on, and around; -1: none. Filler.mu is held.
func (l *layer) nextFree(now time.Time) int {
	for k := range l.members {
		m := l.cursor + k
		if m >= l.members {
			m -= l.members
		}
		if m < l.members && l.free(m) && !l.quiet(m, now) {
			return m
		}
	}
	return -1
}

// backgroundBytes is the size of the next request on a link. f.mu is held.
func (f *Filler) backgroundBytes(k *link, now time.Time) int64 {
	left := int64(0)
	for _, l := range f.list {
		if l.link != k || l.n == 0 {
			continue
		}
		first, _ := l.span(0)
		_, end := l.span(l.members - 1)
		left += int64(float64(end-first) * float64(l.Content.Left()) / float64(l.n))
	}
	most := int64(mostBackgroundBytes)
	if k.active(now) && k.capacity > 0 {
		most = min(most, max(int64(k.capacity*activeRequestTime.Seconds()), leastActiveRequestBytes))
	}
	return min(max(left/backgroundParts, leastBackgroundBytes), most)
}
