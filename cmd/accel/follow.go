package main

import (
	"context"
	"errors"
	"time"

	"accel"
	"accel/readiness"
)

const (
	// followPause is before what failed is tried again: the fleet's file cannot be
	// written, for instance. Conversions go on meanwhile.
	followPause = 5 * time.Second
	// followSave bounds how many events are looked at again after a crash.
	followSave = 1000
)

// followReady hands every image that becomes Ready to the fleet, until ctx ends. It keeps
// its place among the events in the fleet's file; after a crash some come twice, which
// changes nothing.
func (s *service) followReady(ctx context.Context) error {
	for ctx.Err() == nil {
		err := s.follow(ctx)
		if ctx.Err() != nil {
			break
		}
		s.log.Error("images that become Ready are not brought to nodes; tried again in a while", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(followPause):
		}
	}
	return nil //nolint:nilerr // asked to stop
}

func (s *service) follow(ctx context.Context) error {
	after, err := s.followFrom(ctx)
	if err != nil {
		return err
	}
	saved := after
	for {
		evs, first, err := s.tracker.NextEvents(ctx, after, followSave)
		if err != nil {
			return err
		}
		news := false
		if first > after+1 { // some are no longer kept
			news = true
			if err := s.bringAll(ctx); err != nil {
				return err
			}
		}
		for _, e := range evs {
			after = e.Seq
			if e.To != accel.Ready {
				continue
			}
			news = true
			if err := s.bring(ctx, e); err != nil {
				return err
			}
		}
		if !news && after-saved < followSave {
			continue // one sync less for what another look costs nothing
		}
		if err := s.fleet.SetPosition(ctx, after); err != nil {
			return err
		}
		saved = after
	}
}

// followFrom is the number after which to go on. A place behind the last event is
// that of other records: they were removed or restored.
func (s *service) followFrom(ctx context.Context) (uint64, error) {
	after, err := s.fleet.Position(ctx)
	if err != nil || after == 0 {
		return after, err
	}
	evs, _, err := s.tracker.Events(ctx, after-1, 1)
	if err != nil || len(evs) > 0 {
		return after, err
	}
	return 0, nil
}

// bring hands the record of an event over as it is now, unless it is not Ready any
// more, or all tags moved away from it.
func (s *service) bring(ctx context.Context, e readiness.Event) error {
	rec, err := s.tracker.Get(ctx, e.ID)
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	if err != nil || rec.State != accel.Ready || (len(rec.Tags) == 0 && len(e.Tags) > 0) {
		return err
	}
	return s.fleet.Ready(ctx, rec)
}

// bringAll hands over all Ready records; the fleet passes over the old ones.
func (s *service) bringAll(ctx context.Context) error {
	f := readiness.Filter{State: accel.Ready, Limit: 500}
	for {
		page, err := s.tracker.List(ctx, f)
		if err != nil {
			return err
		}
		for i := range page.Records {
			if err := s.fleet.Ready(ctx, page.Records[i]); err != nil {
				return err
			}
		}
		if f.Cursor = page.Next; f.Cursor == "" {
			return nil
		}
	}
}
