package readiness

import (
	"context"
	"fmt"
	"slices"

	"accel"
)

// NextCheck waits until a Ready target is due for its check and returns it, its check moved on by CheckInterval.
// It returns ctx.Err() when ctx ends.
func (t *Tracker) NextCheck(ctx context.Context) (accel.Record, error) {
	var rec accel.Record
	err := t.await(ctx, t.checking, topicChecks, CheckQueue, func(c *change) (bool, error) {
		e, ok, err := c.due(CheckQueue)
		if !ok || err != nil {
			return false, err
		}
		e.DueAt = c.now.Add(c.o.CheckInterval)
		rec = e.Record
		return true, c.put(e)
	})
	if err != nil {
		return accel.Record{}, err
	}
	return rec, nil
}

// Checked notes that the target is there, and which target tags stand now. When a Ready record gains a tag (Push,
// Observe, Resolve), its check falls due at once, so that the worker's check loop makes the target tag.
// ErrConflict when the record is not Ready, ErrNotFound when it is gone.
func (t *Tracker) Checked(ctx context.Context, id string, targetTags []string) error {
	return t.update(ctx, func(c *change) error {
		e, err := c.ready(id)
		if err != nil {
			return err
		}
		e.CheckedAt = c.now
		e.Target.Tags = sorted(targetTags)
		return c.put(e) // DueAt stays: a tag may have come since NextCheck
	})
}

// Gone moves a Ready record to Stale with the reason and at once on to Pending (two transitions, two events).
// Its mappings are forgotten, for they name what is no longer there. ErrConflict
// when the record is not Ready, ErrNotFound when it is gone.
func (t *Tracker) Gone(ctx context.Context, id, reason string) error {
	return t.update(ctx, func(c *change) error {
		e, err := c.ready(id)
		if err != nil {
			return err
		}
		if err := c.move(&e, accel.Stale, reason); err != nil {
			return err
		}
		if err := c.move(&e, accel.Pending, reason); err != nil {
			return err
		}
		e.Attempts = 0
		if err := c.MoveMappings(e.ID, ""); err != nil {
			return err
		}
		return c.put(e)
	})
}

func (c *change) ready(id string) (Entry, error) {
	e, err := follow(c.Tx, id)
	if err == nil && e.State != accel.Ready {
		err = fmt.Errorf("%w: record %s of %s is %s, not %s", accel.ErrConflict, id, e.Image(), e.State, accel.Ready)
	}
	return e, err
}

// Retry makes a record Pending and due at once, with all its attempts: one that Failed, was Rejected or Superseded;
// a Pending one only falls due. ErrConflict for a Ready or Converting one, ErrNotFound for an unknown id.
func (t *Tracker) Retry(ctx context.Context, id string) (accel.Record, error) {
	var rec accel.Record
	err := t.update(ctx, func(c *change) error {
		e, err := follow(c.Tx, id)
		if err != nil {
			return err
		}
		was := e
		switch e.State {
		case accel.Ready, accel.Converting:
			return fmt.Errorf("%w: record %s of %s is %s; only one that is not in work or done can be retried", accel.ErrConflict, e.ID, e.Image(), e.State)
		case accel.Superseded:
			e.Asked = true // nothing points to it, and it is wanted all the same
		}
		if err := c.want(&e, true, c.now); err != nil {
			return err
		}
		rec = e.Record
		return c.save(was, e)
	})
	if err != nil {
		return accel.Record{}, err
	}
	return rec, nil
}

// Delete removes a record with its tags' pointers, mappings and aliases, and returns it as it was. The worker of a
// Converting one gets ErrLeaseLost. Announced digests stay, so that late
// webhooks of our pushes are still ignored. ErrNotFound for an unknown id.
func (t *Tracker) Delete(ctx context.Context, id string) (accel.Record, error) {
	var rec accel.Record
	err := t.update(ctx, func(c *change) error {
		e, err := follow(c.Tx, id)
		if err != nil {
			return err
		}
		rec = e.Record
		return c.remove(&e, "deleted", nil)
	})
	if err != nil {
		return accel.Record{}, err
	}
	return rec, nil
}

// sorted is a sorted copy without repeats, nil for none.
func sorted(tags []string) []string {
	if len(tags) == 0 {
		return nil
	}
	s := slices.Clone(tags)
	slices.Sort(s)
	return slices.Compact(s)
}

// gained reports whether now has a tag that before has not.
func gained(before, now []string) bool {
	return slices.ContainsFunc(now, func(tag string) bool { return !slices.Contains(before, tag) })
}
