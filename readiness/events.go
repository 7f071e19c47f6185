package readiness

import (
	"context"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Event is one change of state, numbered in commit order.
type Event struct {
	Seq        uint64        `json:"seq"`
	At         time.Time     `json:"at"`
	ID         string        `json:"id"`
	Repository string        `json:"repository"`
	Digest     digest.Digest `json:"digest,omitempty"`
	Tags       []string      `json:"tags,omitempty"` // as they were just before the change
	From       accel.State   `json:"from,omitempty"` // empty: the record is new
	To         accel.State   `json:"to,omitempty"`   // empty: the record was removed
	Reason     string        `json:"reason,omitempty"`
}

// maxEvents bounds one answer of Events; it is also what a limit of zero means.
const maxEvents = 1000

// Events returns up to limit events after seq, oldest first (the log keeps the newest 10,000; first is the oldest kept,
// zero while there is none). The numbers rise but have no other meaning.
func (t *Tracker) Events(ctx context.Context, after uint64, limit int) (evs []Event, first uint64, err error) {
	if limit <= 0 || limit > maxEvents {
		limit = maxEvents
	}
	err = t.store.View(ctx, func(tx Tx) (err error) {
		evs, first, err = tx.Events(after, limit)
		return err
	})
	return evs, first, err
}

// NextEvents is Events that waits until there is at least one. It returns ctx.Err() when ctx ends.
func (t *Tracker) NextEvents(ctx context.Context, after uint64, limit int) (evs []Event, first uint64, err error) {
	for {
		news, stop := t.hub.listen(topicEvents)
		evs, first, err = t.Events(ctx, after, limit)
		if err == nil && len(evs) == 0 {
			err = sleep(ctx, news, relook)
		}
		stop()
		if err != nil || len(evs) > 0 {
			return evs, first, err
		}
	}
}
