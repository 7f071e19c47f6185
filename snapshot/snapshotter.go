package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"accel"
	"accel/internal/keylock"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// Options says how a snapshotter is to be.
type Options struct {
	// Dir is its folder, for itself alone, on a file system that can be overlayfs's upper one. containerd is told it as
	// the plugin's export "root".
	Dir    string
	Images Images
	Mounts Mounts
	Pins   Pins
	// Limit is the time within which a layer is mounted, or left to containerd. Default 2 s.
	Limit time.Duration
	// StartLimit is the time within which Restore ends. Default 30 s.
	StartLimit time.Duration
	// RemapIDs has overlayfs map the owners of a container's files. containerd asks for it where its configuration gives the plugin
	// the capability "remap-ids"; see CanRemapIDs.
	RemapIDs bool
	// MountOptions are added to those of each overlay mount, but not to bind mounts.
	MountOptions []string
	// Observe is told of every layer and start; it must return at once. May be nil.
	Observe    func(Event)
	Registerer prometheus.Registerer // may be nil
	Log        *slog.Logger          // default: slog.Default
}

const (
	defaultLimit      = 2 * time.Second
	defaultStartLimit = 30 * time.Second
	// undoLimit bounds unmounting, which goes on when the caller has given up.
	undoLimit = 10 * time.Second
)

// Snapshotter implements containerd's snapshots.Snapshotter and snapshots.Cleaner. After Open comes
// Restore, then Serve, then Close.
type Snapshotter struct {
	o       Options
	store   *storage.MetaStore
	options []string // of every overlay mount
	metrics *metrics

	// making is held while a snapshot's directory and its row are made, and while directories without a
	// row are looked for: a row that was not committed leaves its ID to the next.
	making sync.Mutex

	turns keylock.Mutex // to mount or unmount a lazy snapshot, by its ID

	mu      sync.Mutex
	remotes map[string]*remote // lazy snapshots, by ID; also such as are being made or removed
}

// Errors of Open, beside those of the file system.
var (
	// ErrDamaged: the metadata cannot be read, or is missing while there are snapshots. The message says what to do.
	ErrDamaged = errors.New("the snapshotter's metadata is damaged")
	// ErrLocked: another process has the folder.
	ErrLocked = errors.New("the snapshotter's folder is in use by another process")
)

// Open takes the folder and reads what there is; it mounts nothing and starts nothing. The error wraps ErrDamaged
// or ErrLocked, and the rest of a node works without.
func Open(ctx context.Context, o Options) (_ *Snapshotter, err error) {
	if o.Dir == "" || o.Images == nil || o.Mounts == nil || o.Pins == nil {
		return nil, fmt.Errorf("%w: a snapshotter needs a folder, images, mounts and pins", accel.ErrInvalid)
	}
	if o.Limit <= 0 {
		o.Limit = defaultLimit
	}
	if o.StartLimit <= 0 {
		o.StartLimit = defaultStartLimit
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Observe == nil {
		o.Observe = func(Event) {}
	}
	s := &Snapshotter{o: o, remotes: map[string]*remote{}}
	if err := os.MkdirAll(s.snapshots(), 0o700); err != nil {
		return nil, fmt.Errorf("the snapshotter's folder: %w", err)
	}
	if ok, err := fs.SupportsDType(o.Dir); err != nil || !ok {
		return nil, errors.Join(fmt.Errorf("%w: the file system of %s cannot be overlayfs's: it has no d_type (xfs: format it with ftype=1)", accel.ErrInvalid, o.Dir), err)
	}
	if s.options, err = overlayOptions(o.Dir, o.MountOptions, o.Log); err != nil {
		return nil, err
	}
	if s.store, err = openStore(ctx, o.Dir, s.load); err != nil {
		return nil, err
	}
	if s.metrics, err = newMetrics(o.Registerer, s); err != nil {
		return nil, errors.Join(err, s.store.Close())
	}
	return s, nil
}

// load takes over what the metastore says.
func (s *Snapshotter) load(id string, info snapshots.Info) error {
	if info.Kind != snapshots.KindCommitted || info.Labels[labelLayer] == "" {
		return nil
	}
	r, err := remoteOf(id, info)
	if err != nil {
		return err
	}
	s.remotes[id] = r
	return nil
}

// Owners is what each lazy snapshot holds: the pins that there have to be, all of them.
func (s *Snapshotter) Owners() map[string][]digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	owners := make(map[string][]digest.Digest, len(s.remotes))
	for id, r := range s.remotes {
		owners[Owner(id)] = []digest.Digest{r.layer}
	}
	return owners
}

