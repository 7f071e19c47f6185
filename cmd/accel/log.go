package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"

	"accel"
	"accel/readiness"
)

func newLog(w io.Writer, c LogConfig) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo
	}
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// follower logs each change of state that is made after tail, in a line.
type follower struct {
	tracker *readiness.Tracker
	log     *slog.Logger
	after   uint64
}

const eventBatch = 500

// tail passes over the changes that were made before this process.
func (f *follower) tail(ctx context.Context) error {
	for {
		evs, _, err := f.tracker.Events(ctx, f.after, eventBatch)
		if err != nil || len(evs) == 0 {
			return err
		}
		f.after = evs[len(evs)-1].Seq
	}
}

// Run logs until ctx ends.
func (f *follower) Run(ctx context.Context) error {
	for {
		evs, _, err := f.tracker.NextEvents(ctx, f.after, eventBatch)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("follow the changes of state: %w", err)
		}
		for _, e := range evs {
			f.after = e.Seq
			f.line(ctx, e)
		}
	}
}

func (f *follower) line(ctx context.Context, e readiness.Event) {
	image := accel.Record{Repository: e.Repository, Tags: e.Tags}.Image()
	if len(e.Tags) == 0 || e.Digest != "" && len(e.Tags) > 1 {
		image = accel.Record{Repository: e.Repository, Digest: e.Digest}.Image()
	}
	attrs := []slog.Attr{slog.String("image", image), slog.String("state", string(e.To)), slog.String("id", e.ID)}
	if e.From != "" {
		attrs = append(attrs, slog.String("from", string(e.From)))
	}
	if e.Reason != "" {
		attrs = append(attrs, slog.String("reason", e.Reason))
	}
	level, text := slog.LevelInfo, "image"
	switch e.To {
	case "":
		text = "image removed"
		attrs = append(attrs[:1], attrs[2:]...)
	case accel.Ready:
		if r, err := f.tracker.Get(ctx, e.ID); err == nil && r.State == accel.Ready {
			attrs = append(attrs, slog.String("target", r.Target.Repository+"@"+r.Target.Digest.String()), slog.Any("tags", r.Target.Tags),
				slog.String("source_size", about(r.Result.SourceBytes)), slog.String("target_size", about(r.Result.TargetBytes)),
				slog.Duration("took", r.Result.Total))
		}
	case accel.Failed, accel.Rejected:
		level = slog.LevelWarn
	}
	f.log.LogAttrs(ctx, level, text, attrs...)
}

// ready reports whether the store answers, for /readyz.
func storeReady(tracker *readiness.Tracker) func(context.Context) error {
	return func(ctx context.Context) error {
		_, _, err := tracker.Events(ctx, math.MaxInt64, 1)
		return err
	}
}
