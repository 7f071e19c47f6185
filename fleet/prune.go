package fleet

import (
	"context"
	"slices"
	"time"

	"accel"
)

// Run removes what is over and takes back what stalled, until ctx ends.
func (f *Fleet) Run(ctx context.Context) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := f.Prune(ctx); err != nil && ctx.Err() == nil {
			f.o.Log.Error("the fleet cannot be tidied; tried again in a while", "error", err)
		}
	}
}

// Prune is one round of Run.
func (f *Fleet) Prune(ctx context.Context) error {
	for _, step := range []func(context.Context) (more bool, err error){f.forgetOne, f.dropFinished, f.unstall} {
		for more := true; more; {
			var err error
			if more, err = step(ctx); err != nil {
				return err
			}
		}
	}
	return f.update(ctx, func(c *change) error { return c.dropReady(maxReady, micros(c.now.Add(-c.o.CatchUp))) })
}

// forgetOne forgets one node that has been silent for too long.
func (f *Fleet) forgetOne(ctx context.Context) (bool, error) {
	now := f.o.Now()
	f.mu.Lock()
	var gone *member
	for _, m := range f.nodes {
		if f.silent(m, now) && now.Sub(m.heard) > f.o.ForgetAfter {
			gone = m
			break
		}
	}
	f.mu.Unlock()
	if gone == nil {
		return false, nil
	}
	back := false
	err := f.update(ctx, func(c *change) error {
		f.mu.Lock()
		back = f.nodes[gone.Name] != gone // it has just been heard of
		f.mu.Unlock()
		if back {
			return nil
		}
		return c.forget(gone.Name)
	})
	if err != nil || back {
		return back, err
	}
	f.mu.Lock()
	if f.nodes[gone.Name] == gone {
		delete(f.nodes, gone.Name)
	}
	f.mu.Unlock()
	f.o.Log.Info("a silent node is forgotten", "node", gone.Name, "seen", gone.SeenAt)
	return true, nil
}

// dropFinished removes some of what was finished long enough ago.
func (f *Fleet) dropFinished(ctx context.Context) (more bool, err error) {
	err = f.update(ctx, func(c *change) error {
		all, err := c.oldest(bucketFinished, nil, pruneBatch)
		if err != nil {
			return err
		}
		end := c.now.Add(-c.o.KeepFinished)
		old := slices.IndexFunc(all, func(w accel.Warm) bool { return !w.UpdatedAt.Before(end) })
		more = old < 0 && len(all) == pruneBatch
		if old >= 0 {
			all = all[:old]
		}
		for i := range all {
			if err := c.put(&all[i], nil); err != nil {
				return err
			}
		}
		return nil
	})
	return more, err
}

// unstall makes Pending again what a node took up and did not report for a while.
func (f *Fleet) unstall(ctx context.Context) (bool, error) {
	return false, f.update(ctx, func(c *change) error {
		all, err := c.oldest(bucketFetching, nil, c.o.MaxWarms)
		if err != nil {
			return err
		}
		for i := range all {
			if c.now.Sub(all[i].UpdatedAt) <= c.o.StallAfter {
				continue
			}
			if err := c.pend(&all[i], "the node took it up and did not report for "+c.o.StallAfter.String()); err != nil {
				return err
			}
		}
		return nil
	})
}
