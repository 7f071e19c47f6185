package ledger

import (
	"context"
	"errors"
	"slices"
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

// idlePause is how long NextPublication sleeps where nothing is due and nobody wakes it.
const idlePause = time.Hour

func (l *Ledger) wake() {
	select {
	case l.due <- struct{}{}:
	default:
	}
}

// NextPublication waits until a profile is due to be published, and returns it. Only one caller may
// wait at a time. It is due again until Published or PublicationFailed is called.
func (l *Ledger) NextPublication(ctx context.Context) (Publication, error) {
	for {
		manifest, at, err := l.firstDue(ctx)
		if err != nil {
			return Publication{}, err
		}
		pause := idlePause
		if manifest != "" {
			if pause = min(pause, at.Sub(l.now())); pause <= 0 {
				p, err := l.publication(ctx, manifest)
				if err == nil || !errors.Is(err, accel.ErrNotFound) {
					return p, err
				}
				continue // it made room meanwhile
			}
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

func (l *Ledger) firstDue(ctx context.Context) (manifest digest.Digest, at time.Time, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		if k, _ := bt.Bucket(bucketDue).Cursor().First(); len(k) > 8 {
			manifest, at = digest.Digest(k[8:]), timeOf(k[:8])
		}
		return nil
	})
	return manifest, at, err
}

func (l *Ledger) publication(ctx context.Context, manifest digest.Digest) (p Publication, err error) {
	err = l.change(ctx, manifest, false, func(s *state) error {
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
	if errors.Is(err, accel.ErrNotFound) {
		return nil // forgotten meanwhile
	}
	return err
}

func (s *state) mostStale() (n int) {
	for _, p := range s.row.Places {
		n = max(n, len(p.Stale))
	}
	return n
}

// PublicationFailed puts p off, for longer each time.
func (l *Ledger) PublicationFailed(ctx context.Context, p Publication) error {
	err := l.change(ctx, p.Manifest, false, func(s *state) error {
		s.row.Tries++
		s.row.DueAt, s.touched = l.now().Add(l.o.PublishEvery<<min(s.row.Tries, maxTries)), true
		return nil
	})
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	return err
}
