package boltstore

import (
	"context"
	"errors"
	"fmt"

	"accel"
	"accel/readiness"

	"go.etcd.io/bbolt"
)

// Check reads everything and reports where indexes and records disagree, at most a hundred
// findings joined in one ErrDamaged. It is for tests and for diagnosis: it takes
// about 10 µs a record, and a transaction for all that time.
func (s *Store) Check(ctx context.Context) error {
	return s.View(ctx, func(rt readiness.Tx) error {
		c := checker{tx: rt.(*tx), want: map[row]bool{}, counts: map[accel.State]uint64{}}
		if err := c.records(); err != nil {
			return err
		}
		c.indexes()
		c.tags()
		c.others()
		if len(c.found) == 0 {
			return nil
		}
		return s.damaged("check", errors.Join(c.found...))
	})
}

type checker struct {
	*tx
	want   map[row]bool // index lines that the records ask for
	tagged int          // tags that records hold
	counts map[accel.State]uint64
	found  []error
}

func (c *checker) note(format string, args ...any) {
	if len(c.found) < 100 {
		c.found = append(c.found, fmt.Errorf(format, args...))
	}
}

func (c *checker) records() error {
	ids := 0
	err := c.newest(bucketRecords, nil, 0, func(seq uint64, v []byte) (bool, error) {
		e, err := decodeEntry(seq, v)
		if err != nil {
			return false, err
		}
		ids++
		if at, ok, _ := c.seqOf(e.ID); !ok || at != seq {
			c.note("record %s: its id leads to number %d, not %d", e.ID, at, seq)
		}
		all, err := rows(&e)
		if err != nil {
			return false, err
		}
		for _, r := range all {
			c.want[r] = true
		}
		c.counts[e.State]++
		for _, tag := range e.Tags {
			c.tagged++
			p, err := c.Tag(e.Repository, tag)
			if err != nil || (p.ID != e.ID && p.IntakeID != e.ID) {
				c.note("record %s: tag %s:%s points to %q, %q", e.ID, e.Repository, tag, p.ID, p.IntakeID)
			}
		}
		return true, nil
	})
	if n := keys(c.bucket(bucketIDs)); n != ids {
		c.note("%d ids for %d records", n, ids)
	}
	return err
}

func (c *checker) indexes() {
	have := map[row]bool{}
	for _, name := range indexes {
		cur := c.bucket(name).Cursor()
		for k, v := cur.First(); k != nil; k, v = cur.Next() {
			r := row{string(name), string(k), string(v)}
			have[r] = true
			if !c.want[r] {
				c.note("index %s: key %x leads to a record that does not ask for it", name, k)
			}
		}
	}
	for r := range c.want {
		if !have[r] {
			c.note("index %s: key %x is missing", r.bucket, r.key)
		}
	}
	for _, s := range accel.States {
		code, _ := stateByte(s) // of a state that is one
		if n := count(c.bucket(bucketMeta), join(keyCount, code)); n != c.counts[s] {
			c.note("count of %s is %d, of %d records", s, n, c.counts[s])
		}
	}
}

func (c *checker) tags() {
	pointed := 0
	cur := c.bucket(bucketTags).Cursor()
	for k, v := cur.First(); k != nil; k, v = cur.Next() {
		p, err := decodePointer(v)
		if err != nil {
			c.note("tag %x: %w", k, err)
		}
		for _, id := range []string{p.ID, p.IntakeID} {
			if id == "" {
				continue
			}
			pointed++
			if _, err := c.Get(id); err != nil {
				c.note("tag %x: %w", k, err)
			}
		}
	}
	if pointed != c.tagged {
		c.note("%d records are pointed to by tags, %d tags are held by records", pointed, c.tagged)
	}
}

func (c *checker) others() {
	cur := c.bucket(bucketAliases).Cursor()
	for k, v := cur.First(); k != nil; k, v = cur.Next() {
		if _, err := c.Get(string(v)); err != nil {
			c.note("alias %s: %w", k, err)
		}
	}
	cur = c.bucket(bucketMappings).Cursor()
	for k, _ := cur.First(); k != nil; k, _ = cur.Next() {
		if len(k) != 8+hashBytes || c.bucket(bucketRecords).Get(k[:8]) == nil || c.bucket(bucketMapped).Get(join(k[8:], k[:8])) == nil {
			c.note("mapping %x: it has no record or no index line", k)
		}
	}
	for _, pair := range [][2][]byte{{bucketMappings, bucketMapped}, {bucketAnnounced, bucketAnnouncedOrder}, {bucketMemos, bucketMemosOrder}} {
		if a, b := keys(c.bucket(pair[0])), keys(c.bucket(pair[1])); a != b {
			c.note("%d keys of %s, %d of %s", a, pair[0], b, pair[1])
		}
	}
}

func keys(b *bbolt.Bucket) int {
	n := 0
	cur := b.Cursor()
	for k, _ := cur.First(); k != nil; k, _ = cur.Next() {
		n++
	}
	return n
}
