package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"accel"
)

// checkLoop keeps Ready true: it looks at each Ready target when its check is
// due, sends the record back to work where the target is gone, and moves the
// target's tags after the source's.
func (k *Worker) checkLoop(ctx context.Context) error {
	for {
		rec, err := k.Tracker.NextCheck(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		if err != nil {
			return fmt.Errorf("find the next target to check: %w", err)
		}
		if err := k.check(ctx, rec); err != nil && ctx.Err() == nil {
			k.Log.Warn("cannot check a target; trying again at the next interval", "image", rec.Image(), "error", err)
		}
	}
}

func (k *Worker) check(ctx context.Context, rec accel.Record) error {
	err := k.Registry.Verify(ctx, rec.Target.Repository, rec.Target.Digest, false)
	if errors.Is(err, accel.ErrNotFound) {
		return k.targetGone(ctx, rec, err)
	}
	if err != nil {
		return err
	}
	tags := rec.Tags // where the source is the target, unchanged
	if rec.Target.Repository != rec.Repository || rec.Target.Digest != rec.Digest {
		if tags, err = k.tags.move(ctx, rec, rec.Target.Digest); err != nil {
			return err
		}
	}
	if !slices.Equal(tags, rec.Target.Tags) {
		k.Log.Info("target tags moved", "image", rec.Image(), "tags", tags)
	}
	if err := k.Tracker.Checked(ctx, rec.ID, tags); err != nil && !errors.Is(err, accel.ErrNotFound) {
		return err
	}
	if err := k.learnReady(ctx, rec); err != nil && ctx.Err() == nil {
		k.Log.Warn("cannot see to the profiles of an image; tried again at the next check", "image", rec.Image(), "error", err)
	}
	if !k.DeleteTargets {
		return nil
	}
	_, err = k.Registry.Head(ctx, rec.Repository, rec.Digest.String())
	if errors.Is(err, accel.ErrNotFound) {
		return k.sourceGone(ctx, rec)
	}
	return err
}

// targetGone sends rec back to Pending, unless its source is gone as well:
// then there is nothing to convert, and the policy decides.
func (k *Worker) targetGone(ctx context.Context, rec accel.Record, why error) error {
	if k.DeleteTargets {
		_, err := k.Registry.Head(ctx, rec.Repository, rec.Digest.String())
		if errors.Is(err, accel.ErrNotFound) {
			return k.sourceGone(ctx, rec)
		}
		if err != nil {
			return err
		}
	}
	return k.Tracker.Gone(ctx, rec.ID, "the target is gone from the registry: "+why.Error())
}

func (k *Worker) sourceGone(ctx context.Context, rec accel.Record) error {
	k.Log.Info("the source is gone; removing its converted form", "image", rec.Image())
	if err := (Lifecycle{Tracker: k.Tracker, Registry: k.Registry, Profiles: k.Profiles}).DeleteTarget(ctx, rec); err != nil {
		return err
	}
	_, err := k.Tracker.Delete(ctx, rec.ID)
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	return err
}