func (s *Snapshotter) snapshots() string          { return filepath.Join(s.o.Dir, "snapshots") }
func (s *Snapshotter) folder(id string) string    { return filepath.Join(s.snapshots(), id) }
func (s *Snapshotter) upperPath(id string) string { return filepath.Join(s.folder(id), "fs") }
func (s *Snapshotter) workPath(id string) string  { return filepath.Join(s.folder(id), "work") }

// Stat implements snapshots.Snapshotter.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update implements snapshots.Snapshotter. What a lazy snapshot needs later stays, whatever the update says.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, before, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		if updated, err = storage.UpdateInfo(ctx, info, fieldpaths...); err != nil || before.Labels[labelLayer] == "" {
			return err
		}
		updated.Labels = keep(updated.Labels, before.Labels)
		updated, err = storage.UpdateInfo(ctx, updated, "labels")
		return err
	})
	return updated, err
}

// Usage implements snapshots.Snapshotter. A lazy snapshot takes nothing here: its content is the cache's.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil || info.Kind != snapshots.KindActive {
		return usage, err
	}
	du, err := fs.DiskUsage(ctx, s.upperPath(id))
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return snapshots.Usage(du), nil
}

// Mounts implements snapshots.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var sn storage.Snapshot
	var info snapshots.Info
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if sn, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.ensureAll(ctx, sn.ParentIDs); err != nil {
		return nil, err
	}
	return s.mounts(sn, info), nil
}

// Commit implements snapshots.Snapshotter.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var id string
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	// Not in the transaction, which would hold up every other one that writes.
	usage, err := fs.DiskUsage(ctx, s.upperPath(id))
	if err != nil {
		return fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, key, name, snapshots.Usage(usage), opts...)
		return err
	})
}

// Walk implements snapshots.Snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	if info, ok := s.sought(ctx, filters); ok {
		return fn(ctx, info)
	}
	shown := false
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			shown = true
			return fn(ctx, info)
		}, filters...)
	})
	if errdefs.IsNotFound(err) && !shown {
		return nil // nothing was ever written
	}
	return err
}

// sought is the lazy snapshot that containerd looks for after it was told that a layer is there. It walks over all
// for that, once for each layer of an image; its name follows from the filter.
func (s *Snapshotter) sought(ctx context.Context, filters []string) (snapshots.Info, bool) {
	if len(filters) != 1 {
		return snapshots.Info{}, false
	}
	rest, ok := strings.CutPrefix(filters[0], fmt.Sprintf("labels.%q==", snapshots.LabelSnapshotRef))
	ref, quoted, both := strings.Cut(rest, ",parent==")
	parent, err := strconv.Unquote(quoted)
	if !ok || !both || err != nil {
		return snapshots.Info{}, false
	}
	name, err := s.nameFor(ctx, parent, digest.Digest(ref))
	if err != nil {
		return snapshots.Info{}, false
	}
	info, err := s.Stat(ctx, name)
	found := err == nil && info.Kind == snapshots.KindCommitted && info.Parent == parent && info.Labels[snapshots.LabelSnapshotRef] == ref
	return info, found
}

// Close gives the folder back. Nothing is unmounted and nothing removed: containers go on.
// Closing twice is fine.
func (s *Snapshotter) Close() error {
	s.metrics.unregister()
	return s.store.Close()
}
