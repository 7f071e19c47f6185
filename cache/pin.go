package cache

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Pin adds digests (of blobs, layers or manifests, also of such as are not here yet) to what owner
// holds; on disk when it returns. What an owner holds is not evicted, in whatever form it is here.
func (s *Store) Pin(owner string, digests ...digest.Digest) error {
	if err := checkPin(owner, digests); err != nil {
		return err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.hold(owner, digests)
	s.index.put(tablePins, owner, encodePins(s.pins[owner]))
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
	if _, ok := s.pins[owner]; !ok {
		s.mu.Unlock()
		return fmt.Errorf("%w: nothing is pinned by %q", accel.ErrNotFound, owner)
	}
	s.letGo(owner)
	s.index.remove(tablePins, owner)
	s.mu.Unlock()
	return s.commit()
}

// ReplacePins makes pins, by owner, all that owners whose names begin with prefix hold; all at once, and on disk when it
// returns. accel.ErrInvalid where prefix is empty, or an owner's name does not begin with it.
func (s *Store) ReplacePins(prefix string, pins map[string][]digest.Digest) error {
	if prefix == "" {
		return fmt.Errorf("%w: pins of everybody to be replaced", accel.ErrInvalid)
	}
	for owner, digests := range pins {
		if !strings.HasPrefix(owner, prefix) {
			return fmt.Errorf("%w: a pin of %.80q among those of %.80q", accel.ErrInvalid, owner, prefix)
		}
		if err := checkPin(owner, digests); err != nil {
			return err
		}
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	rows := map[rowKey][]byte{}
	for owner := range s.pins {
		if strings.HasPrefix(owner, prefix) {
			s.letGo(owner)
			rows[rowKey{tablePins, owner}] = nil
		}
	}
	for owner, digests := range pins {
		if len(digests) > 0 {
			s.hold(owner, digests)
			rows[rowKey{tablePins, owner}] = sealRow(tablePins, owner, encodePins(s.pins[owner]))
		}
	}
	s.index.putAll(rows)
	s.mu.Unlock()
	return s.commit()
}

func checkPin(owner string, digests []digest.Digest) error {
	if owner == "" || len(owner) > maxNameBytes {
		return fmt.Errorf("%w: a pin's owner of %d bytes", accel.ErrInvalid, len(owner))
	}
	for _, d := range digests {
		if _, err := keyOf(d); err != nil {
			return err
		}
	}
	return nil
}

// hold adds to what owner holds, in memory. s.mu is held.
func (s *Store) hold(owner string, digests []digest.Digest) {
	held := s.pins[owner]
	for _, d := range digests {
		if slices.Contains(held, d) {
			continue
		}
		held = append(held[:len(held):len(held)], d)
		s.pinned[d]++
		for _, i := range s.forms(d) {
			i.pins++
		}
	}
	s.pins[owner] = held
}

// letGo releases all that owner holds, in memory. s.mu is held.
func (s *Store) letGo(owner string) {
	for _, d := range s.pins[owner] {
		if s.pinned[d]--; s.pinned[d] == 0 {
			delete(s.pinned, d)
		}
		for _, i := range s.forms(d) {
			i.pins--
		}
	}
	delete(s.pins, owner)
}

// Pins returns what each owner holds.
func (s *Store) Pins() map[string][]digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.pins) // the lists are never changed, only replaced
}
