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
			s.trim()
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
// spoiled the transaction, if any; then nothing was kept. A call's err is set only
// when its fate is sealed.
func (s *Store) attempt(calls []*call) (spoiler *call) {
	bt, err := s.begin(true)
	if err != nil {
		seal(calls, nil, err)
		return nil
	}
	committing := false
	defer func() {
		if !committing {
			_ = s.bolt("roll back", bt.Rollback) // a panic there is kept as s.failed
		}
	}()
	t := &tx{bt: bt}
	results := make([]error, len(calls))
	for i, c := range calls {
		before := t.writes
		t.ctx = c.ctx
		if results[i] = c.ctx.Err(); results[i] == nil {
			results[i] = s.run(c.fn, t)
		}
		if results[i] != nil && t.writes > before {
			c.err = results[i]
			return c
		}
	}
	if t.writes == 0 {
		seal(calls, results, nil) // nothing to make durable
		return nil
	}
	committing = true
	err = s.bolt("commit", bt.Commit) // rolls back by itself
	if err != nil {
		if !noSpace(err) {
			// After a failed sync the kernel may forget what it could not write and
			// report the next one as good: only a new start knows what is on disk.
			s.giveUp(err, false)
		}
		err = fmt.Errorf("write store %s: %w", s.path, err)
	}
	seal(calls, results, err)
	return nil
}

// seal sets the calls' errors: their own, else the transaction's.
func seal(calls []*call, results []error, err error) {
	for i, c := range calls {
		if c.err = err; results != nil && results[i] != nil {
			c.err = results[i]
		}
	}
}

// run calls fn, whose panics are errors of its own update.
func (s *Store) run(fn func(readiness.Tx) error, t *tx) (err error) {
	defer s.guard(&err, "write")
	return fn(t)
}
