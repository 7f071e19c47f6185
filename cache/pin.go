package cache

import (
	"fmt"
	"maps"
	"slices"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Pin adds digests (of blobs or manifests, also of such as are not here yet) to what owner
// holds; on disk when it returns. What an owner holds is not evicted.
func (s *Store) Pin(owner string, digests ...digest.Digest) error {
	if owner == "" || len(owner) > maxNameBytes {
		return fmt.Errorf("%w: a pin's owner of %d bytes", accel.ErrInvalid, len(owner))
	}
	for _, d := range digests {
		if _, err := keyOf(d); err != nil {
			return err
		}
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	held := s.pins[owner]
	for _, d := range digests {
		if slices.Contains(held, d) {
			continue
		}
		held = append(held[:len(held):len(held)], d)
		s.pinned[d]++
		if b := s.blobs[d]; b != nil {
			b.pins++
		}
	}
	s.pins[owner] = held
	s.index.put(tablePins, owner, encodePins(held))
	s.mu.Unlock()
	return s.commit()
}

// Unpin releases all that owner holds; on disk when it returns. accel.ErrNotFound where it holds nothing.
func (s *Store) Unpin(owner string) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	held, ok := s.pins[owner]
	if !ok {
		s.mu.Unlock()
		return fmt.Errorf("%w: nothing is pinned by %q", accel.ErrNotFound, owner)
	}
	for _, d := range held {
		if s.pinned[d]--; s.pinned[d] == 0 {
			delete(s.pinned, d)
		}
		if b := s.blobs[d]; b != nil {
			b.pins--
		}
	}
	delete(s.pins, owner)
	s.index.remove(tablePins, owner)
	s.mu.Unlock()
	return s.commit()
}

// Pins returns what each owner holds.
func (s *Store) Pins() map[string][]digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.pins) // the lists are never changed, only replaced
}
