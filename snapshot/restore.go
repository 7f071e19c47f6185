package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"accel"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// restoredAtOnce is how many layers Restore mounts in parallel: resolving and mounting wait for the disk, or for
// a registry, more than they compute.
const restoredAtOnce = 16

// Restore takes away what a crash left, adopts the layers that are mounted, and mounts those that are not, as
// after a reboot. What cannot be mounted within StartLimit is in Bad and tried again when a container
// asks for it. An error is about what a crash left or the metastore; the snapshotter can be served all the same.
func (s *Snapshotter) Restore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.o.StartLimit)
	defer cancel()
	began := time.Now()
	unanswered, err := s.unanswered(ctx)
	errs := make([]error, 0, len(unanswered)+2)
	errs = append(errs, err)
	for _, key := range unanswered {
		errs = append(errs, s.Remove(ctx, key))
	}
	errs = append(errs, s.Cleanup(ctx))
	s.mu.Lock()
	all := make([]*remote, 0, len(s.remotes))
	for _, r := range s.remotes {
		all = append(all, r)
	}
	s.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(restoredAtOnce)
	for _, r := range all {
		g.Go(func() error {
			if err := s.ensure(ctx, r); err != nil && ctx.Err() != nil {
				s.note(r, fmt.Errorf("not mounted within %v of the start: %w", s.o.StartLimit, err))
			}
			return nil // it is in Bad
		})
	}
	_ = g.Wait() // see above
	s.o.Log.Info("lazy snapshots are there", "snapshots", len(all), "bad", len(s.Bad()), "took", time.Since(began))
	return errors.Join(errs...)
}

// unanswered are the keys of snapshots that were being made when the process ended: containerd was never told of them.
func (s *Snapshotter) unanswered(ctx context.Context) ([]string, error) {
	var keys []string
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindActive && info.Labels[labelLayer] != "" {
			keys = append(keys, info.Name)
		}
		return nil
	})
	return keys, err
}

// BadSnapshot is a lazy snapshot on which no container can start.
type BadSnapshot struct {
	ID      string
	Request Request       // the image that it was made for
	Layer   digest.Digest // that cannot be mounted, or lied
	Reason  string
	Since   time.Time // zero where it was before this process
	// SetAside: for good, by SetAside. Else it is tried again when a container asks for it.
	SetAside bool
}

// Bad are the lazy snapshots on which no container can start.
func (s *Snapshotter) Bad() []BadSnapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	var bad []BadSnapshot
	for _, r := range s.remotes {
		if r.failed != "" || r.aside != "" {
			b := BadSnapshot{ID: r.id, Request: r.request, Layer: r.layer, Reason: r.failed, Since: r.failedAt}
			if r.aside != "" {
				b.Reason, b.SetAside = r.aside, true
			}
			bad = append(bad, b)
		}
	}
	slices.SortFunc(bad, func(a, b BadSnapshot) int { return strings.Compare(a.ID, b.ID) })
	return bad
}

// LazySnapshot is a layer's snapshot and what containerd said of it.
type LazySnapshot struct {
	ID      string
	Request Request
	Layer   digest.Digest
}

// Lazy are all lazy snapshots.
func (s *Snapshotter) Lazy() []LazySnapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]LazySnapshot, 0, len(s.remotes))
	for _, r := range s.remotes {
		all = append(all, LazySnapshot{ID: r.id, Request: r.request, Layer: r.layer})
	}
	slices.SortFunc(all, func(a, b LazySnapshot) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// SetAside has no container start on a lazy snapshot any more, for good: its content is not what its DiffID says, for
// instance. Containers that run go on. It ends with the removal of the image. accel.ErrNotFound where there is no
// such lazy snapshot.
func (s *Snapshotter) SetAside(ctx context.Context, id, reason string) error {
	r := s.remote(id)
	if r == nil {
		return fmt.Errorf("%w: lazy snapshot %s", accel.ErrNotFound, id)
	}
	if reason = shorten(reason); reason == "" {
		return fmt.Errorf("%w: a snapshot is set aside without a reason", accel.ErrInvalid)
	}
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		info := snapshots.Info{Name: r.name, Labels: map[string]string{labelAside: reason}}
		_, err := storage.UpdateInfo(ctx, info, "labels."+labelAside)
		return err
	})
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("%w: lazy snapshot %s", accel.ErrNotFound, id)
	}
	if err != nil {
		return fmt.Errorf("set snapshot %s aside: %w", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.aside, r.failedAt = reason, time.Now()
	s.o.Log.Error("a snapshot was set aside; no container starts on it until its image is removed and pulled again", "image", r.request.Reference, "layer", r.layer, "snapshot", id, "reason", reason)
	return nil
}

// Remount mounts a layer anew wherever it is mounted, because what served it is gone. Containers that run keep what
// they have, and no new one sees a directory without the layer.
func (s *Snapshotter) Remount(ctx context.Context, layer digest.Digest) error {
	s.mu.Lock()
	var all []*remote
	for _, r := range s.remotes {
		if r.layer == layer {
			all = append(all, r)
		}
	}
	s.mu.Unlock()
	var wg sync.WaitGroup
	errs := make([]error, len(all))
	for i, r := range all {
		wg.Go(func() {
			unlock, err := s.turns.Lock(ctx, r.id)
			if err != nil {
				errs[i] = err
				return
			}
			defer unlock()
			if !r.gone {
				errs[i] = s.mountLocked(ctx, r, true)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
