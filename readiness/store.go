package readiness

import (
	"context"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Store keeps what the Tracker knows. It is a border to a process or a network, so
// it has several implementations; package storetest is the suite that each passes.
type Store interface {
	// View runs fn over a consistent snapshot. Writes in fn are an error.
	View(ctx context.Context, fn func(Tx) error) error
	// Update runs fn and makes all of its writes durable before it returns nil; when
	// fn or the commit fails, none of them is kept, and fn's error is returned as it
	// is. Updates are serialisable. fn may be run more than once, and on another
	// goroutine, so it must have no effect outside tx but setting its results anew.
	Update(ctx context.Context, fn func(Tx) error) error
	// Close waits for running transactions. Calls after it return an error.
	Close() error
}

// Tx is one transaction, bound to the context of its View or Update and valid only
// until fn returns. What it returns belongs to the caller. A thing that is not
// there is accel.ErrNotFound, which aborts nothing: fn may go on.
type Tx interface {
	// Get returns the record with the id; aliases are not followed.
	Get(id string) (Entry, error)
	// Put stores e under e.ID, new or in place of the one there, and keeps every
	// index below in step. Seq is the store's: given at the first Put, kept later.
	Put(e Entry) error
	// Delete removes the record with its index entries and mappings; removing what is not there is
	// accel.ErrNotFound.
	Delete(id string) error

	// ByDigest returns the records of the repository whose Digest is d or whose
	// Children contain d, of any parameters, newest first, at most limit.
	ByDigest(repository string, d digest.Digest, limit int) ([]Entry, error)
	// Next returns the record of the queue with the earliest DueAt (ties: the oldest record);
	// records with a zero DueAt are in no queue.
	Next(q Queue) (Entry, error)
	// Unfolded reports whether the repository has a record for which Entry.MayFold holds.
	Unfolded(repository string) (bool, error)
	// List returns records newest first with Seq below before (zero: all), at most
	// limit. An empty state or repository selects all.
	List(state accel.State, repository string, before uint64, limit int) ([]Entry, error)
	// Counts has an entry for each state that any record is in.
	Counts() (map[accel.State]StateCount, error)

	// Tag, PutTag and DeleteTag keep the pointer of (repository, tag). Deleting what
	// is not there is no error.
	Tag(repository, tag string) (TagPointer, error)
	PutTag(repository, tag string, p TagPointer) error
	DeleteTag(repository, tag string) error

	// Alias returns the id that took over from id. PutAlias sets it; an empty heir removes it.
	Alias(id string) (string, error)
	PutAlias(id, heir string) error

	// AppendEvent gives e the next number, which is returned: larger than all before
	// it in commit order, never zero, never used again. The newest EventsKept are kept.
	AppendEvent(e Event) (uint64, error)
	// Events returns up to limit events after seq, oldest first, and the number of
	// the oldest one kept (zero: none).
	Events(after uint64, limit int) (evs []Event, first uint64, err error)

	// PutMapping adds or replaces an envelope that belongs to the record id.
	PutMapping(id string, manifest digest.Digest, envelope []byte) error
	// Mapping returns the envelope for manifest of the newest record of the
	// repository (empty: of any) that has one.
	Mapping(repository string, manifest digest.Digest) ([]byte, error)
	// MoveMappings gives from's envelopes to another record; an empty to removes them.
	MoveMappings(from, to string) error

	// Announce notes a digest that accel pushes. The last AnnouncedKept are kept.
	Announce(d digest.Digest) error
	Announced(d digest.Digest) (bool, error)

	// Memo returns what PutMemo last stored for key. The last MemosKept written are kept.
	Memo(key string) ([]byte, error)
	PutMemo(key string, value []byte) error
}

// Bounds of what a Store keeps beside the records.
const (
	EventsKept = 10_000
	// AnnouncedKept: an image announces about five digests, and webhooks of our own
	// pushes come late by hours at most.
	AnnouncedKept = 100_000
	// MemosKept: a memo is about 300 bytes, one for each converted layer.
	MemosKept = 200_000
)

// Queue names what a record with a DueAt waits for.
type Queue int

const (
	// WorkQueue holds Pending, Converting and Failed records.
	WorkQueue Queue = iota + 1
	// CheckQueue holds Ready records.
	CheckQueue
)

// Entry is a record as the store keeps it: the public part, and what only the
// Tracker's rules need.
type Entry struct {
	accel.Record
	// Seq numbers records in the order of their first Put.
	Seq uint64
	// Asked: the API asked for this digest itself (for an intake row: for this tag),
	// so it is neither folded nor superseded.
	Asked bool
	// Again: a push of an intake row's tag came while a worker was resolving it, so
	// the registry must be asked once more.
	Again bool
	// Folded: a worker has looked into the manifest, so that Children is complete.
	Folded bool
	// Children are the digests of an index's members.
	Children []digest.Digest
	// Aliases are the ids that lead here. One that has been led elsewhere since may
	// still be listed.
	Aliases []string
}

// Queue is the queue that e waits in, zero for none.
func (e *Entry) Queue() Queue {
	if e.DueAt.IsZero() {
		return 0
	}
	switch e.State {
	case accel.Pending, accel.Converting, accel.Failed:
		return WorkQueue
	case accel.Ready:
		return CheckQueue
	default:
		return 0
	}
}

// MayFold reports whether e is in work and may turn out to be an index that names
// untagged manifests. An untagged manifest of unknown kind is not taken for one:
// two children would wait for each other.
func (e *Entry) MayFold() bool {
	if e.Folded || (e.State != accel.Pending && e.State != accel.Converting) {
		return false
	}
	return isIndex(e.MediaType) || (e.MediaType == "" && len(e.Tags) > 0)
}

// TagPointer says what a tag points to.
type TagPointer struct {
	// ID of the record that holds the tag; empty while only an intake row is known.
	ID string
	// At is the latest OccurredAt of the tag's events; zero while none had a time.
	At time.Time
	// MovedAt is when, by our clock, ID last changed.
	MovedAt time.Time
	// Observed: the registry's own answer set ID, so that an event of the very time At does not move it.
	Observed bool
	// ReadyID is the last record that was Ready when the tag moved away from it.
	ReadyID string
	// IntakeID is the tag's intake row while there is one.
	IntakeID string
}
