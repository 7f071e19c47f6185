package cache

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// maxNameBytes bounds a key of the index; longer names are no names of images.
const maxNameBytes = 1024

// Tag is what a tag pointed to when it was looked at.
type Tag struct {
	Digest digest.Digest
	// CheckedAt is zero where it lies in the future: the clock was set back, so
	// nobody knows how old the answer is.
	CheckedAt time.Time
}

// hashed is a name in a key: of one length, so that two names never run into each other.
func hashed(name string) string {
	sum := sha256.Sum256([]byte(name))
	return string(sum[:16])
}

func tagKey(repository, tag string) string { return hashed(repository) + hashed(tag) }

// Tag returns what is known of a tag of repository ("host/path"). accel.ErrNotFound.
func (s *Store) Tag(repository, tag string) (Tag, error) {
	r, ok := s.dated(tableTags, tagKey(repository, tag))
	if !ok {
		return Tag{}, fmt.Errorf("%w: tag %s:%s", accel.ErrNotFound, repository, tag)
	}
	return Tag{Digest: r.digest, CheckedAt: s.past(r.at)}, nil
}

// PutTag remembers what a tag points to; on disk within a second or so. The tags put the longest ago
// are forgotten above 50,000.
func (s *Store) PutTag(repository, tag string, t Tag) error {
	if _, err := keyOf(t.Digest); err != nil {
		return err
	}
	return s.put(tableTags, tagKey(repository, tag), datedRow{digest: t.Digest, at: t.CheckedAt})
}

// RemoveTag forgets a tag; one that is not known is no error.
func (s *Store) RemoveTag(repository, tag string) error {
	return s.forgetRow(tableTags, tagKey(repository, tag))
}

func referrersKey(repository string, subject digest.Digest, artifactType string) string {
	return hashed(repository) + hashed(subject.String()+" "+artifactType)
}

// Referrers returns what is known of the list of repository's referrers to subject (artifactType empty: of
// all types); the list itself is the Manifest with that Digest. accel.ErrNotFound.
func (s *Store) Referrers(repository string, subject digest.Digest, artifactType string) (Tag, error) {
	r, ok := s.dated(tableReferrers, referrersKey(repository, subject, artifactType))
	if !ok {
		return Tag{}, fmt.Errorf("%w: referrers to %s@%s", accel.ErrNotFound, repository, subject)
	}
	return Tag{Digest: r.digest, CheckedAt: s.past(r.at)}, nil
}

// PutReferrers remembers a list of referrers as PutTag does a tag. Those put the longest ago are forgotten
// above 10,000.
func (s *Store) PutReferrers(repository string, subject digest.Digest, artifactType string, t Tag) error {
	if _, err := keyOf(t.Digest); err != nil {
		return err
	}
	return s.put(tableReferrers, referrersKey(repository, subject, artifactType), datedRow{digest: t.Digest, at: t.CheckedAt})
}

// Link remembers that repository holds digests. Above 200,000 the oldest are forgotten.
func (s *Store) Link(repository string, digests ...digest.Digest) error {
	for _, d := range digests {
		key, err := keyOf(d)
		if err != nil {
			return err
		}
		if key = hashed(repository) + key; s.known(tableLinks, key) {
			continue
		}
		if err := s.put(tableLinks, key, datedRow{}); err != nil {
			return err
		}
	}
	return nil
}

// Linked reports whether repository is known to hold d.
func (s *Store) Linked(repository string, d digest.Digest) bool {
	key, err := keyOf(d)
	return err == nil && s.known(tableLinks, hashed(repository)+key)
}

// Grant remembers that the client (a keyed digest of its credential, never the
// credential) was allowed to pull from repository at that time. Above 50,000 the
// oldest are forgotten.
func (s *Store) Grant(repository, client string, at time.Time) error {
	if len(client) > maxNameBytes {
		return fmt.Errorf("%w: a client's digest of %d bytes", accel.ErrInvalid, len(client))
	}
	return s.put(tableGrants, hashed(repository)+client, datedRow{at: at})
}

// Granted returns when the client was allowed last; false when that is not known, or
// lies in the future (the clock was set back).
func (s *Store) Granted(repository, client string) (time.Time, bool) {
	r, ok := s.dated(tableGrants, hashed(repository)+client)
	at := s.past(r.at)
	return at, ok && !at.IsZero()
}

// Revoke forgets a grant; one that is not known is no error.
func (s *Store) Revoke(repository, client string) error {
	return s.forgetRow(tableGrants, hashed(repository)+client)
}

// past is t unless that is yet to come.
func (s *Store) past(t time.Time) time.Time {
	if t.After(s.o.Now()) {
		return time.Time{}
	}
	return t
}

func (s *Store) known(table, key string) bool {
	_, ok := s.index.get(table, key)
	return ok
}

func (s *Store) dated(table, key string) (datedRow, bool) {
	content, ok := s.index.get(table, key)
	if !ok {
		return datedRow{}, false
	}
	r, err := decodeDated(content)
	return r, err == nil
}

func (s *Store) put(table, key string, r datedRow) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	r.seq = s.nextSeq()
	s.index.put(table, key, r.encode())
	return nil
}

func (s *Store) forgetRow(table, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.index.remove(table, key)
	return nil
}

// removeOldest removes the n rows of a table that were put the longest ago.
func removeOldest(b *bbolt.Bucket, table string, n int) (int, error) {
	type aged struct {
		key string
		seq uint64
	}
	var all []aged
	c := b.Cursor()
	for k, v := c.Seek([]byte(table)); bytes.HasPrefix(k, []byte(table)); k, v = c.Next() {
		content, err := openRow(table, string(k[len(table):]), v)
		if err != nil {
			return 0, err
		}
		r, err := decodeDated(content)
		if err != nil {
			return 0, err
		}
		all = append(all, aged{string(k), r.seq})
	}
	slices.SortFunc(all, func(a, b aged) int { return int(int64(a.seq - b.seq)) })
	n = min(n, len(all))
	for _, a := range all[:n] {
		if err := b.Delete([]byte(a.key)); err != nil {
			return 0, err
		}
	}
	return n, nil
}
