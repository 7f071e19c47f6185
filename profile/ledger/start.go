package ledger

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"accel"
	"accel/profile"
)

const (
	// coverageWeight is the newest start's in the moving figures.
	coverageWeight = 0.25
	// badShare: a complete start of which the profile foretold less may be of a new use.
	badShare = 0.8
	// betterShare is by how much more the second summary must foretell of its own starts
	// to take the first one's place: four starts alone foretell themselves better than
	// others.
	betterShare = 0.1
	// enoughStarts is how many complete starts a summary must have to be judged, or to take
	// another one's place: as many as one node may have in it.
	enoughStarts = profile.MaxReportsOfNode
)

// Receipt says what became of a report.
type Receipt struct {
	// Duplicate: it had been counted before.
	Duplicate bool
	// WantMore: more recordings would make the profile better.
	WantMore bool
}

// Report takes in what a start read. What cannot be in the image is left out. The error is an
// accel.ErrNotFound for an unknown manifest, an accel.ErrInvalid for a report that makes no sense.
func (l *Ledger) Report(ctx context.Context, r profile.Report) (receipt Receipt, err error) {
	if _, err := profile.EncodeReport(r); err != nil {
		l.metrics.reports.WithLabelValues("refused").Inc()
		return receipt, err
	}
	coverage := -1.0
	err = l.change(ctx, r.Manifest, false, func(s *state) error {
		receipt, coverage = Receipt{}, -1
		if !s.first(r) {
			receipt = Receipt{Duplicate: true, WantMore: s.wantMore(false)}
			return nil
		}
		r.Items = s.inImage(r.Items)
		s.used()
		coverage = s.measure(r)
		changed, err := s.take(r, coverage)
		if err != nil {
			return err
		}
		receipt.WantMore = s.wantMore(changed)
		return nil
	})
	switch {
	case errors.Is(err, accel.ErrNotFound), errors.Is(err, accel.ErrInvalid):
		l.metrics.reports.WithLabelValues("refused").Inc()
	case err == nil && receipt.Duplicate:
		l.metrics.reports.WithLabelValues("duplicate").Inc()
	case err == nil:
		l.metrics.reports.WithLabelValues("counted").Inc()
		if coverage >= 0 {
			l.metrics.coverage.Observe(coverage)
		}
	}
	return receipt, err
}

// first notes a report's id, and says whether it is new. Only the newest ids are known; an
// old one that comes again changes figures, and not the sample.
func (s *state) first(r profile.Report) bool {
	sum := sha256.Sum256([]byte(r.Node + "\x00" + r.ID))
	id := sum[:8]
	seen := s.had[partSeen]
	for n := 0; n+8 <= len(seen); n += 8 {
		if bytes.Equal(seen[n:n+8], id) {
			return false
		}
	}
	if len(seen) >= 8*maxSeen {
		seen = seen[len(seen)-8*(maxSeen-1):]
	}
	s.fresh[partSeen] = slices.Concat(seen, id)
	return true
}

// measure adds the report to the figures, and returns how much the profile that stands
// foretold of it; less than 0 where that is not known.
func (s *state) measure(r profile.Report) (share float64) {
	f := &s.row.Starts
	f.Count++
	if r.End == profile.EndAnswered && r.Took > 0 {
		if r.Profile != "" {
			f.With, f.TookW = f.With+1, f.TookW+r.Took
		} else {
			f.Without, f.TookWO = f.Without+1, f.TookWO+r.Took
		}
	}
	served, ok := s.profile(partServed)
	if !r.Complete || !ok || len(r.Items) == 0 {
		return -1
	}
	c := profile.Coverage(accel.Profile{Items: r.Items}, served)
	share = c.Share()
	weight := coverageWeight
	if f.Covered == 0 {
		weight = 1
	}
	f.Covered++
	f.Share += weight * (share - f.Share)
	f.Vain += weight * (float64(c.VainBytes) - f.Vain)
	return share
}

// take adds the report to the sample, looks for new use, and composes the profile anew where
// that changed the sample.
func (s *state) take(r profile.Report, share float64) (changed bool, err error) {
	s.touched = true
	if len(r.Items) == 0 {
		return false, nil // every start reads something: this one was not seen
	}
	settled := s.row.Starts.Complete >= enoughStarts
	suspect := settled && share >= 0 && share < badShare
	if bar := s.row.Starts.Bar; !suspect && bar != "" && profile.Rank(r) > bar {
		s.forgetNext()
		return false, nil // most reports of an image that many nodes start
	}
	sum := s.summary(partSummary)
	if changed, err = sum.Add(r); err != nil {
		return false, fmt.Errorf("report of a start: %w", err)
	}
	if suspect {
		next := s.summary(partNext)
		if _, err := next.Add(r); err != nil {
			return false, err
		}
		if s.takesOver(next, sum) {
			s.l.o.Log.Info("an image is used in another way; its profile is recorded anew", "manifest", s.row.Manifest, "coverage", s.row.Starts.Share)
			sum, next, changed = next, profile.NewSummary(s.row.Manifest), true
		}
		s.setSummary(partNext, next)
	} else {
		s.forgetNext()
	}
	if !changed {
		return false, nil
	}
	s.setSummary(partSummary, sum)
	return true, s.compose()
}

// forgetNext drops the suspicion of new use when starts are foretold well.
func (s *state) forgetNext() {
	if s.row.Starts.Share >= materialShare {
		s.remove(partNext)
	}
}

// takesOver says that the newer starts are the image's use now.
func (s *state) takesOver(next, sum *profile.Summary) bool {
	if next.Complete() < enoughStarts || next.Nodes() < min(2, sum.Nodes()) || s.row.Starts.Share >= badShare {
		return false
	}
	old := next.Cover(sum.Profile(profile.DefaultShare)).Share()
	return next.Cover(next.Profile(profile.DefaultShare)).Share() >= old+betterShare
}

// wantMore says whether the sample would gain by more starts of a node whose report changed it, or
// did not: that one has its share in it.
func (s *state) wantMore(changed bool) bool {
	_, written := s.fresh[partNext]
	suspected := s.fresh[partNext] != nil || (!written && s.had[partNext] != nil)
	f := s.row.Starts
	return f.Complete < enoughStarts || suspected || (changed && f.Kept < profile.MaxReports)
}
