package boltstore

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"

	"accel/readiness"
)

// maxBatch bounds the updates of one commit, and so the time that a caller waits
// for the others'.
const maxBatch = 256

// call is one Update on its way.
type call struct {
	ctx   context.Context
	fn    func(readiness.Tx) error
	err   error
	alone bool          // it failed after it had written, so it must not share a transaction
	done  chan struct{} // closed when err is set
}

// errUnfinished stands where fn ended its goroutine instead of returning.
var errUnfinished = errors.New("update did not return")

// Update implements readiness.Store. The first caller that finds nobody committing leads: it
// runs all waiting updates in one transaction and commits them with one sync, while
// the next batch gathers. So a lone caller waits for nobody, and 64 of them share
// the cost. bbolt's own Batch has a fixed delay for lone callers instead.
func (s *Store) Update(ctx context.Context, fn func(readiness.Tx) error) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.busy.Done()
	c := &call{ctx: ctx, fn: fn, done: make(chan struct{})}
	s.mu.Lock()
	s.queue = append(s.queue, c)
	s.mu.Unlock()

	select {
	case <-c.done:
		return c.err
	case s.lead <- struct{}{}:
		s.leadUntil(c)
	case <-ctx.Done():
		if s.withdraw(c) {
			return ctx.Err()
		}
	}
	<-c.done
	return c.err
}

func (s *Store) leadUntil(c *call) {
	defer func() { <-s.lead }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	for {
		select {
		case <-c.done:
			return
		default:
			s.commit(s.take())
		}
	}
}

// take removes the next batch from the queue, the longest waiting first.
func (s *Store) take() []*call {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(len(s.queue), maxBatch)
	batch := s.queue[:n:n]
	s.queue = s.queue[n:]
	if len(s.queue) == 0 {
		s.queue = nil
	}
	return batch
}

// withdraw takes c out of the queue; false when it is being run already.
func (s *Store) withdraw(c *call) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, q := range s.queue {
		if q == c {
			s.queue = append(s.queue[:i:i], s.queue[i+1:]...)
			return true
		}
	}
	return false
}

// commit brings every call of the batch to its end. One that fails after it has
// written cannot be taken back by itself: the others are run again without it, and
// then it alone.
func (s *Store) commit(batch []*call) {
	defer func() {
		for _, c := range batch {
			close(c.done)
		}
	}()
	for _, c := range batch {
		c.err = errUnfinished
	}
	together := batch
	for len(together) > 0 {
		spoiler := s.attempt(together)
		if spoiler == nil {
			break
		}
		spoiler.alone = true
		rest := make([]*call, 0, len(together)-1)
		for _, c := range together {
			if c != spoiler {
				rest = append(rest, c)
			}
		}
		together = rest
	}
	for _, c := range batch {
		if c.alone {
			s.attempt([]*call{c})
		}
	}
}

// attempt runs the calls in one transaction and commits. It returns the call that
// spoiled the transaction, if any; then nothing was kept.
func (s *Store) attempt(calls []*call) (spoiler *call) {
	if err := s.failure(); err != nil {
		fail(calls, err)
		return nil
	}
	var bt *tx
	err := s.bolt("begin", func() error {
		b, err := s.db.Begin(true)
		bt = &tx{bt: b}
		return err
	})
	if err != nil {
		fail(calls, fmt.Errorf("write store %s: %w", s.path, err))
		return nil
	}
	committed := false
	defer func() {
		if !committed {
			// Of what commit has not ended itself; there it says that it is closed.
			_ = s.bolt("roll back", func() error { _ = bt.bt.Rollback(); return nil })
		}
	}()
	for _, c := range calls {
		before := bt.writes
		bt.ctx = c.ctx
		if c.err = c.ctx.Err(); c.err == nil {
			c.err = s.run(c.fn, bt)
		}
		if c.err != nil && bt.writes > before {
			return c
		}
	}
	if bt.writes == 0 {
		return nil // nothing to make durable
	}
	committed = true
	if err := s.bolt("commit", bt.bt.Commit); err != nil {
		if !noSpace(err) {
			// After a failed sync the kernel may forget what it could not write and
			// report the next one as good: only a new start knows what is on disk.
			s.setFailed(err)
		}
		fail(calls, fmt.Errorf("write store %s: %w", s.path, err))
	}
	return nil
}

// fail sets err for the calls that had succeeded so far.
func fail(calls []*call, err error) {
	for _, c := range calls {
		if c.err == nil || errors.Is(c.err, errUnfinished) {
			c.err = err
		}
	}
}

// run calls fn, whose panics are errors of its own update.
func (s *Store) run(fn func(readiness.Tx) error, t *tx) (err error) {
	defer s.guard(&err, "write")
	return fn(t)
}

// bolt runs a step of bbolt itself. A panic there may leave bbolt's locks held, so
// nothing is asked of it afterwards.
func (s *Store) bolt(doing string, step func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.damaged(doing, fmt.Errorf("panic: %v", p))
			s.setFailed(err)
		}
	}()
	return step()
}

func (s *Store) setFailed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = fmt.Errorf("store %s was given up after an error, start accel again: %w", s.path, err)
	}
}
