package cache

import (
	"context"
	"time"
)

// setFetching notes whether f has a slot, and counts those that fetch for clients. s.mu is held.
func (s *Store) setFetching(f *fill, on bool) {
	f.fetching = on
	s.recount(f)
}

// setLow makes f give way to those that fetch for clients, or be one of them. s.mu is held.
func (s *Store) setLow(f *fill, low bool) {
	if f.low == low {
		return
	}
	f.low = low
	s.recount(f)
	s.wakeCalm() // it may be waiting itself
}

func (s *Store) recount(f *fill) {
	switch counts := f.fetching && !f.low; {
	case counts && !f.counted:
		s.demand++
	case !counts && f.counted:
		if s.demand--; s.demand == 0 {
			s.wakeCalm()
		}
	}
	f.counted = f.fetching && !f.low
}

func (s *Store) wakeCalm() {
	if s.calm != nil {
		close(s.calm)
		s.calm = nil
	}
}

// giveWay returns a channel to wait on while f has to wait for others.
func (s *Store) giveWay(f *fill) (<-chan struct{}, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !f.low || s.demand == 0 {
		return nil, false
	}
	if s.calm == nil {
		s.calm = make(chan struct{})
	}
	return s.calm, true
}

// yield waits while f is of low priority and others fetch for clients.
func (s *Store) yield(ctx context.Context, f *fill) error {
	for {
		calm, wait := s.giveWay(f)
		if !wait {
			return ctx.Err()
		}
		select {
		case <-calm:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// pause is yield with a stream open. closed: it waited so long that the stream is
// to be closed and another one opened later, unless that would bring all of it again.
func (s *Store) pause(ctx context.Context, f *fill) (closed bool, err error) {
	calm, wait := s.giveWay(f)
	if !wait {
		return false, ctx.Err()
	}
	s.mu.Lock()
	unranged := f.b.live.unranged
	s.mu.Unlock()
	if unranged {
		return false, s.yield(ctx, f)
	}
	limit := time.NewTimer(pauseTime)
	defer limit.Stop()
	for wait {
		select {
		case <-calm:
			calm, wait = s.giveWay(f)
		case <-limit.C:
			return true, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	return false, nil
}

// endIdle ends the fills that nobody waits for any more and that are not worth finishing.
func (s *Store) endIdle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.blobs {
		l := b.live
		if l == nil || l.readers > 0 || len(l.fills) == 0 || b.worthFinishing() || time.Since(l.idleSince) < s.idleGrace {
			continue
		}
		for _, f := range l.fills {
			if f.cancel != nil {
				f.idled = true
				f.cancel()
			}
		}
	}
}

func (b *blob) worthFinishing() bool {
	return b.size <= smallBytes || b.presentBytes()*2 >= b.size
}
