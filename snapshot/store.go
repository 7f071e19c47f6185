package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

const (
	// storeName is the metastore's file in the folder, named as other snapshotters name it.
	storeName = "metadata.db"
	// lockPatience is how long a predecessor may take to end.
	lockPatience = 2 * time.Second
	// openAttempts is how often in a row the process may die while it reads the metastore, before it is taken for
	// damaged unread: what is no bolt file can lead bbolt outside of the file, which ends the process.
	openAttempts = 3
)

// openStore opens the metastore and shows load every row. The error wraps ErrDamaged or ErrLocked, or is
// the file system's.
func openStore(ctx context.Context, dir string, load func(id string, info snapshots.Info) error) (_ *storage.MetaStore, err error) {
	path := filepath.Join(dir, storeName)
	if err := missing(dir, path); err != nil {
		return nil, err
	}
	attempts := path + ".opening"
	if n := count(attempts); n > openAttempts {
		return nil, damaged(dir, attempts, fmt.Errorf("the process died %d times while reading %s; once more it is read when this file is removed", n-1, storeName))
	}
	store, err := readStore(ctx, path, load)
	if err != nil && !errors.As(err, new(syscall.Errno)) && !errors.Is(err, bolterrors.ErrTimeout) && unused(dir) {
		// The power went while the file was made: there is nothing to lose.
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		store, err = readStore(ctx, path, load)
	}
	switch {
	case err == nil:
		return store, os.Remove(attempts)
	case errors.Is(err, bolterrors.ErrTimeout):
		err = fmt.Errorf("%w: %s", ErrLocked, path)
	case errors.As(err, new(syscall.Errno)): // no permission, no space, a folder
		err = fmt.Errorf("open %s: %w", path, err)
	default:
		err = damaged(dir, path, err)
	}
	return nil, errors.Join(err, os.Remove(attempts))
}

func damaged(dir, path string, why error) error {
	return fmt.Errorf("%w: %s: %w. Stop the containers that use it, move the folder %s away, start again, then remove the images from containerd and pull them again",
		ErrDamaged, path, why, dir)
}

// missing refuses to begin with an empty metastore among snapshots: they would be taken for what a crash left.
func missing(dir, path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !unused(dir) {
		return damaged(dir, path, errors.New("it is missing, and there are snapshots"))
	}
	return nil
}

// unused says whether there is no snapshot, nor one that a crash left.
func unused(dir string) bool {
	entries, err := os.ReadDir(filepath.Join(dir, "snapshots"))
	return err == nil && len(entries) == 0
}

// count adds a byte to a file, which is removed when the metastore has been read, and gives its size.
func count(path string) int64 {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 1
	}
	defer f.Close()
	if _, err := f.Write([]byte{'.'}); err != nil {
		return 1
	}
	info, err := f.Stat()
	if err != nil {
		return 1
	}
	return info.Size()
}

func readStore(ctx context.Context, path string, load func(id string, info snapshots.Info) error) (_ *storage.MetaStore, err error) {
	var file *os.File
	store, err := storage.NewMetaStore(path, func(o *bbolt.Options) error {
		o.Timeout = lockPatience
		o.OpenFile = func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			file, err = os.OpenFile(name, flag, mode)
			return file, err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// A page that is not there, as in a file that was cut short, is a fault of memory.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // of this goroutine
	defer func() {
		if p := recover(); p != nil {
			// Its own Close may wait for a transaction that a panic left open. The lock goes with the file.
			err = errors.Join(fmt.Errorf("reading it failed: %v", p), file.Close())
		}
	}()
	err = store.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if errdefs.IsNotFound(err) { // new
			return nil
		}
		if err != nil {
			return err
		}
		for id, key := range ids {
			_, info, _, err := storage.GetInfo(ctx, key)
			if err != nil {
				return err
			}
			if err := load(id, info); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return store, nil
}
