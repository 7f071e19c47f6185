package readiness

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Work is a claimed record with its lease. Record.ID and Record.Lease are the ticket.
type Work struct{ accel.Record }

const (
	// claimSteps bounds the transaction of one claim: expired records that are given
	// up on the way count too.
	claimSteps = 64
	// maxRetryAfter bounds what a registry may ask us to wait.
	maxRetryAfter = 24 * time.Hour
	// maxEnvelopeBytes bounds one signed mapping: 5,000 layers of 200 bytes.
	maxEnvelopeBytes = 1 << 20
)

// Claim waits until a record is due, and leases it, the longest due first. It returns ctx.Err() when ctx ends.
// A record whose lease has run out is due again, and the attempt counts; after
// MaxAttempts such a record is Failed for good instead.
func (t *Tracker) Claim(ctx context.Context) (Work, error) {
	var w Work
	err := t.await(ctx, t.claiming, topicWork, WorkQueue, func(c *change) (ok bool, err error) {
		w, ok, err = c.claim()
		return ok, err
	})
	if err != nil {
		return Work{}, err
	}
	return w, nil
}

// await blocks until a record of the queue is due and take has taken one. It looks
// without writing first, since a transaction that finds nothing may cost a sync.
func (t *Tracker) await(ctx context.Context, turn chan struct{}, topic string, q Queue, take func(*change) (bool, error)) error {
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		news, stop := t.hub.listen(topic)
		wait, err := t.untilDue(ctx, q)
		if err == nil && wait > 0 {
			err = sleep(ctx, news, wait)
			stop()
			if err != nil {
				return err
			}
			continue
		}
		stop()
		if err != nil {
			return err
		}
		var ok bool
		err = t.update(ctx, func(c *change) (err error) {
			ok, err = take(c)
			return err
		})
		if ok || err != nil {
			return err
		}
	}
}

func (t *Tracker) untilDue(ctx context.Context, q Queue) (time.Duration, error) {
	wait := relook
	err := t.store.View(ctx, func(tx Tx) error {
		e, err := tx.Next(q)
		if errors.Is(err, accel.ErrNotFound) {
			return nil
		}
		wait = e.DueAt.Sub(stamp(t.o.Now()))
		return err
	})
	return wait, err
}

// due returns the record of the queue that has been due for longest.
func (c *change) due(q Queue) (Entry, bool, error) {
	e, err := c.Next(q)
	if errors.Is(err, accel.ErrNotFound) {
		return Entry{}, false, nil
	}
	return e, err == nil && !e.DueAt.After(c.now), err
}

func (c *change) claim() (Work, bool, error) {
	for range claimSteps {
		e, ok, err := c.due(WorkQueue)
		if !ok || err != nil {
			return Work{}, false, err
		}
		if e.State == accel.Converting {
			if e.Attempts >= c.o.MaxAttempts {
				reason := fmt.Sprintf("given up after %d attempts: the last lease ran out, its worker gave no answer", e.Attempts)
				if err := c.giveUp(e, reason); err != nil {
					return Work{}, false, err
				}
				continue
			}
			if err := c.move(&e, accel.Pending, "the lease ran out"); err != nil {
				return Work{}, false, err
			}
		}
		if e.Params != c.o.Params && e.Digest != "" {
			if err := c.rekey(e); err != nil {
				return Work{}, false, err
			}
			continue
		}
		if err := c.move(&e, accel.Converting, ""); err != nil {
			return Work{}, false, err
		}
		return Work{e.Record}, true, c.put(e)
	}
	return Work{}, false, nil
}

func (c *change) giveUp(e Entry, reason string) error {
	again := e.Again
	if err := c.move(&e, accel.Failed, reason); err != nil {
		return err
	}
	if again {
		e.Again = false
		if err := c.want(&e, false, c.now); err != nil {
			return err
		}
	}
	return c.put(e)
}

// rekey hands an unfinished record over to the one for the parameters in use now.
func (c *change) rekey(e Entry) error {
	id := recordID(e.Repository, e.Digest.String(), c.o.Params)
	n, known, err := c.find(id)
	if err != nil {
		return err
	}
	if known {
		err = c.want(&n, e.Asked, c.now)
	} else {
		n, err = c.create(accel.Record{ID: id, Repository: e.Repository, Digest: e.Digest, MediaType: e.MediaType, Origin: e.Origin, Tags: e.Tags})
		if err == nil {
			n.CreatedAt = e.CreatedAt
			err = c.move(&n, accel.Pending, "the conversion parameters changed")
		}
	}
	if err != nil {
		return err
	}
	n.Asked = n.Asked || e.Asked
	for _, tag := range e.Tags {
		p, err := pointer(c.Tx, e.Repository, tag)
		if err != nil {
			return err
		}
		if p.ID != e.ID {
			continue
		}
		p.ID = "" // so that point does not supersede what is about to be removed
		if err := c.PutTag(e.Repository, tag, p); err != nil {
			return err
		}
		if err := c.point(&n, tag, p.At, p.Observed); err != nil {
			return err
		}
	}
	e.Tags = nil
	if err := c.remove(&e, "the conversion parameters changed", &n); err != nil {
		return err
	}
	return c.put(n)
}

// held returns the record that w is a lease of.
func (c *change) held(w Work) (Entry, error) {
	e, ok, err := c.find(w.ID)
	if err != nil {
		return Entry{}, err
	}
	if !ok || e.State != accel.Converting || e.Lease == 0 || e.Lease != w.Lease {
		return Entry{}, fmt.Errorf("%w: record %s of %s", accel.ErrLeaseLost, w.ID, w.Image())
	}
	return e, nil
}

