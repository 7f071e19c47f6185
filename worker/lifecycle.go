package worker

import (
	"context"
	"errors"
	"fmt"

	"accel"
	"accel/profile/ledger"
	"accel/readiness"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// Orphan is a target whose source is gone.
type Orphan struct {
	ID     string `json:"id"`
	Image  string `json:"image"`
	Target string `json:"target"`
	// Reason says what is missing.
	Reason string `json:"reason"`
	// Removed is false in a dry run, and where Error says why it did not work.
	Removed bool   `json:"removed"`
	Error   string `json:"error,omitempty"`
}

// Lifecycle removes targets: with their record, or because their source is gone.
type Lifecycle struct {
	Tracker  *readiness.Tracker
	Registry *registry.Client
	Profiles *ledger.Ledger // nil: there are none
}

// DeleteTarget removes rec's converted manifests, mapping and profile artifacts from the
// registry. The source is never touched; what is gone already is no error.
func (l Lifecycle) DeleteTarget(ctx context.Context, rec accel.Record) error {
	if l.Profiles != nil { // first, so that nothing is published anew
		if err := l.Profiles.Leave(ctx, rec.Repository, rec.Digest); err != nil {
			return err
		}
	}
	return l.deleteTarget(ctx, rec)
}

// GC finds the Ready records whose source manifest is gone and, unless dryRun,
// removes target and record. One that cannot be removed is listed with its
// error and does not stop the others.
func (l Lifecycle) GC(ctx context.Context, dryRun bool) ([]Orphan, error) {
	orphans := []Orphan{}
	f := readiness.Filter{State: accel.Ready, Limit: 500}
	for {
		page, err := l.Tracker.List(ctx, f)
		if err != nil {
			return orphans, err
		}
		for _, rec := range page.Records {
			_, err := l.Registry.Head(ctx, rec.Repository, rec.Digest.String())
			if err == nil {
				continue
			}
			if !errors.Is(err, accel.ErrNotFound) {
				return orphans, fmt.Errorf("look at %s: %w", rec.Image(), err)
			}
			o := Orphan{ID: rec.ID, Image: rec.Image(), Target: rec.Target.Repository + "@" + rec.Target.Digest.String(), Reason: "the source manifest is gone from the registry"}
			if !dryRun {
				if err := l.remove(ctx, rec); err != nil {
					o.Error = err.Error()
				} else {
					o.Removed = true
				}
			}
			orphans = append(orphans, o)
		}
		if page.Next == "" {
			return orphans, nil
		}
		f.Cursor = page.Next
	}
}

func (l Lifecycle) remove(ctx context.Context, rec accel.Record) error {
	if err := l.DeleteTarget(ctx, rec); err != nil {
		return err
	}
	_, err := l.Tracker.Delete(ctx, rec.ID)
	return err
}

// deleteTarget removes what the worker made of rec. The registry's answers say where that is; what each manifest says
// decides whether it goes.
func (l Lifecycle) deleteTarget(ctx context.Context, rec accel.Record) error {
	if rec.Target.Digest == "" || rec.Target.Digest == rec.Digest {
		return nil // nothing pushed, or the source itself
	}
	repository := rec.Target.Repository
	top, err := l.Registry.Pull(ctx, repository, rec.Target.Digest)
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look into target %s@%s: %w", repository, rec.Target.Digest, err)
	}
	manifests := []*registry.Manifest{top}
	if top.Index != nil {
		m, err := top.Index.IndexManifest()
		if err != nil {
			return err
		}
		for _, d := range m.Manifests {
			child, err := l.Registry.Pull(ctx, repository, digest.Digest(d.Digest.String()))
			if errors.Is(err, accel.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			manifests = append(manifests, child)
		}
	}
	doomed := []digest.Digest{rec.Target.Digest} // the index first, so that nothing that stands refers to what is gone
	var subjects []digest.Digest
	for _, m := range manifests {
		if m.Image == nil {
			continue
		}
		im, err := m.Image.Manifest()
		if err != nil {
			return err
		}
		if im.Subject == nil || im.Annotations[accel.AnnotationSourceDigest] != im.Subject.Digest.String() {
			continue // a member that was carried over: the source index, or another, has it too
		}
		subjects = append(subjects, digest.Digest(im.Subject.Digest.String()))
		if d := digest.Digest(m.Descriptor.Digest.String()); d != rec.Target.Digest {
			doomed = append(doomed, d)
		}
	}
	for _, s := range subjects {
		if err := l.deleteReferrers(ctx, repository, s); err != nil {
			return err
		}
	}
	for _, d := range doomed {
		if err := l.Registry.Delete(ctx, repository, d); err != nil {
			return fmt.Errorf("delete %s@%s: %w", repository, d, err)
		}
	}
	return nil
}

// deleteReferrers deletes the mappings and profiles of a source manifest.
func (l Lifecycle) deleteReferrers(ctx context.Context, repository string, subject digest.Digest) error {
	refs, err := l.Registry.Referrers(ctx, repository, subject, accel.MediaTypeMapping, accel.MediaTypeProfile)
	if err != nil {
		return fmt.Errorf("list what refers to %s@%s: %w", repository, subject, err)
	}
	for _, r := range refs {
		d := digest.Digest(r.Digest.String())
		err := l.Registry.DeleteReferrer(ctx, repository, subject, r.ArtifactType, d)
		if err != nil && !errors.Is(err, accel.ErrConflict) { // what is only listed as one stays
			return fmt.Errorf("delete %s@%s: %w", repository, d, err)
		}
	}
	return nil
}
