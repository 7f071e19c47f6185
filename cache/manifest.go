package cache

import (
	"fmt"

	"accel"

	"github.com/opencontainers/go-digest"
)

const (
	// maxManifestBytes is what registries commonly allow.
	maxManifestBytes = 4 << 20
	// manifestsBytes bounds all manifests together: several thousand images' worth.
	manifestsBytes = 64 << 20
)

// Manifest is a manifest or index as it came.
type Manifest struct {
	Digest    digest.Digest
	MediaType string
	Raw       []byte
}

// manifestUse is what is in memory of each.
type manifestUse struct {
	bytes int64
	seq   uint64 // put or read last, as a count
}

// Manifest returns the manifest d. accel.ErrNotFound.
func (s *Store) Manifest(d digest.Digest) (Manifest, error) {
	key, err := keyOf(d)
	if err != nil {
		return Manifest{}, err
	}
	content, ok := s.index.get(tableManifests, key)
	if !ok {
		return Manifest{}, fmt.Errorf("%w: manifest %s", accel.ErrNotFound, d)
	}
	r, err := decodeManifest(content)
	if err != nil {
		return Manifest{}, err
	}
	s.mu.Lock()
	if u, ok := s.manifests[d]; ok {
		u.seq = s.nextSeq()
		s.manifests[d] = u
	}
	s.mu.Unlock()
	return Manifest{Digest: d, MediaType: r.mediaType, Raw: r.raw}, nil
}

// PutManifest stores m, checked against its digest (ErrDigest); at most 4 MiB
// (accel.ErrInvalid). It is on disk within a second or so. All manifests together take at most
// 64 MiB: those read the longest ago go first, pinned ones never.
func (s *Store) PutManifest(m Manifest) error {
	key, err := keyOf(m.Digest)
	if err != nil {
		return err
	}
	if len(m.Raw) > maxManifestBytes || len(m.MediaType) > 256 {
		return fmt.Errorf("%w: manifest %s has %d bytes, more than %d", accel.ErrInvalid, m.Digest, len(m.Raw), maxManifestBytes)
	}
	if got := m.Digest.Algorithm().FromBytes(m.Raw); got != m.Digest {
		return fmt.Errorf("%w: manifest %s has digest %s", ErrDigest, m.Digest, got)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	r := manifestRow{seq: s.nextSeq(), mediaType: m.MediaType, raw: m.Raw}
	s.index.put(tableManifests, key, r.encode())
	s.noteManifest(m.Digest, int64(len(m.Raw)), r.seq)
	s.trimManifests()
	return nil
}

// noteManifest counts one that is in the index; s.mu is held.
func (s *Store) noteManifest(d digest.Digest, size int64, seq uint64) {
	s.manifestB += size - s.manifests[d].bytes
	s.manifests[d] = manifestUse{bytes: size, seq: seq}
}

// trimManifests removes those read the longest ago; s.mu is held.
func (s *Store) trimManifests() {
	for s.manifestB > s.manifestsMax {
		var oldest digest.Digest
		for d, u := range s.manifests {
			if s.pinned[d] == 0 && (oldest == "" || u.seq < s.manifests[oldest].seq) {
				oldest = d
			}
		}
		if oldest == "" {
			return
		}
		s.removeManifest(oldest)
	}
}

// removeManifest reports whether there was one; s.mu is held.
func (s *Store) removeManifest(d digest.Digest) bool {
	u, ok := s.manifests[d]
	if !ok {
		return false
	}
	key, err := keyOf(d)
	if err != nil {
		return false // none of that name was let in
	}
	s.index.remove(tableManifests, key)
	s.manifestB -= u.bytes
	delete(s.manifests, d)
	return true
}
