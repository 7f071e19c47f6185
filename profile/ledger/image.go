package ledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"accel"
	"accel/profile"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// Image is where a platform manifest belongs to.
type Image struct {
	// Repository is the source's, "host/path"; Digest that of the image that was pushed, an
	// index or the manifest itself.
	Repository string        `json:"repository"`
	Digest     digest.Digest `json:"digest"`
	Platform   string        `json:"platform"`
	// Target is the repository of the converted image; the profile is published there.
	Target string `json:"target"`
}

// Given is what is known of an image that nobody need have started. A nil list is not known.
type Given struct {
	Predicted, Inherited []accel.ProfileItem
	// Listed is what the image's maker lists.
	Listed []accel.ProfileItem
	// Failed says that a prediction was tried and failed. After some of these none is tried any more.
	Failed bool
}

// state is one image while its lock is held.
type state struct {
	l     *Ledger
	row   *row
	fresh map[kind][]byte // parts to write; nil ones are taken away
	had   map[kind][]byte // parts as they are in the file, packed
	sums  map[kind]*profile.Summary
	// touched says that the row has to be written even if no part has.
	touched bool
}

// change runs do on an image under its lock, and writes what it changed. With image, an
// unknown manifest is begun; else it is an accel.ErrNotFound.
func (l *Ledger) change(ctx context.Context, manifest digest.Digest, begin bool, do func(*state) error) error {
	if err := manifest.Validate(); err != nil {
		return fmt.Errorf("%w: manifest %.100q: %w", accel.ErrInvalid, manifest, err)
	}
	unlock, err := l.images.Lock(ctx, manifest.String())
	if err != nil {
		return err
	}
	defer unlock()
	s := &state{l: l, fresh: map[kind][]byte{}, had: map[kind][]byte{}, sums: map[kind]*profile.Summary{}}
	begun := false
	err = l.view(ctx, func(bt *bbolt.Tx) (err error) {
		if s.row, err = l.get(bt, manifest); err != nil {
			return err
		}
		for _, k := range kinds {
			if raw := bt.Bucket(bucketParts).Get(partKey(manifest, k)); raw != nil {
				s.had[k] = slices.Clone(raw)
			}
		}
		return nil
	})
	if errors.Is(err, accel.ErrNotFound) && begin {
		s.row, begun, err = &row{Manifest: manifest, UsedAt: l.now()}, true, nil
	}
	if err != nil {
		return err
	}
	if err := do(s); err != nil {
		return err
	}
	if len(s.fresh) == 0 && !s.touched && !begun {
		return nil
	}
	err = l.update(ctx, func(bt *bbolt.Tx) error {
		if _, err := l.get(bt, manifest); err != nil && !begun {
			return err // it made room meanwhile
		}
		if len(s.row.Places) == 0 {
			if begun {
				return nil
			}
			return l.put(bt, manifest, nil, nil)
		}
		if err := l.put(bt, manifest, s.row, s.fresh); err != nil {
			return err
		}
		return l.makeRoom(bt, manifest)
	})
	if err == nil && !s.row.DueAt.IsZero() {
		l.wake()
	}
	return err
}

// makeRoom removes the images that were used the longest time ago, but for keep, until
// the bounds hold.
func (l *Ledger) makeRoom(bt *bbolt.Tx, keep digest.Digest) error {
	for metaNumber(bt, keyImages) > uint64(l.o.MaxImages) || int64(metaNumber(bt, keyBytes)) > l.o.MaxBytes {
		k, _ := bt.Bucket(bucketUsed).Cursor().First()
		if k != nil && digest.Digest(k[8:]) == keep {
			c := bt.Bucket(bucketUsed).Cursor()
			c.Seek(k)
			k, _ = c.Next()
		}
		if k == nil {
			return nil // one image alone: its parts are bounded
		}
		if err := l.put(bt, digest.Digest(k[8:]), nil, nil); err != nil {
			return err
		}
	}
	return nil
}

