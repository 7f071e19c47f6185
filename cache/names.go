package cache

import (
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Tag is what a tag pointed to when it was looked at.
type Tag struct {
	Digest digest.Digest
	// CheckedAt is zero where it lies in the future: the clock was set back, so
	// nobody knows how old the answer is.
	CheckedAt time.Time
}

// Tag returns what is known of a tag of repository ("host/path"). accel.ErrNotFound.
func (s *Store) Tag(repository, tag string) (Tag, error) { return Tag{}, accel.ErrNotFound }

// PutTag remembers what a tag points to; on disk within a second or so. The tags put the longest ago
// are forgotten above 50,000.
func (s *Store) PutTag(repository, tag string, t Tag) error { return nil }

// RemoveTag forgets a tag; one that is not known is no error.
func (s *Store) RemoveTag(repository, tag string) error { return nil }

// Link remembers that repository holds digests. Above 200,000 the oldest are forgotten.
func (s *Store) Link(repository string, digests ...digest.Digest) error { return nil }

// Linked reports whether repository is known to hold d.
func (s *Store) Linked(repository string, d digest.Digest) bool { return false }

// Grant remembers that the client (a keyed digest of its credential, never the
// credential) was allowed to pull from repository at that time. Above 50,000 the
// oldest are forgotten.
func (s *Store) Grant(repository, client string, at time.Time) error { return nil }

// Granted returns when the client was allowed last; false when that is not known, or
// lies in the future (the clock was set back).
func (s *Store) Granted(repository, client string) (time.Time, bool) { return time.Time{}, false }

// Revoke forgets a grant.
func (s *Store) Revoke(repository, client string) error { return nil }
