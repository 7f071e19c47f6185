package lazy

import (
	"fmt"
	"slices"
	"time"

	"accel"
	"accel/snapshot"

	"github.com/opencontainers/go-digest"
)

const (
	// WantedTime is how long RecordNext counts.
	WantedTime = 10 * time.Minute
	// maxWanted images are, at a time.
	maxWanted = 64
)

// wanted is an image whose next start somebody wants to have recorded.
type wanted struct {
	until    time.Time
	manifest digest.Digest // by which containerd asked for it since; empty: it has not
}

// unrecorded is why a start is not recorded.
type unrecorded struct{ container, reason string }

// RecordNext has the next start of an image recorded whether or not there are recordings enough and all of it is here, where
// its layers are mounted anew by a pull of this name within WantedTime. accel.ErrConflict, which wraps *Declined, where it
// cannot be mounted lazily.
func (l *Lazy) RecordNext(image string) error {
	ref, err := l.reference(image)
	if err != nil {
		return fmt.Errorf("%w: %w", accel.ErrConflict, err)
	}
	l.starts.want(nameIn(ref.Name(), ref), time.Now())
	return nil
}

func (s *starts) want(name string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, w := range s.wanted {
		if !now.Before(w.until) || len(s.wanted) >= maxWanted { // full: any one goes, it is a matter of minutes
			delete(s.wanted, n)
		}
	}
	s.wanted[name] = &wanted{until: now.Add(WantedTime)}
}

// askedAs notes by which manifest containerd asks for a layer of an image.
func (s *starts) askedAs(name string, img *image) {
	s.asked(img)
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.wanted[name]; w != nil {
		w.manifest = img.manifest
	}
}

// isWanted reports whether somebody wants the image's next start. s.mu is held.
func (s *starts) isWanted(manifest digest.Digest) bool {
	for _, w := range s.wanted {
		if w.manifest == manifest && time.Now().Before(w.until) {
			return true
		}
	}
	return false
}

// unwant: that start has come. s.mu is held.
func (s *starts) unwant(manifest digest.Digest) {
	for n, w := range s.wanted {
		if w.manifest == manifest {
			delete(s.wanted, n)
		}
	}
}

// skip remembers why a start is not recorded. s.mu is held.
func (s *starts) skip(e snapshot.Event, reason string) {
	if s.skipped = append(s.skipped, unrecorded{e.Key, reason}); len(s.skipped) > maxStarts {
		s.skipped = slices.Delete(s.skipped, 0, 1)
	}
}

// whyNot is why the start of a container is not being recorded. s.mu is held.
func (s *starts) whyNot(container string) string {
	for _, u := range slices.Backward(s.skipped) {
		if (Start{Container: u.container}).Is(container) {
			return u.reason
		}
	}
	for _, p := range slices.Backward(s.past) {
		if p.Is(container) {
			return "the recording is over"
		}
	}
	return "none was seen on layers that are mounted lazily; why an image is not, the node's log says"
}
