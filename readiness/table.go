package readiness

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"accel"
)

// none is the state of a record that does not exist (yet, or any more).
const none accel.State = ""

// transitions is the one table of state changes. The package comment says for
// each who makes it and what a crash leaves.
var transitions = map[accel.State][]accel.State{
	none:             {accel.Pending, accel.Superseded},
	accel.Pending:    {accel.Converting, accel.Superseded, none},
	accel.Converting: {accel.Ready, accel.Failed, accel.Rejected, accel.Pending, accel.Superseded, none},
	accel.Ready:      {accel.Stale, none},
	accel.Failed:     {accel.Converting, accel.Pending, accel.Superseded, none},
	accel.Rejected:   {accel.Pending, none},
	accel.Superseded: {accel.Pending, none},
	accel.Stale:      {accel.Pending},
}

// maxReasonBytes bounds Record.Reason, which comes from registries' answers.
const maxReasonBytes = 1024

// move is the one function that changes a record's State. It writes the event and
// sets the fields that follow from the state; the caller puts the entry.
func (c *change) move(e *Entry, to accel.State, reason string) error {
	if !slices.Contains(transitions[e.State], to) {
		return fmt.Errorf("%w: record %s of %s is %s and cannot become %s", accel.ErrConflict, e.ID, e.Image(), e.State, to)
	}
	reason = oneLine(reason)
	seq, err := c.AppendEvent(Event{
		At: c.now, ID: e.ID, Repository: e.Repository, Digest: e.Digest, Tags: slices.Clone(e.Tags),
		From: e.State, To: to, Reason: reason,
	})
	if err != nil {
		return err
	}
	c.touch(e.Repository)
	e.State, e.Reason, e.UpdatedAt = to, reason, c.now
	e.Lease, e.Rule, e.SuccessorID = 0, "", ""
	switch to {
	case accel.Pending:
		e.DueAt = c.now
	case accel.Converting:
		// Event numbers never repeat, not even for a record that was deleted and
		// made again: an old lease cannot fit a new claim.
		e.Lease = seq
		e.DueAt = c.now.Add(c.o.LeaseTime)
		e.Attempts++
		e.Again = false
	case accel.Ready:
		e.DueAt = c.now.Add(c.o.CheckInterval)
	default:
		e.DueAt = zeroTime
	}
	return nil
}

// oneLine makes text from outside fit for Record.Reason.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "\uFFFD")), " ")
	if len(s) <= maxReasonBytes {
		return s
	}
	cut := maxReasonBytes - len("...")
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}