// part is a part as it is now, unpacked; nil where there is none. One that makes no
// sense any more is none.
func (s *state) part(k kind, maxBytes int) []byte {
	packed, changed := s.fresh[k]
	if !changed {
		packed = s.had[k]
	}
	if packed == nil {
		return nil
	}
	b, err := profile.Unpack(packed, maxBytes)
	if err != nil {
		s.l.o.Log.Warn("a part of an image's profile is damaged and passed over", "manifest", s.row.Manifest, "part", string(k), "error", err)
		return nil
	}
	return b
}

// profile is a part that is one; ok is false where there is none.
func (s *state) profile(k kind) (p accel.Profile, ok bool) {
	b := s.part(k, profile.MaxEncodedBytes)
	if b == nil {
		return p, false
	}
	p, err := profile.Decode(b)
	if err != nil {
		s.l.o.Log.Warn("a part of an image's profile is damaged and passed over", "manifest", s.row.Manifest, "part", string(k), "error", err)
	}
	return p, err == nil
}

func (s *state) setProfile(k kind, p accel.Profile) error {
	p.Manifest = s.row.Manifest
	b, err := profile.Encode(p)
	if err != nil {
		return err
	}
	s.fresh[k] = profile.Pack(b)
	return nil
}

// summary is a part that is one, empty where there is none. What changes it calls setSummary.
func (s *state) summary(k kind) *profile.Summary {
	if s.sums[k] == nil {
		s.sums[k] = s.readSummary(k)
	}
	return s.sums[k]
}

func (s *state) readSummary(k kind) *profile.Summary {
	b := s.part(k, profile.MaxSummaryBytes)
	if b != nil {
		sum, err := profile.DecodeSummary(b)
		if err == nil && sum.Manifest() == s.row.Manifest {
			return sum
		}
		s.l.o.Log.Warn("the recorded starts of an image are damaged and begun anew", "manifest", s.row.Manifest, "error", err)
	}
	return profile.NewSummary(s.row.Manifest)
}

func (s *state) setSummary(k kind, sum *profile.Summary) {
	s.sums[k] = sum
	if k == partSummary {
		f := &s.row.Starts
		f.Kept, f.Complete, f.Bar = sum.Reports(), sum.Complete(), sum.Bar()
	}
	if sum.Reports() == 0 {
		s.fresh[k] = nil
		return
	}
	s.fresh[k] = profile.Pack(sum.Encode())
}

func (s *state) remove(k kind) {
	if _, changed := s.fresh[k]; changed || s.had[k] != nil {
		s.fresh[k] = nil
		delete(s.sums, k)
	}
}

// used notes a use, about to the hour.
func (s *state) used() {
	if now := s.l.now(); now.Sub(s.row.UsedAt) >= useStep || now.Before(s.row.UsedAt) {
		s.row.UsedAt, s.touched = now, true
	}
}

// Learn says that a platform manifest is part of an image, and what is known of its start;
// layers is how many it has. Lists that are nil leave what was known before.
func (l *Ledger) Learn(ctx context.Context, manifest digest.Digest, at Image, layers int, g Given) error {
	return l.change(ctx, manifest, true, func(s *state) error {
		s.learnPlace(at)
		s.row.Layers, s.touched = layers, true
		if g.Failed {
			s.row.Foretells++
		}
		if s.row.Foretells >= maxForetells && !s.row.Foretold && g.Predicted == nil {
			s.row.Foretold = true
			s.l.o.Log.Warn("what starts of an image read could not be predicted, and is not tried any more; recorded starts will tell", "manifest", manifest, "image", at.Repository, "tries", s.row.Foretells)
		}
		s.row.Foretold = s.row.Foretold || g.Predicted != nil
		s.used()
		for k, items := range map[kind][]accel.ProfileItem{partPredicted: g.Predicted, partInherited: g.Inherited, partListed: g.Listed} {
			if items == nil {
				continue
			}
			if len(items) == 0 {
				s.remove(k)
				continue
			}
			p := profile.Union(accel.Profile{Origin: accel.ProfileOrigin(k), Items: items})
			if err := s.setProfile(k, p); err != nil {
				return fmt.Errorf("profile of %s: %w", manifest, err)
			}
		}
		return s.compose()
	})
}

