package ledger

import (
	"time"

	"accel"
	"accel/profile"
)

const (
	// materialShare: a published profile that foretells less of the new one than this is
	// replaced soon.
	materialShare = 0.95
	// materialVain: likewise one that names so many more bytes, in proportion to the new one.
	materialVain = 0.25
)

// compose makes the profile that stands of all parts, and sees to its publication.
func (s *state) compose() error {
	p, ok := s.standing(true)
	if !ok {
		s.remove(partServed)
		if s.row.Served != (servedRow{}) {
			s.row.Served, s.touched = servedRow{}, true
		}
		s.plan(accel.Profile{}, false)
		return nil
	}
	p.Manifest = s.row.Manifest
	version := profile.Version(p)
	if version != s.row.Served.Version || s.had[partServed] == nil {
		if err := s.setProfile(partServed, p); err != nil {
			return err
		}
		s.row.Served = servedRow{Origin: p.Origin, Version: version, Bytes: p.Bytes(), Items: len(p.Items), UpdatedAt: s.l.now()}
		s.touched = true
	}
	s.plan(p, true)
	return nil
}

// standing is the profile that follows from the parts, with or without what is listed; ok is
// false where nothing is known.
func (s *state) standing(withListed bool) (p accel.Profile, ok bool) {
	sum := s.summary(partSummary)
	var others []accel.Profile
	if sum.Reports() > 0 {
		p = sum.Profile(profile.DefaultShare)
		ok = len(p.Items) > 0 // else the starts have nothing in common
	}
	if sum.Complete() == 0 || !ok {
		for _, k := range []kind{partImported, partInherited, partPredicted} {
			given, known := s.profile(k)
			if !known {
				continue
			}
			if !ok {
				p, ok = given, true
			} else {
				others = append(others, given)
			}
			break
		}
	}
	for _, k := range []kind{partListed, partPaths} {
		listed, known := s.profile(k)
		switch {
		case !known || !withListed:
		case !ok || len(p.Items) == 0:
			p, ok = listed, true
		default:
			others = append(others, listed)
		}
	}
	if !ok || len(p.Items) == 0 {
		return p, false
	}
	return profile.Union(p, others...), true
}

// rank orders origins by how much they are worth.
func rank(o accel.ProfileOrigin) int {
	switch o {
	case accel.ProfileRecorded:
		return 4
	case accel.ProfileImported:
		return 3
	case accel.ProfileInherited:
		return 2
	default:
		return 1
	}
}

// plan sets when the profile is to be published next.
func (s *state) plan(p accel.Profile, ok bool) {
	due := time.Time{}
	published, is := s.profile(partPublished)
	is = is && s.row.Published != ""
	// A registry that deletes nothing is not filled with artifacts.
	soon := later(s.l.now(), s.row.PublishedAt.Add(s.l.o.PublishEvery<<s.mostStale()))
	switch {
	case s.l.o.Unpublished:
	case !ok:
		if s.anyArtifact() {
			due = soon
		}
	case !is, rank(p.Origin) != rank(published.Origin), material(p, published):
		due = soon
	case profile.Version(p) != s.row.Published:
		// The wait is counted from the first such change.
		if due = s.row.DueAt; due.IsZero() {
			due = later(s.l.now(), s.row.PublishedAt).Add(s.l.o.SettleAfter)
		}
	}
	if s.row.Tries > 0 && !due.IsZero() && due.Before(s.row.DueAt) {
		due = s.row.DueAt // the registry refused; what is new does not hurry it
	}
	if !due.Equal(s.row.DueAt) {
		s.row.DueAt, s.touched = due, true
	}
}

// material says that a published profile serves starts badly that are as the new one says.
func material(p, published accel.Profile) bool {
	c := profile.Coverage(p, published)
	return c.Share() < materialShare || float64(c.VainBytes) > materialVain*float64(c.RecordedBytes)
}

func (s *state) anyArtifact() bool {
	for _, p := range s.row.Places {
		if p.Artifact != "" {
			return true
		}
	}
	return false
}
