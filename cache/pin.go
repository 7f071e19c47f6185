package cache

import "github.com/opencontainers/go-digest"

// Pin adds digests (of blobs or manifests, also of such as are not here yet) to what owner
// holds; on disk when it returns. What an owner holds is not evicted.
func (s *Store) Pin(owner string, digests ...digest.Digest) error { return nil }

// Unpin releases all that owner holds; on disk when it returns. accel.ErrNotFound where it holds nothing.
func (s *Store) Unpin(owner string) error { return nil }

// Pins returns what each owner holds.
func (s *Store) Pins() map[string][]digest.Digest { return nil }
