package ledger

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// Publication is what is to be published of one platform manifest.
type Publication struct {
	Manifest digest.Digest
	// Profile is nil where there is none any more: what was published is to be removed.
	Profile *accel.Profile
	Version digest.Digest // of the Profile
	Places  []Place
}

// Place is where a profile is published.
type Place struct {
	Image
	// Artifact is the digest of what is published there, empty for nothing. Stale are former
	// ones that are still to be deleted.
	Artifact digest.Digest
	Stale    []digest.Digest
	// Gone says that the source or the target is no more.
	Gone bool
}

const (
	// idlePause is how long NextPublication sleeps where nothing is due and nobody wakes it.
	idlePause = time.Hour
	// passedPause is how long where something was passed over: nobody says when that ends.
	passedPause = 5 * time.Second
)

func (l *Ledger) wake() {
	select {
	case l.due <- struct{}{}:
	default:
	}
}

// taken are the publications that somebody works at.
type taken struct {
	mu   sync.Mutex
	have map[digest.Digest]bool // whether it was hastened meanwhile
}

// add is false where it was there.
func (t *taken) add(manifest digest.Digest) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, has := t.have[manifest]; has {
		return false
	}
	if t.have == nil {
		t.have = map[digest.Digest]bool{}
	}
	t.have[manifest] = false
	return true
}

func (t *taken) has(manifest digest.Digest) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, has := t.have[manifest]
	return has
}

func (t *taken) hasten(manifest digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, has := t.have[manifest]; has {
		t.have[manifest] = true
	}
}

func (t *taken) hastened(manifest digest.Digest) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.have[manifest]
}

func (t *taken) remove(manifest digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.have, manifest)
}

// NextPublication waits until a profile is due to be published, and returns it. It is the caller's until Published or
// PublicationFailed has returned nil. Those with a place that may says no to are passed over for now; nil: none is. Only one
// caller may wait at a time. A ledger that is Unpublished has none until ctx ends.
func (l *Ledger) NextPublication(ctx context.Context, may func(Image) bool) (Publication, error) {
	for {
		manifest, pause, err := l.firstDue(ctx, may)
		if err != nil {
			return Publication{}, err
		}
		if manifest != "" && l.taken.add(manifest) {
			p, err := l.publication(ctx, manifest)
			if err == nil {
				return p, nil
			}
			l.taken.remove(manifest)
			if !errors.Is(err, accel.ErrNotFound) && !errors.Is(err, errNotDue) {
				return Publication{}, err
			}
			continue // it made room meanwhile, or was published just then
		}
		timer := time.NewTimer(pause)
		select {
		case <-l.due:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// firstDue is the first that is due and may be taken; else how long to wait for one.
func (l *Ledger) firstDue(ctx context.Context, may func(Image) bool) (manifest digest.Digest, pause time.Duration, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		manifest, pause = "", idlePause
		if l.o.Unpublished {
			return nil
		}
		c := bt.Bucket(bucketDue).Cursor()
		for k, _ := c.First(); len(k) > 8; k, _ = c.Next() {
			m := digest.Digest(k[8:])
			if wait := timeOf(k[:8]).Sub(l.now()); wait > 0 {
				pause = min(pause, wait)
				return nil
			}
			if l.taken.has(m) {
				continue
			}
			r, err := l.get(bt, m)
			if err != nil {
				return err
			}
			if may != nil && slices.ContainsFunc(r.Places, func(p place) bool { return !may(p.Image) }) {
				pause = passedPause
				continue
			}
			manifest = m
			return nil
		}
		return nil
	})
	return manifest, pause, err
}

// left says that a publication is nobody's any more.
func (l *Ledger) left(p Publication) {
	l.taken.remove(p.Manifest)
	l.wake()
}

var errNotDue = errors.New("the profile is not due to be published any more")

func (l *Ledger) publication(ctx context.Context, manifest digest.Digest) (p Publication, err error) {
	err = l.change(ctx, manifest, false, func(s *state) error {
		if s.row.DueAt.IsZero() || s.row.DueAt.After(l.now()) {
			return errNotDue
		}
		p = Publication{Manifest: manifest}
		if served, ok := s.profile(partServed); ok {
			p.Profile, p.Version = &served, s.row.Served.Version
		}
		for _, at := range s.row.Places {
			p.Places = append(p.Places, Place{Image: at.Image, Artifact: at.Artifact, Stale: at.Stale})
		}
		return nil
	})
	return p, err
}

// Published says how p's places stand now that it was published.
func (l *Ledger) Published(ctx context.Context, p Publication) error {
	err := l.change(ctx, p.Manifest, false, func(s *state) error {
		for _, at := range p.Places {
			n := slices.IndexFunc(s.row.Places, func(o place) bool { return o.Image == at.Image })
			switch {
			case n < 0: // it was left meanwhile
			case at.Gone:
				s.row.Places = slices.Delete(s.row.Places, n, n+1)
			default:
				s.row.Places[n].Artifact, s.row.Places[n].Stale = at.Artifact, at.Stale[max(0, len(at.Stale)-maxStale):]
			}
		}
		s.row.PublishedAt, s.row.DueAt, s.row.Tries, s.touched = l.now(), time.Time{}, 0, true
		s.row.Published = p.Version
		if p.Profile == nil {
			s.remove(partPublished)
		} else if err := s.setProfile(partPublished, *p.Profile); err != nil {
			return err
		}
		for _, at := range s.row.Places { // one that came meanwhile has nothing yet
			if at.Artifact == "" && p.Profile != nil {
				s.row.Published = ""
			}
		}
		served, ok := s.profile(partServed)
		s.plan(served, ok)
		return nil
	})
	if err == nil || errors.Is(err, accel.ErrNotFound) { // or forgotten meanwhile
		l.left(p)
		return nil
	}
	return err
}

func (s *state) mostStale() (n int) {
	for _, p := range s.row.Places {
		n = max(n, len(p.Stale))
	}
	return n
}

// PublicationFailed puts p off, for longer each time, unless it was hastened meanwhile.
func (l *Ledger) PublicationFailed(ctx context.Context, p Publication) error {
	err := l.change(ctx, p.Manifest, false, func(s *state) error {
		if l.taken.hastened(p.Manifest) {
			s.hasten()
			return nil
		}
		s.row.Tries++
		s.row.DueAt, s.touched = l.now().Add(l.o.PublishEvery<<min(s.row.Tries, maxTries)), true
		return nil
	})
	if err == nil || errors.Is(err, accel.ErrNotFound) {
		l.left(p)
		return nil
	}
	return err
}

// Hasten makes a publication due that was put off, or that somebody works at and that fails: what it lacked is there.
func (l *Ledger) Hasten(ctx context.Context, manifest digest.Digest) error {
	l.taken.hasten(manifest)
	err := l.change(ctx, manifest, false, func(s *state) error {
		if s.row.Tries > 0 && !s.row.DueAt.IsZero() {
			s.hasten()
		}
		return nil
	})
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	l.wake()
	return err
}

func (s *state) hasten() {
	s.row.DueAt, s.row.Tries, s.touched = s.l.now(), 0, true
}
