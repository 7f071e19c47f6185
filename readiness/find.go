package readiness

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// maxSameDigest bounds how many records of one digest (indexes that share a child) are looked at.
const maxSameDigest = 100

// Get returns the record with the id, or the one that took over from it. ErrNotFound for an unknown one.
func (t *Tracker) Get(ctx context.Context, id string) (accel.Record, error) {
	var e Entry
	err := t.store.View(ctx, func(tx Tx) (err error) {
		e, err = follow(tx, id)
		return err
	})
	return e.Record, err
}

// Status is the answer to "how is this reference".
type Status struct {
	accel.Record
	// Previous is, while a newer push of the tag is in work, the Ready record that the tag had before.
	Previous *accel.Record `json:"previous,omitempty"`
}

// Find answers for a reference by tag or digest (of an index, an image, or a child of an index). ErrNotFound for an unknown one.
// With both, the digest counts.
func (t *Tracker) Find(ctx context.Context, ref accel.Reference) (Status, error) {
	var st Status
	err := t.store.View(ctx, func(tx Tx) (err error) {
		st, err = t.look(tx, ref)
		return err
	})
	return st, err
}

func (t *Tracker) look(tx Tx, ref accel.Reference) (Status, error) {
	if ref.Digest != "" {
		e, err := t.byDigest(tx, ref.Name(), ref.Digest)
		return Status{Record: e.Record}, err
	}
	return byTag(tx, ref.Name(), ref.Tag)
}

// byDigest picks among the digest's own record and the indexes that have it as a child.
func (t *Tracker) byDigest(tx Tx, repository string, d digest.Digest) (Entry, error) {
	best, ok, err := find(tx, t.digestID(repository, d))
	if err != nil || (ok && rank(&best) > 0) {
		return best, err
	}
	others, err := tx.ByDigest(repository, d, maxSameDigest)
	if err != nil {
		return Entry{}, err
	}
	for _, e := range others {
		if !ok || rank(&e) > rank(&best) {
			best, ok = e, true
		}
	}
	if !ok {
		return Entry{}, fmt.Errorf("%w: no record of %s@%s", accel.ErrNotFound, repository, d)
	}
	return best, nil
}

// rank orders records by what they are worth to somebody who wants the image:
// 2 it is there, 1 it will be, 0 it will not by itself.
func rank(e *Entry) int {
	switch {
	case e.State == accel.Ready:
		return 2
	case e.Final():
		return 0
	default:
		return 1
	}
}

// byTag answers with the tag's intake row while there is one, since nobody knows yet what
// was pushed; else with the record that holds the tag.
func byTag(tx Tx, repository, tag string) (Status, error) {
	p, err := pointer(tx, repository, tag)
	if err != nil {
		return Status{}, err
	}
	e, ok, err := find(tx, p.IntakeID)
	if err == nil && !ok {
		e, ok, err = find(tx, p.ID)
	}
	if err != nil {
		return Status{}, err
	}
	if !ok {
		return Status{}, fmt.Errorf("%w: no record of %s:%s", accel.ErrNotFound, repository, tag)
	}
	st := Status{Record: e.Record}
	if e.State == accel.Ready {
		return st, nil
	}
	for _, id := range []string{p.ID, p.ReadyID} {
		prev, ok, err := find(tx, id)
		if err != nil {
			return Status{}, err
		}
		if ok && prev.ID != e.ID && prev.State == accel.Ready {
			st.Previous = &prev.Record
			break
		}
	}
	return st, nil
}

// Holder is the record that a tag points to. ErrNotFound for an unknown tag. A push whose digest is
// not known yet does not count until it is resolved, unless the tag has nothing else.
func (t *Tracker) Holder(ctx context.Context, repository, tag string) (accel.Record, error) {
	var e Entry
	err := t.store.View(ctx, func(tx Tx) error {
		p, err := pointer(tx, repository, tag)
		if err != nil {
			return err
		}
		id := p.ID
		if id == "" {
			id = p.IntakeID
		}
		var ok bool
		if e, ok, err = find(tx, id); err == nil && !ok {
			err = fmt.Errorf("%w: no record of %s:%s", accel.ErrNotFound, repository, tag)
		}
		return err
	})
	return e.Record, err
}

