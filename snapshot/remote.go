package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"accel"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
)

// remote is a lazy snapshot.
type remote struct {
	id, name string
	request  Request
	gone     bool // it was removed; guarded by its turn

	// Guarded by the Snapshotter's mu.
	layer    digest.Digest
	failed   string // why it could not be mounted, empty when it could
	failedAt time.Time
	aside    string // why it must not be used, empty when it may
}

// remoteOf makes one of what the metastore says.
func remoteOf(id string, info snapshots.Info) (*remote, error) {
	layer, err := digest.Parse(info.Labels[labelLayer])
	if err != nil {
		return nil, fmt.Errorf("layer of snapshot %s: %w", info.Name, err)
	}
	request, err := requestOf(info.Labels[labelNamespace], info.Parent, info.Labels)
	if err != nil {
		return nil, fmt.Errorf("image of snapshot %s: %w", info.Name, err)
	}
	return &remote{id: id, name: info.Name, request: request, layer: layer, aside: info.Labels[labelAside]}, nil
}

// remote is the lazy snapshot with that ID, nil where it is an ordinary one.
func (s *Snapshotter) remote(id string) *remote {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.remotes[id]
}

func (s *Snapshotter) layer(r *remote) digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return r.layer
}

// layersOf are those that are mounted lazily among some snapshots.
func (s *Snapshotter) layersOf(ids []string) []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var layers []digest.Digest
	for _, id := range ids {
		if r := s.remotes[id]; r != nil {
			layers = append(layers, r.layer)
		}
	}
	return layers
}

// ensureAll sees to it that what is lazy among the snapshots below another is mounted: where it is not, its
// directory is empty, and a container would start without those files. It ends within Limit.
func (s *Snapshotter) ensureAll(ctx context.Context, ids []string) error {
	ctx, cancel := context.WithTimeout(ctx, s.o.Limit)
	defer cancel()
	for _, id := range ids {
		r := s.remote(id)
		if r == nil {
			continue
		}
		if err := s.ensure(ctx, r); err != nil {
			return fmt.Errorf("%w: layer %s of %s: %w", errdefs.ErrUnavailable, r.request.Layer, r.request.Reference, err)
		}
	}
	return nil
}

// ensure sees to it that a lazy snapshot is mounted, and may be used.
func (s *Snapshotter) ensure(ctx context.Context, r *remote) error {
	s.mu.Lock()
	aside := r.aside
	s.mu.Unlock()
	if aside != "" {
		return fmt.Errorf("it was set aside: %s; remove the image and pull it again", aside)
	}
	if mounted, err := mountedAt(s.upperPath(r.id)); mounted && err == nil {
		return nil
	}
	unlock, err := s.turns.Lock(ctx, r.id)
	if err != nil {
		return err
	}
	defer unlock()
	return s.mountLocked(ctx, r, false)
}

// pinAndMount mounts a layer for a snapshot. The caller has the turn.
func (s *Snapshotter) pinAndMount(ctx context.Context, r *remote, layer digest.Digest) error {
	if err := s.o.Pins.Pin(Owner(r.id), layer); err != nil {
		return fmt.Errorf("pin layer %s: %w", layer, err)
	}
	began, target := time.Now(), s.upperPath(r.id)
	if err := s.o.Mounts.Mount(ctx, layer, target); err != nil {
		return fmt.Errorf("mount layer %s: %w", layer, err)
	}
	if mounted, err := mountedAt(target); err != nil || !mounted {
		return errors.Join(fmt.Errorf("mount layer %s: it is not there afterwards", layer), err)
	}
	s.metrics.mounts.Observe(time.Since(began).Seconds())
	return nil
}

// mountLocked mounts a committed snapshot's layer where it is not mounted, or in the place of what is and does not work
// where renew is set, and resolves it anew where it cannot be. The caller has the turn.
func (s *Snapshotter) mountLocked(ctx context.Context, r *remote, renew bool) (err error) {
	target := s.upperPath(r.id)
	mounted, dead := mountedAt(target)
	if r.gone {
		return fmt.Errorf("snapshot %s was removed", r.id)
	}
	if mounted && dead == nil && !renew {
		return nil // another caller was quicker
	}
	defer func() { s.note(r, err) }()
	if dead != nil { // what served it is gone
		if err := s.o.Mounts.Unmount(ctx, target); err != nil {
			return fmt.Errorf("unmount what does not answer at %s (%w): %w", target, dead, err)
		}
	}
	if err := os.MkdirAll(target, upperMode); err != nil { // lost with the machine's power
		return err
	}
	layer := s.layer(r)
	first := s.pinAndMount(ctx, r, layer)
	if first == nil || ctx.Err() != nil {
		return first
	}
	if mounted { // and nothing goes into its place: an empty directory for a moment is better than errors for ever
		if err := s.o.Mounts.Unmount(ctx, target); err != nil {
			return errors.Join(first, err)
		}
		if first = s.pinAndMount(ctx, r, layer); first == nil || ctx.Err() != nil {
			return first
		}
	}
	// The content may be lost; resolving it brings it again, or the layer that stands for it now.
	lazy, err := s.resolve(ctx, r.request)
	if err != nil {
		return errors.Join(first, err)
	}
	if err := s.pinAndMount(ctx, r, lazy); err != nil || lazy == layer {
		return err
	}
	return s.replaced(ctx, r, lazy)
}

// replaced has the metastore know of another layer for a snapshot. The old one's pin goes with the snapshot, or when pins are
// next made equal to Owners.
func (s *Snapshotter) replaced(ctx context.Context, r *remote, layer digest.Digest) error {
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		info := snapshots.Info{Name: r.name, Labels: map[string]string{labelLayer: layer.String()}}
		_, err := storage.UpdateInfo(ctx, info, "labels."+labelLayer)
		return err
	})
	if err != nil {
		return fmt.Errorf("layer %s in another's place: %w", layer, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.o.Log.Warn("a layer's content was lost; another form of it is mounted in its place", "image", r.request.Reference, "lost", r.layer, "mounted", layer)
	r.layer = layer
	return nil
}

// note keeps why a snapshot could not be mounted, for Bad.
func (s *Snapshotter) note(r *remote, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		r.failed = ""
		return
	}
	r.failed, r.failedAt = shorten(err.Error()), time.Now()
	s.o.Log.Warn("a layer cannot be mounted; containers on it are refused until it can", "image", r.request.Reference, "layer", r.layer, "snapshot", r.id, "error", err)
}

// mountedAt says whether something is mounted at a path. An error means that what is there does not answer.
func mountedAt(path string) (bool, error) {
	mounted, err := mountinfo.Mounted(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return mounted, err
}

// unmount takes away what is mounted at a path, and makes sure that it has.
func (s *Snapshotter) unmount(ctx context.Context, target string) error {
	mounted, dead := mountedAt(target)
	if !mounted && dead == nil {
		return nil
	}
	if err := s.o.Mounts.Unmount(ctx, target); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	if mounted, err := mountedAt(target); err != nil || mounted {
		return errors.Join(fmt.Errorf("unmount %s: it is still there", target), err)
	}
	return nil
}

// unpin releases what a snapshot holds, if it holds anything.
func (s *Snapshotter) unpin(id string) error {
	if err := s.o.Pins.Unpin(Owner(id)); err != nil && !errors.Is(err, accel.ErrNotFound) {
		return fmt.Errorf("unpin snapshot %s: %w", id, err)
	}
	return nil
}
