package cache

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"sync"
	"time"
)

const (
	// maxFills bounds the fills that fetch at a time, and with stepBytes their
	// memory (16 MiB); maxLowFills those at low priority.
	maxFills    = 64
	maxLowFills = 4
	// maxBlobFills bounds the fills of one blob.
	maxBlobFills = 8
	// stepBytes are written and shown to readers at a time, or less when they took
	// longer than stepTime to come. A reader is woken for each.
	stepBytes = 256 << 10
	stepTime  = 20 * time.Millisecond
	// jumpBytes is how far ahead of a fill a reader waits for it; one that wants more
	// distant parts gets a fill of its own.
	jumpBytes = 8 << 20
	// skipParts are read over in a stream; to pass more, another one is opened.
	skipParts = 4
	// smallBytes and half of the size are what a fill that nobody waits for is finished for.
	smallBytes = 16 << 20
	// idleGrace is how long another one goes on.
	idleGrace = 10 * time.Second
	// pauseTime is how long a stream is held open while its fill waits for others.
	pauseTime = 5 * time.Second
)

// fill is one goroutine that brings a run of a blob's parts.
type fill struct {
	b       *blob
	fetcher Fetcher
	by      *Reader // who began it

	// Guarded by Store.mu:
	first, next, end int64 // parts: begun with; being written or to be written next; where it ends
	writing          bool
	shown            int64 // of the part next, up to here it is in the file
	peer             bool
	low              bool
	fetching         bool // has a slot
	counted          bool // in Store.demand
	reserved         int64
	idled            bool // ended because nobody waited for it
	done             bool
	err              error
	cancel           context.CancelFunc // nil until it runs

	saved hash.Hash // the blob's hash at the start of part next; only where that part is fed to it
}

var buffers = sync.Pool{New: func() any { b := make([]byte, stepBytes); return &b }}

// localError is a failure of ours, not of the source: readers are served without
// caching.
type localError struct{ error }

func (e localError) Unwrap() error { return e.error }

// startFill begins to bring the parts of r's blob from first to end, as far as they are
// missing and no other fill is at them. s.mu is held.
func (s *Store) startFill(r *Reader, first, end int64) (*fill, error) {
	b := r.b
	if s.ended {
		return nil, ErrClosed
	}
	run := first
	for run < end && !b.has(run) && b.owner(run) == nil {
		run++
	}
	l := b.alive()
	if l.unranged { // all of it comes anyway
		first, run = b.firstMissing(0), partsOf(b.size)
	}
	fl := &fill{b: b, fetcher: r.fetcher, by: r, first: first, next: first, end: run, low: r.low}
	l.fills = append(l.fills, fl)
	s.fills.Add(1)
	if s.run == nil {
		s.early = append(s.early, fl)
	} else {
		go s.fill(fl)
	}
	return fl, nil
}

// fill is the goroutine of one fill.
func (s *Store) fill(f *fill) {
	ctx, cancel := context.WithCancel(s.run)
	defer cancel()
	s.mu.Lock()
	f.cancel = cancel
	s.mu.Unlock()
	err := f.b.openFile(s, f)
	if err == nil {
		err = s.fetchRun(ctx, f)
	}
	if err == nil {
		err = s.verify(ctx, f.b)
	}
	if err != nil && s.run.Err() != nil {
		err = fmt.Errorf("%w: the store is shutting down", ErrClosed)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropFill(f, err)
}

// dropFill ends f; s.mu is held.
func (s *Store) dropFill(f *fill, err error) {
	b := f.b
	if f.writing {
		s.tear(f)
	}
	f.done, f.err = true, err
	s.setFetching(f, false)
	s.unreserve(f, f.reserved)
	l := b.live
	for i, other := range l.fills {
		if other == f {
			l.fills = append(l.fills[:i], l.fills[i+1:]...)
			break
		}
	}
	if b.gone == nil && l.file != nil {
		s.markDirty(b) // for what the file system says that it takes
	}
	b.wake()
	s.release(b)
	s.fills.Done()
	s.m.fillEnded(f)
}

// tear notes how far the part was shown that f did not finish.
func (s *Store) tear(f *fill) {
	l, start := f.b.live, f.next*partBytes
	f.writing = false
	if f.shown > start {
		if l.torn == nil {
			l.torn = map[int64]int64{}
		}
		l.torn[f.next] = max(l.torn[f.next], f.shown)
	}
	if l.hashed > start && l.hashed < f.b.partEnd(f.next) {
		if f.saved == nil {
			l.hash, l.hashed = nil, 0
		} else {
			l.hash, l.hashed = f.saved, start
		}
	}
}

// release forgets what nobody needs any more of b; s.mu is held.
func (s *Store) release(b *blob) {
	l := b.live
	if l == nil || l.readers > 0 || len(l.fills) > 0 || l.verifying {
		return
	}
	if b.gone == nil && !b.complete && b.missing == partsOf(b.size) {
		s.forget(b) // nothing of it came
	}
	if !l.dirty && !l.syncing {
		if l.file != nil {
			l.file.Close()
		}
		b.live = nil
	}
}

// fetchRun brings f's run, by one stream or, where one ends early but got on, several.
func (s *Store) fetchRun(ctx context.Context, f *fill) error {
	for {
		if err := s.yield(ctx, f); err != nil {
			return err
		}
		slot, err := s.takeSlot(ctx, f)
		if err != nil {
			return err
		}
		before, more, err := s.plan(f)
		if err == nil && more > 0 {
			err = s.fetchOnce(ctx, f, before, more)
		}
		<-slot
		s.mu.Lock()
		s.setFetching(f, false)
		got, end := f.next-before, f.next >= f.end
		s.mu.Unlock()
		var local localError
		switch {
		case err == nil && (end || more == 0):
			return nil
		case err == nil:
		case ctx.Err() != nil || got <= 0 || errors.As(err, &local) || errors.Is(err, ErrDigest):
			return err
		default:
			s.o.Log.Debug("a fetch ended early and is continued", "blob", f.b.digest, "part", before+got, "err", err)
		}
	}
}

// takeSlot waits for the right to fetch and returns where to give it back.
func (s *Store) takeSlot(ctx context.Context, f *fill) (chan struct{}, error) {
	s.mu.Lock()
	slots := s.slots
	if f.low {
		slots = s.lowSlots
	}
	s.mu.Unlock()
	select {
	case slots <- struct{}{}:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.setFetching(f, true)
		return slots, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// plan moves f to the next part that it has to bring and reserves room for what it
// will bring in one go: from that part, and how many bytes.
func (s *Store) plan(f *fill) (part, length int64, err error) {
	s.mu.Lock()
	b := f.b
	if b.gone != nil {
		defer s.mu.Unlock()
		return 0, 0, b.gone
	}
	for f.next < f.end && b.has(f.next) {
		f.next++
	}
	need := int64(0)
	stop := f.next
	for p := f.next; p < f.end; p++ {
		if !b.has(p) {
			need += b.partEnd(p) - p*partBytes
			stop = p + 1
		}
	}
	length = 0
	if stop > f.next {
		length = b.partEnd(stop-1) - f.next*partBytes
	}
	part = f.next
	need -= f.reserved
	s.mu.Unlock()
	if length > 0 && need > 0 {
		err = s.reserve(f, need)
	}
	return part, length, err
}

// markDirty has the next commit write b's row; s.mu is held.
func (s *Store) markDirty(b *blob) {
	b.alive().dirty = true
	s.dirty[b] = struct{}{}
}

func (s *Store) kickCommit() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}