// PushedAt is when, by Options.Now's clock, an event moved a tag to the record id; zero where it points elsewhere, or where
// the registry itself said so.
func (t *Tracker) PushedAt(ctx context.Context, repository, tag, id string) (at time.Time, err error) {
	err = t.store.View(ctx, func(tx Tx) error {
		p, err := pointer(tx, repository, tag)
		if err == nil && p.ID == id && !p.Observed {
			at = p.MovedAt
		}
		return err
	})
	return at, err
}

// Mapping returns the signed envelope for a source platform manifest: of the repository alone, or, when that is empty,
// of any that has it. ErrNotFound when there is none, or none whose target is believed to be there.
func (t *Tracker) Mapping(ctx context.Context, repository string, manifest digest.Digest) ([]byte, error) {
	var env []byte
	err := t.store.View(ctx, func(tx Tx) (err error) {
		env, err = tx.Mapping(repository, manifest)
		return err
	})
	return env, err
}

// Filter selects records. Zero fields select all.
type Filter struct {
	State      accel.State
	Repository string
	Cursor     string // from a previous Page
	Limit      int    // default 50, at most 500
}

// Page is one page of records, newest first.
type Page struct {
	Records []accel.Record
	Next    string // empty on the last page
}

// List returns a page of records in the order of their creation, newest first. ErrInvalid for a
// state or cursor that is none.
func (t *Tracker) List(ctx context.Context, f Filter) (Page, error) {
	if f.State != "" && !f.State.Valid() {
		return Page{}, fmt.Errorf("%w: state %q (want one of %v)", accel.ErrInvalid, f.State, accel.States)
	}
	var before uint64
	if f.Cursor != "" {
		var err error
		if before, err = strconv.ParseUint(f.Cursor, 36, 64); err != nil || before == 0 {
			return Page{}, fmt.Errorf("%w: cursor %q is none that a page gave", accel.ErrInvalid, f.Cursor)
		}
	}
	limit := 50
	if f.Limit > 0 {
		limit = min(f.Limit, 500)
	}
	var es []Entry
	err := t.store.View(ctx, func(tx Tx) (err error) {
		es, err = tx.List(f.State, f.Repository, before, limit+1)
		return err
	})
	if err != nil {
		return Page{}, err
	}
	var page Page
	if len(es) > limit {
		es = es[:limit]
		page.Next = strconv.FormatUint(es[limit-1].Seq, 36)
	}
	page.Records = make([]accel.Record, len(es))
	for i := range es {
		page.Records[i] = es[i].Record
	}
	return page, nil
}

// StateCount is one state's depth, and the age of its oldest entry by UpdatedAt.
type StateCount struct {
	Count  int
	Oldest time.Time
}

// Counts has an entry for every state, of zero where no record is in it.
func (t *Tracker) Counts(ctx context.Context) (map[accel.State]StateCount, error) {
	counts := map[accel.State]StateCount{}
	err := t.store.View(ctx, func(tx Tx) (err error) {
		counts, err = tx.Counts()
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, s := range accel.States {
		if _, ok := counts[s]; !ok {
			counts[s] = StateCount{}
		}
	}
	return counts, nil
}

// maxMemoKeyBytes and maxMemoBytes bound one memo.
const (
	maxMemoKeyBytes = 512
	maxMemoBytes    = 64 << 10
)

// Memo returns what Remember last stored under key. ErrNotFound when there is nothing (any more).
func (t *Tracker) Memo(ctx context.Context, key string) ([]byte, error) {
	var val []byte
	err := t.store.View(ctx, func(tx Tx) (err error) {
		val, err = tx.Memo(key)
		return err
	})
	return val, err
}

// Remember stores val under key, for instance where a converted layer is. The newest 200,000
// are kept. ErrInvalid for an empty key, one above 512 bytes, or a val above 64 KiB.
func (t *Tracker) Remember(ctx context.Context, key string, val []byte) error {
	if key == "" || len(key) > maxMemoKeyBytes || len(val) > maxMemoBytes {
		return fmt.Errorf("%w: memo with a key of %d and a value of %d bytes", accel.ErrInvalid, len(key), len(val))
	}
	return t.update(ctx, func(c *change) error {
		if had, err := c.Memo(key); err == nil && string(had) == string(val) {
			return nil
		} else if err != nil && !errors.Is(err, accel.ErrNotFound) {
			return err
		}
		return c.PutMemo(key, val)
	})
}
