package readiness

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Tracker holds the rules about records. It has no goroutines of its own and is
// safe for concurrent use. Errors of its methods that match none of accel's
// sentinels come from the Store or from ctx.
type Tracker struct {
	store Store
	o     Options
	hub   hub
	// claiming and checking hold one token each: of many idle workers one looks at
	// the queue, so that a new record does not wake them all.
	claiming, checking chan struct{}
}

// Options: zero values take the defaults named.
type Options struct {
	Params        string           // fingerprint of the conversion parameters that new records get
	LeaseTime     time.Duration    // 30 s
	ChildHold     time.Duration    // 10 s: how long an untagged manifest waits for its index
	CheckInterval time.Duration    // 1 h: how often a Ready target is looked at
	MaxAttempts   int              // 8, then Failed for good
	BackoffMin    time.Duration    // 2 s
	BackoffMax    time.Duration    // 10 min
	Now           func() time.Time // time.Now
}

// New returns a Tracker over store, which stays the caller's to close.
func New(store Store, o Options) *Tracker {
	o.LeaseTime = cmp.Or(o.LeaseTime, 30*time.Second)
	o.ChildHold = cmp.Or(o.ChildHold, 10*time.Second)
	o.CheckInterval = cmp.Or(o.CheckInterval, time.Hour)
	o.MaxAttempts = cmp.Or(o.MaxAttempts, 8)
	o.BackoffMin = cmp.Or(o.BackoffMin, 2*time.Second)
	o.BackoffMax = max(cmp.Or(o.BackoffMax, 10*time.Minute), o.BackoffMin)
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Tracker{store: store, o: o, claiming: make(chan struct{}, 1), checking: make(chan struct{}, 1)}
}

var zeroTime time.Time

// stamp is t as every store can keep it: UTC, whole microseconds, no monotonic part.
func stamp(t time.Time) time.Time {
	if t.IsZero() {
		return zeroTime
	}
	return t.UTC().Truncate(time.Microsecond)
}

// recordID derives Record.ID. what is a digest, or ":tag" while no digest is known.
func recordID(repository, what, params string) string {
	sum := sha256.Sum256([]byte(repository + "\x00" + what + "\x00" + params))
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:16]))
}

func (t *Tracker) digestID(repository string, d digest.Digest) string {
	return recordID(repository, d.String(), t.o.Params)
}

// change is one run of an Update: the transaction, the one time that all of it
// happens at, and who is to be told after the commit.
type change struct {
	Tx
	o      *Options
	now    time.Time
	topics map[string]struct{}
}

// touch notes that waiters of the repository, and those of events, have news.
func (c *change) touch(repository string) {
	c.topics[repositoryTopic(repository)] = struct{}{}
	c.topics[topicEvents] = struct{}{}
}

// update runs fn in a transaction and tells waiters after the commit.
func (t *Tracker) update(ctx context.Context, fn func(*change) error) error {
	var c *change
	err := t.store.Update(ctx, func(tx Tx) error {
		c = &change{Tx: tx, o: &t.o, now: stamp(t.o.Now()), topics: map[string]struct{}{}}
		return fn(c)
	})
	if err != nil {
		return err
	}
	t.hub.wake(c.topics)
	return nil
}

// find is Get where "not there" is an answer.
func (c *change) find(id string) (e Entry, ok bool, err error) { return find(c.Tx, id) }

func find(tx Tx, id string) (e Entry, ok bool, err error) {
	if id == "" {
		return Entry{}, false, nil
	}
	e, err = tx.Get(id)
	if errors.Is(err, accel.ErrNotFound) {
		return Entry{}, false, nil
	}
	return e, err == nil, err
}

// pointer is Tag where "not there" is the zero pointer.
func pointer(tx Tx, repository, tag string) (TagPointer, error) {
	p, err := tx.Tag(repository, tag)
	if errors.Is(err, accel.ErrNotFound) {
		return TagPointer{}, nil
	}
	return p, err
}

// follow is Get that follows aliases.
func follow(tx Tx, id string) (Entry, error) {
	at := id
	for range 16 { // an heir may itself have been taken over
		e, ok, err := find(tx, at)
		if ok || err != nil {
			return e, err
		}
		at, err = tx.Alias(at)
		if errors.Is(err, accel.ErrNotFound) {
			break
		}
		if err != nil {
			return Entry{}, err
		}
	}
	return Entry{}, fmt.Errorf("%w: record %q", accel.ErrNotFound, id)
}

// save puts e unless it is what the store has already (was).
func (c *change) save(was, e Entry) error {
	if reflect.DeepEqual(was, e) {
		return nil
	}
	return c.put(e)
}

// put stores e and wakes whoever waits for its queue.
func (c *change) put(e Entry) error {
	switch e.Queue() {
	case WorkQueue:
		c.topics[topicWork] = struct{}{}
	case CheckQueue:
		c.topics[topicChecks] = struct{}{}
	}
	return c.Put(e)
}
