package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// Remove implements snapshots.Snapshotter. What cannot be taken away at once, the next Cleanup or Restore
// takes: for containerd the snapshot is gone.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.store.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	if err := s.discard(ctx, id); err != nil {
		s.o.Log.Warn("what a removed snapshot had is still there; the next clean-up tries again", "snapshot", id, "error", err)
	}
	return nil
}

// Cleanup implements snapshots.Cleaner: it takes away the directories, mounts and pins of snapshots that are
// no more.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	names, err := s.orphans(ctx)
	if err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, s.discard(ctx, name))
	}
	return errors.Join(errs...)
}

// orphans are the directories without a row.
func (s *Snapshotter) orphans(ctx context.Context) ([]string, error) {
	s.making.Lock()
	defer s.making.Unlock()
	var known map[string]string
	err := s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		known, err = storage.IDMap(ctx)
		return err
	})
	if err != nil && !errdefs.IsNotFound(err) { // not found: nothing was ever written
		return nil, err
	}
	entries, err := os.ReadDir(s.snapshots())
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if _, ok := known[e.Name()]; !ok {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// discard takes away what a snapshot without a row has: mount, pin, directory, in this order. It may be
// called again, and by two at once.
func (s *Snapshotter) discard(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if r := s.remote(id); r != nil {
		unlock, err := s.turns.Lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()
		r.gone = true
	}
	if err := s.unmount(ctx, s.upperPath(id)); err != nil {
		return err
	}
	if !strings.HasPrefix(id, stagedPrefix) {
		if err := s.unpin(id); err != nil {
			return err
		}
	}
	if err := removeTree(s.folder(id)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.remotes, id)
	return nil
}

// removeTree removes a snapshot's directory. A mount point that is empty goes by rmdir, which fails where
// something is mounted: a layer's content must never be deleted through its mount.
func removeTree(dir string) error {
	if err := os.Remove(filepath.Join(dir, "fs")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		mounted, dead := mountedAt(filepath.Join(dir, "fs"))
		if mounted || dead != nil {
			return errors.Join(err, dead)
		}
	}
	return os.RemoveAll(dir)
}