// withHeld runs fn on the record that w is a lease of, and puts it.
func (t *Tracker) withHeld(ctx context.Context, w Work, fn func(*change, *Entry) error) error {
	return t.update(ctx, func(c *change) error {
		e, err := c.held(w)
		if err != nil {
			return err
		}
		if err := fn(c, &e); err != nil {
			return err
		}
		return c.put(e)
	})
}

// Renew extends the lease. ErrLeaseLost when another holds the record now, or when it was superseded or deleted.
func (t *Tracker) Renew(ctx context.Context, w Work) error {
	return t.withHeld(ctx, w, func(c *change, e *Entry) error {
		e.DueAt = c.now.Add(c.o.LeaseTime)
		return nil
	})
}

// Defer gives a claimed record back as Pending, due after d, without counting an attempt.
// ErrLeaseLost as with Renew.
func (t *Tracker) Defer(ctx context.Context, w Work, d time.Duration, reason string) error {
	return t.withHeld(ctx, w, func(c *change, e *Entry) error {
		if err := c.move(e, accel.Pending, reason); err != nil {
			return err
		}
		e.Attempts = max(0, e.Attempts-1)
		if e.MediaType == "" && len(w.MediaType) <= maxNameBytes {
			e.MediaType = w.MediaType // the worker may have learnt it
		}
		if !e.Again {
			e.DueAt = c.now.Add(max(0, d))
		}
		e.Again = false
		return nil
	})
}

// Finish makes the record Ready. mappings are the signed envelopes (DSSE JSON) by source platform manifest digest.
// ErrLeaseLost as with Renew. The record falls due for a check at once when it gained a tag since it was claimed, or has
// more tags than target has, so that no target tag is left out.
func (t *Tracker) Finish(ctx context.Context, w Work, target accel.Target, res accel.Result, mappings map[digest.Digest][]byte) error {
	if target.Repository == "" || target.Digest.Validate() != nil {
		return fmt.Errorf("%w: finish %s: target %s@%s", accel.ErrInvalid, w.Image(), target.Repository, target.Digest)
	}
	for m, env := range mappings {
		if m.Validate() != nil || len(env) > maxEnvelopeBytes {
			return fmt.Errorf("%w: finish %s: mapping of %q with %d bytes", accel.ErrInvalid, w.Image(), m, len(env))
		}
	}
	return t.withHeld(ctx, w, func(c *change, e *Entry) error {
		if e.Digest == "" {
			return fmt.Errorf("%w: record %s of %s has no digest; resolve it first", accel.ErrConflict, e.ID, e.Image())
		}
		if err := c.move(e, accel.Ready, ""); err != nil {
			return err
		}
		target.Tags = sorted(target.Tags)
		e.Target, e.Result, e.CheckedAt = target, res, c.now
		if len(e.Tags) > len(target.Tags) || gained(w.Tags, e.Tags) {
			e.DueAt = c.now
		}
		if err := c.MoveMappings(e.ID, ""); err != nil {
			return err
		}
		for m, env := range mappings {
			if err := c.PutMapping(e.ID, m, env); err != nil {
				return err
			}
		}
		return nil
	})
}

// Fail ends the attempt by err: Rejected for an accel.Rejection, Failed for good when accel.IsPermanent or
// attempts are used up, else Failed with the next try after backoff with jitter (at least accel.RetryAfter(err),
// of which up to 24 h are granted). ErrLeaseLost as with Renew.
func (t *Tracker) Fail(ctx context.Context, w Work, err error) error {
	if err == nil {
		return fmt.Errorf("%w: fail %s without an error", accel.ErrInvalid, w.Image())
	}
	return t.withHeld(ctx, w, func(c *change, e *Entry) error {
		again := e.Again
		if ferr := c.fail(e, err); ferr != nil {
			return ferr
		}
		if !again {
			return nil
		}
		e.Again = false
		return c.want(e, e.Asked, c.now)
	})
}

func (c *change) fail(e *Entry, err error) error {
	if rej := (*accel.Rejection)(nil); errors.As(err, &rej) {
		if err := c.move(e, accel.Rejected, rej.Detail); err != nil {
			return err
		}
		e.Rule = oneLine(rej.Rule)
		return nil
	}
	switch {
	case accel.IsPermanent(err):
		return c.move(e, accel.Failed, err.Error())
	case e.Attempts >= c.o.MaxAttempts:
		return c.move(e, accel.Failed, fmt.Sprintf("given up after %d attempts: %v", e.Attempts, err))
	}
	if merr := c.move(e, accel.Failed, err.Error()); merr != nil {
		return merr
	}
	pause := max(c.o.backoff(e.Attempts), min(accel.RetryAfter(err), maxRetryAfter))
	e.DueAt = c.now.Add(pause)
	return nil
}

// backoff is the pause after the given number of attempts: anything between BackoffMin and
// an upper limit that doubles with each attempt up to BackoffMax (full jitter:
// AWS Architecture Blog, "Exponential Backoff And Jitter").
func (o *Options) backoff(attempts int) time.Duration {
	upper := o.BackoffMin
	for range attempts {
		if upper >= o.BackoffMax/2 {
			upper = o.BackoffMax
			break
		}
		upper *= 2
	}
	return o.BackoffMin + rand.N(upper-o.BackoffMin+1)
}

// Drop removes a claimed record that turned out to be no image push (artifact, our own output, signature).
// ErrLeaseLost as with Renew. An intake row whose tag was pushed again meanwhile stays, Pending.
func (t *Tracker) Drop(ctx context.Context, w Work, why string) error {
	return t.update(ctx, func(c *change) error {
		e, err := c.held(w)
		if err != nil {
			return err
		}
		if e.Again {
			return c.askAgain(e)
		}
		return c.remove(&e, why, nil)
	})
}
