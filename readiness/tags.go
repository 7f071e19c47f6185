package readiness

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"accel"
)

// create makes the entry of a record that is new; the caller moves and puts it.
func (c *change) create(r accel.Record) (Entry, error) {
	r.CreatedAt = c.now
	r.Params = c.o.Params
	// A record takes its id back from an alias.
	return Entry{Record: r}, c.PutAlias(r.ID, "")
}

// want applies a push to a record that exists. due is when an untagged manifest
// has waited long enough for its index, or now.
func (c *change) want(e *Entry, byAPI bool, due time.Time) error {
	switch e.State {
	case accel.Pending:
		if due.Before(e.DueAt) {
			e.DueAt = due
		}
		return nil
	case accel.Failed, accel.Superseded, accel.Stale:
	case accel.Rejected:
		if !byAPI {
			return nil // the image is what it was, and so is the policy
		}
	default:
		return nil
	}
	if err := c.move(e, accel.Pending, ""); err != nil {
		return err
	}
	e.Attempts, e.DueAt = 0, due
	return nil
}

// older reports whether an event of the time at comes too late to move p to the record id.
func (p *TagPointer) older(id string, at time.Time) bool {
	if p.ID == id || at.IsZero() || p.At.IsZero() {
		return false
	}
	return at.Before(p.At) || (p.Observed && at.Equal(p.At))
}

// point moves the tag to e, whose Tags it extends; the caller puts e. The record that
// held the tag loses it.
func (c *change) point(e *Entry, tag string, at time.Time, observed bool) error {
	p, err := pointer(c.Tx, e.Repository, tag)
	if err != nil {
		return err
	}
	changed := false
	if p.ID != e.ID {
		if err := c.untag(&p, e.Repository, tag, e); err != nil {
			return err
		}
		p.ID, p.MovedAt, p.Observed = e.ID, c.now, observed
		changed = true
	}
	if at.After(p.At) {
		p.At, p.Observed = at, observed
		changed = true
	}
	if i, there := slices.BinarySearch(e.Tags, tag); !there {
		e.Tags = slices.Insert(slices.Clone(e.Tags), i, tag)
		if e.State == accel.Ready {
			e.DueAt = c.now // the check loop makes the new target tag
		}
		c.touch(e.Repository)
	}
	if settled, err := c.settleIntake(&p, e); err != nil {
		return err
	} else if settled {
		changed = true
	}
	if !changed {
		return nil
	}
	return c.PutTag(e.Repository, tag, p)
}

// settleIntake removes the tag's intake row where it had been given up or rejected: the
// digest that it could not find out is known now. One that is still in work stays,
// for it asks the registry itself.
func (c *change) settleIntake(p *TagPointer, e *Entry) (bool, error) {
	in, ok, err := c.find(p.IntakeID)
	if err != nil || !ok || in.ID == e.ID || (in.State != accel.Failed && in.State != accel.Rejected) {
		return false, err
	}
	in.Tags = nil // the pointer is in the caller's hands
	p.IntakeID = ""
	return true, c.remove(&in, "the tag's digest is known", e)
}

// untag takes the tag from the record that p names, in favour of heir (nil: the tag is gone).
func (c *change) untag(p *TagPointer, repository, tag string, heir *Entry) error {
	from, ok, err := c.find(p.ID)
	if err != nil || !ok {
		return err
	}
	rest := slices.DeleteFunc(slices.Clone(from.Tags), func(t string) bool { return t == tag })
	if from.State == accel.Ready {
		p.ReadyID = from.ID
	}
	if len(rest) == 0 && from.supersedable() {
		reason, successor := "tag "+tag+" is gone from "+repository, ""
		if heir != nil {
			reason, successor = "tag "+tag+" moved to "+heir.Digest.String(), heir.ID
		}
		if err := c.move(&from, accel.Superseded, reason); err != nil {
			return err
		}
		from.SuccessorID = successor
	}
	if len(rest) == 0 {
		rest = nil
	}
	from.Tags = rest
	return c.put(from)
}

// supersedable reports whether e is given up when nothing points to it: its work is not
// done, and nobody asked for the digest itself.
func (e *Entry) supersedable() bool {
	if e.Asked {
		return false
	}
	switch e.State {
	case accel.Pending, accel.Converting:
		return true
	case accel.Failed:
		return !e.DueAt.IsZero()
	default:
		return false
	}
}

// remove deletes e. With an heir, e's id and aliases lead to it from now on, and the caller
// puts the heir; without one they are forgotten.
func (c *change) remove(e *Entry, reason string, heir *Entry) error {
	if err := c.move(e, none, reason); err != nil {
		return err
	}
	for _, tag := range e.Tags {
		p, err := pointer(c.Tx, e.Repository, tag)
		if err != nil {
			return err
		}
		if p.ID == e.ID {
			p.ID, p.ReadyID, p.MovedAt = "", "", c.now
		}
		if p.IntakeID == e.ID {
			p.IntakeID = ""
		}
		if p.ID == "" && p.IntakeID == "" {
			err = c.DeleteTag(e.Repository, tag)
		} else {
			err = c.PutTag(e.Repository, tag, p)
		}
		if err != nil {
			return err
		}
	}
	if err := c.Delete(e.ID); err != nil {
		return fmt.Errorf("remove record %s: %w", e.ID, err)
	}
	return c.inherit(e, heir)
}

func (c *change) inherit(e, heir *Entry) error {
	for _, old := range e.Aliases {
		to, err := c.Alias(old)
		if errors.Is(err, accel.ErrNotFound) || (err == nil && to != e.ID) {
			continue // it leads elsewhere by now
		}
		if err != nil {
			return err
		}
		if err := c.alias(old, heir); err != nil {
			return err
		}
	}
	if heir == nil {
		return nil
	}
	return c.alias(e.ID, heir)
}

func (c *change) alias(id string, heir *Entry) error {
	if heir == nil || heir.ID == id {
		return c.PutAlias(id, "")
	}
	if !slices.Contains(heir.Aliases, id) {
		heir.Aliases = append(slices.Clone(heir.Aliases), id)
	}
	return c.PutAlias(id, heir.ID)
}
