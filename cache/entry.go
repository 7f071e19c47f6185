package cache

import (
	"fmt"
	"slices"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Entry is what the store has of one blob.
type Entry struct {
	Digest    digest.Digest `json:"digest"`
	SizeBytes int64         `json:"sizeBytes"`
	// PresentBytes are there; AllocatedBytes are its blocks on disk.
	PresentBytes   int64 `json:"presentBytes"`
	AllocatedBytes int64 `json:"allocatedBytes"`
	// Complete: all is there and the digest was checked.
	Complete bool `json:"complete"`
	Pinned   bool `json:"pinned"`
	// Readers are open now; Filling: bytes are being fetched.
	Readers int       `json:"readers"`
	Filling bool      `json:"filling"`
	UsedAt  time.Time `json:"usedAt"` // opened last, by the clock of then
}

func (b *blob) entry() Entry {
	e := Entry{
		Digest: b.digest, SizeBytes: b.size, PresentBytes: b.presentBytes(), AllocatedBytes: b.allocated,
		Complete: b.complete, Pinned: b.pins > 0, UsedAt: time.Unix(0, b.usedAt).UTC(),
	}
	if b.live != nil {
		e.Readers, e.Filling = b.live.readers, len(b.live.fills) > 0
	}
	return e
}

// Stat returns what there is of the blob d. accel.ErrNotFound when there is nothing.
func (s *Store) Stat(d digest.Digest) (Entry, error) {
	if _, err := keyOf(d); err != nil {
		return Entry{}, err
	}
	if isEmpty(accel.BlobDescriptor{Digest: d}) {
		return Entry{Digest: d, Complete: true}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[d]
	if b == nil {
		return Entry{}, fmt.Errorf("%w: blob %s", accel.ErrNotFound, d)
	}
	return b.entry(), nil
}

// List returns all blobs, those used last first.
func (s *Store) List() []Entry {
	s.mu.Lock()
	all := make([]Entry, 0, len(s.blobs))
	for _, b := range s.blobs {
		all = append(all, b.entry())
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b Entry) int {
		if c := b.UsedAt.Compare(a.UsedAt); c != 0 {
			return c
		}
		return compareDigests(a.Digest, b.Digest)
	})
	return all
}

func compareDigests(a, b digest.Digest) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// Usage says how full the store is. Used bytes include the index. FreeBytes is
// negative where the file system does not tell.
func (s *Store) Usage() accel.CacheUsage {
	free, err := s.free()
	if err != nil {
		free = -1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u := accel.CacheUsage{BudgetBytes: s.o.BudgetBytes, UsedBytes: s.total(), FreeBytes: free, Blobs: len(s.blobs)}
	for d := range s.pinned {
		if b := s.blobs[d]; b != nil {
			u.PinnedBytes += b.allocated
		}
	}
	return u
}

// Remove removes the blob or manifest d. accel.ErrNotFound; accel.ErrConflict while it is pinned,
// read or filled.
func (s *Store) Remove(d digest.Digest) error {
	if _, err := keyOf(d); err != nil {
		return err
	}
	s.mu.Lock()
	switch b := s.blobs[d]; {
	case s.closed:
		s.mu.Unlock()
		return ErrClosed
	case s.pinned[d] > 0:
		s.mu.Unlock()
		return fmt.Errorf("%w: %s is pinned", accel.ErrConflict, d)
	case b != nil && !b.evictable():
		s.mu.Unlock()
		return fmt.Errorf("%w: blob %s is being read or filled", accel.ErrConflict, d)
	case b != nil:
		s.dropNow(b, fmt.Errorf("%w: removed", accel.ErrNotFound))
		s.removeManifest(d)
	case !s.removeManifest(d):
		s.mu.Unlock()
		return fmt.Errorf("%w: %s", accel.ErrNotFound, d)
	}
	s.mu.Unlock()
	return s.commit()
}