// learnPlace adds a place, or brings it up to date; the oldest makes room.
func (s *state) learnPlace(at Image) {
	known := slices.IndexFunc(s.row.Places, func(p place) bool { return p.Repository == at.Repository && p.Digest == at.Digest })
	if known >= 0 {
		p := &s.row.Places[known]
		if p.Target != at.Target {
			p.Artifact, p.Stale = "", nil
			s.row.Published = "" // not there yet
		}
		p.Image, p.LearnedAt = at, s.l.now()
		return
	}
	if len(s.row.Places) == maxPlaces {
		s.row.Places = s.row.Places[1:]
	}
	if !slices.ContainsFunc(s.row.Places, func(p place) bool { return p.Target == at.Target }) {
		s.row.Published = ""
	}
	s.row.Places = append(s.row.Places, place{Image: at, LearnedAt: s.l.now()})
}

// Leave says that an image is no more: it is no place of its platform manifests then, and
// those without any are forgotten.
func (l *Ledger) Leave(ctx context.Context, repository string, image digest.Digest) error {
	manifests, err := l.manifestsOf(ctx, image)
	if err != nil {
		return err
	}
	for _, m := range manifests {
		err := l.change(ctx, m, false, func(s *state) error {
			s.row.Places = slices.DeleteFunc(s.row.Places, func(p place) bool { return p.Repository == repository && p.Digest == image })
			s.touched = true
			return nil
		})
		if err != nil && !errors.Is(err, accel.ErrNotFound) {
			return err
		}
	}
	return nil
}

// Import sets the profile that stands until complete starts are recorded from now on: what was recorded
// before is forgotten. accel.ErrNotFound for an unknown manifest.
func (l *Ledger) Import(ctx context.Context, manifest digest.Digest, p accel.Profile) error {
	return l.change(ctx, manifest, false, func(s *state) error {
		p = profile.Union(accel.Profile{Origin: accel.ProfileImported, Items: s.inImage(p.Items)})
		if err := s.setProfile(partImported, p); err != nil {
			return err
		}
		for _, k := range []kind{partSummary, partNext} {
			s.setSummary(k, profile.NewSummary(manifest))
		}
		s.used()
		return s.compose()
	})
}

// List sets what a person lists; none takes it away. It is always in, whatever else is known. accel.ErrNotFound for an
// unknown manifest.
func (l *Ledger) List(ctx context.Context, manifest digest.Digest, items []accel.ProfileItem) error {
	return l.change(ctx, manifest, false, func(s *state) error {
		if items = s.inImage(items); len(items) == 0 {
			s.remove(partPaths)
		} else if err := s.setProfile(partPaths, profile.Union(accel.Profile{Origin: accel.ProfileListed, Items: items})); err != nil {
			return err
		}
		s.used()
		return s.compose()
	})
}

// Remove forgets all that is known of the start, recorded or not. The image stays known, so
// its next starts are recorded anew. accel.ErrNotFound for an unknown manifest.
func (l *Ledger) Remove(ctx context.Context, manifest digest.Digest) error {
	return l.change(ctx, manifest, false, func(s *state) error {
		for _, k := range kinds {
			if k != partPublished && k != partSeen { // what was reported does not count again
				s.remove(k)
			}
		}
		s.row.Starts = startsRow{}
		s.touched = true
		return s.compose()
	})
}

// inImage leaves out what cannot be in the image.
func (s *state) inImage(items []accel.ProfileItem) []accel.ProfileItem {
	return slices.DeleteFunc(slices.Clone(items), func(i accel.ProfileItem) bool { return i.Layer >= s.row.Layers })
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
