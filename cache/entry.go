package cache

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Form is how content is kept.
type Form string

// The forms: as a registry has it, or inflated for a mount, under the digest of the compressed blob.
const (
	FormBlob  Form = "blob"
	FormLayer Form = "layer"
)

// Entry is what the store has of one digest in one form.
type Entry struct {
	Form   Form          `json:"form"`
	Digest digest.Digest `json:"digest"`
	// SizeBytes of a layer is that of its content and of the files about it.
	SizeBytes int64 `json:"sizeBytes"`
	// PresentBytes are there (of a layer that is not complete: its blocks); AllocatedBytes are its blocks on disk.
	PresentBytes   int64 `json:"presentBytes"`
	AllocatedBytes int64 `json:"allocatedBytes"`
	// Chunks of a layer, and how many of them are there.
	Chunks        int `json:"chunks,omitempty"`
	PresentChunks int `json:"presentChunks,omitempty"`
	// Complete: all is there and the digest was checked, or those of all chunks.
	Complete bool `json:"complete"`
	Pinned   bool `json:"pinned"`
	// Readers of a blob are open now; Filling: bytes are being fetched, or written.
	Readers int       `json:"readers"`
	Filling bool      `json:"filling"`
	UsedAt  time.Time `json:"usedAt"` // opened last, by the clock of then
}

func (b *blob) entry() Entry {
	e := Entry{
		Form: FormBlob, Digest: b.digest, SizeBytes: b.size, PresentBytes: b.presentBytes(), AllocatedBytes: b.allocated,
		Complete: b.complete, Pinned: b.pins > 0, UsedAt: time.Unix(0, b.usedAt).UTC(),
	}
	if b.live != nil {
		e.Readers, e.Filling = b.live.readers, len(b.live.fills) > 0
	}
	return e
}

// Stat returns what there is of the blob d; of a layer, Layer.Stat. accel.ErrNotFound when there is nothing.
func (s *Store) Stat(d digest.Digest) (Entry, error) {
	if _, err := keyOf(d); err != nil {
		return Entry{}, err
	}
	if isEmpty(accel.BlobDescriptor{Digest: d}) {
		return Entry{Form: FormBlob, Digest: d, Complete: true}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.blobs[d]
	if b == nil {
		return Entry{}, fmt.Errorf("%w: blob %s", accel.ErrNotFound, d)
	}
	return b.entry(), nil
}

// List returns all blobs and layers, those used last first.
func (s *Store) List() []Entry {
	s.mu.Lock()
	all := make([]Entry, 0, len(s.blobs)+len(s.layers))
	for _, b := range s.blobs {
		all = append(all, b.entry())
	}
	for _, l := range s.layers {
		all = append(all, l.entry())
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b Entry) int {
		if c := b.UsedAt.Compare(a.UsedAt); c != 0 {
			return c
		}
		return cmp.Or(cmp.Compare(a.Digest, b.Digest), cmp.Compare(a.Form, b.Form))
	})
	return all
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
		for _, i := range s.forms(d) {
			u.PinnedBytes += i.allocated
		}
	}
	return u
}

// Remove removes the blob, layer and manifest d, whatever of these there is. accel.ErrNotFound; accel.ErrConflict, and
// nothing is removed, while it is pinned, read or filled.
func (s *Store) Remove(d digest.Digest) error {
	if _, err := keyOf(d); err != nil {
		return err
	}
	s.mu.Lock()
	forms := s.forms(d)
	if err := s.removable(d, forms); err != nil {
		s.mu.Unlock()
		return err
	}
	for _, i := range forms {
		s.drop(i, fmt.Errorf("%w: removed", accel.ErrNotFound))
	}
	if had := s.removeManifest(d); !had && len(forms) == 0 {
		s.mu.Unlock()
		return fmt.Errorf("%w: %s", accel.ErrNotFound, d)
	}
	s.mu.Unlock()
	s.unlink(forms)
	return s.commit()
}

// removable says why d must stay. s.mu is held.
func (s *Store) removable(d digest.Digest, forms []*item) error {
	switch {
	case s.closed:
		return ErrClosed
	case s.pinned[d] > 0:
		return fmt.Errorf("%w: %s is pinned", accel.ErrConflict, d)
	}
	for _, i := range forms {
		if !i.evictable() {
			return fmt.Errorf("%w: %s is being read or filled", accel.ErrConflict, i.key())
		}
	}
	return nil
}
