package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/opencontainers/go-digest"
)

// Prepare implements snapshots.Snapshotter. Asked for a layer that can be mounted lazily, it answers with
// errdefs.ErrAlreadyExists, as the protocol of remote snapshotters has it.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var given snapshots.Info
	for _, o := range opts {
		if err := o(&given); err != nil {
			return nil, err
		}
	}
	if _, isLayer := given.Labels[snapshots.LabelSnapshotRef]; isLayer {
		return s.prepareLayer(ctx, key, parent, given.Labels)
	}
	began := time.Now()
	m, lazy, err := s.prepare(ctx, snapshots.KindActive, key, parent, opts...)
	if err == nil && len(lazy) > 0 {
		s.o.Observe(Event{Kind: KindPrepared, Key: key, Layers: lazy, Began: began, Took: time.Since(began)})
	}
	return m, err
}

// View implements snapshots.Snapshotter.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	m, _, err := s.prepare(ctx, snapshots.KindView, key, parent, opts...)
	return m, err
}

// prepare makes an ordinary snapshot, and says which lazily mounted layers are below it.
func (s *Snapshotter) prepare(ctx context.Context, kind snapshots.Kind, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, []digest.Digest, error) {
	sn, info, err := s.create(ctx, kind, key, parent, opts...)
	if err != nil {
		return nil, nil, err
	}
	m, err := s.finish(ctx, sn, info)
	if err != nil {
		return nil, nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	return m, s.layersOf(sn.ParentIDs), nil
}

// finish sees to what is below an ordinary snapshot that was made, and gives its mounts.
func (s *Snapshotter) finish(ctx context.Context, sn storage.Snapshot, info snapshots.Info) ([]mount.Mount, error) {
	if err := s.ensureAll(ctx, sn.ParentIDs); err != nil {
		return nil, err
	}
	if err := s.own(sn, info); err != nil {
		return nil, fmt.Errorf("owner of snapshot %s: %w", info.Name, err)
	}
	return s.mounts(sn, info), nil
}

// own gives a snapshot's root directory the owner of the layer below, or the one that owners are mapped to.
func (s *Snapshotter) own(sn storage.Snapshot, info snapshots.Info) error {
	uid, gid, mapped, err := rootOwner(info.Labels)
	if err != nil {
		return err
	}
	if !mapped {
		if len(sn.ParentIDs) == 0 {
			return nil
		}
		st, err := os.Stat(s.upperPath(sn.ParentIDs[0]))
		if err != nil {
			return err
		}
		below, ok := st.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s has no owner", st.Name())
		}
		uid, gid = int(below.Uid), int(below.Gid)
	}
	return os.Lchown(s.upperPath(sn.ID), uid, gid)
}

// create makes a snapshot's row and its directories.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts ...snapshots.Opt) (sn storage.Snapshot, info snapshots.Info, err error) {
	s.making.Lock()
	defer s.making.Unlock()
	made, err := os.MkdirTemp(s.snapshots(), stagedPrefix)
	if err != nil {
		return sn, info, fmt.Errorf("directory of snapshot %s: %w", key, err)
	}
	defer func() {
		if err != nil {
			// Nothing was ever in it, so no more than this may be taken away.
			for _, dir := range []string{"fs", "work", ""} {
				if e := os.Remove(filepath.Join(made, dir)); e != nil && !errors.Is(e, fs.ErrNotExist) {
					err = errors.Join(err, e)
				}
			}
		}
	}()
	if err := makeInside(made, kind); err != nil {
		return sn, info, fmt.Errorf("directory of snapshot %s: %w", key, err)
	}
	err = s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		if sn, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return err
		}
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		// The last step, so that a directory with an ID has a row, but for a failing commit.
		if err := os.Rename(made, s.folder(sn.ID)); err != nil {
			return fmt.Errorf("directory of snapshot %s: %w", key, err)
		}
		made = s.folder(sn.ID)
		return nil
	})
	return sn, info, err
}

// Directories of a snapshot: its content, which for a lazy one is a mount point, and overlayfs's own.
const (
	upperMode = 0o755
	workMode  = 0o711

	// stagedPrefix begins the names of directories whose snapshot has no row yet.
	stagedPrefix = "new-"
)

func makeInside(dir string, kind snapshots.Kind) error {
	// Not by Mkdir's mode alone: the process's umask may take bits away.
	for name, mode := range map[string]fs.FileMode{"fs": upperMode, "work": workMode} {
		if name == "work" && kind != snapshots.KindActive {
			continue
		}
		path := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(path, mode), os.Chmod(path, mode)); err != nil {
			return err
		}
	}
	return nil
}
