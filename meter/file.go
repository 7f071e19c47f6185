package meter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Errors that OpenSpool, OpenLedger and their methods return beside those of package accel.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("file of pulls is in use by another process")
	// ErrDamaged: the file was cut or overwritten. A spool sets it aside by itself.
	ErrDamaged = errors.New("file of pulls is damaged")
	// ErrFull: the disk has no room. Nothing was changed, and it passes when there is room again.
	ErrFull = errors.New("no room on the disk")
	// ErrClosed: Close was called before.
	ErrClosed = errors.New("file of pulls is closed")
)

const (
	// lockWait is how long opening waits for a process that is just ending.
	lockWait = 2 * time.Second
	// gather is how long a write waits for others that share its sync.
	gather = 2 * time.Millisecond
)

var (
	bucketMeta = []byte("meta")
	keyFormat  = []byte("format")
)

// file is a bbolt file whose panics are errors.
type file struct {
	path string
	db   *bbolt.DB
	raw  *os.File // db's, which holds the lock

	mu     sync.Mutex
	failed error // bbolt panicked and may hold its locks for ever: nothing is asked of it any more
	closed bool
}

// schema is what a file has.
type schema struct {
	format  string
	older   string   // a format that lacked some of the buckets, which are made; empty: none
	buckets [][]byte // and bucketMeta
}

// openFile opens the file path, or makes it (mode 0600, its folder 0700). check looks at an old one.
func openFile(path string, has schema, check func(*bbolt.Tx) error) (*file, error) {
	_, err := os.Stat(path)
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, fmt.Errorf("make the folder of %s: %w", path, err)
		}
	}
	f := &file{path: path}
	if err := f.open(has, check); err != nil {
		if f.raw != nil {
			f.raw.Close() // also what bbolt leaves open, and so locked, when it panics
		}
		if fresh && errors.Is(err, ErrFull) {
			err = errors.Join(err, os.Remove(path)) // it is not whole, and has nothing
		}
		return nil, err
	}
	if fresh { // bbolt syncs the file, not its name
		if err := syncFolder(filepath.Dir(path)); err != nil {
			return nil, errors.Join(fmt.Errorf("sync the folder of %s: %w", path, err), f.close())
		}
	}
	return f, nil
}

func (f *file) open(has schema, check func(*bbolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // of this goroutine
	defer f.guard(&err)
	f.db, err = bbolt.Open(f.path, 0o600, &bbolt.Options{
		Timeout: lockWait, FreelistType: bbolt.FreelistMapType, NoStatistics: true,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			f.raw, err = os.OpenFile(name, flag, mode)
			return f.raw, err
		},
	})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%w: %s (waited %s)", ErrLocked, f.path, lockWait)
	case isFull(err):
		return fmt.Errorf("open file of pulls: %w: %w", ErrFull, err)
	case errors.As(err, new(syscall.Errno)): // no permission, no space, a folder
		return fmt.Errorf("open file of pulls: %w", err)
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrDamaged, f.path, err)
	}
	f.db.MaxBatchDelay = gather
	if err := f.inspect(has, check); err != nil {
		return errors.Join(err, f.db.Close())
	}
	return nil
}

// inspect makes the buckets of a new or older file, and looks at what a cut or foreign one would lack.
func (f *file) inspect(has schema, check func(*bbolt.Tx) error) error {
	info, err := os.Stat(f.path)
	if err != nil {
		return fmt.Errorf("open file of pulls: %w", err)
	}
	fresh := false
	err = f.db.View(func(bt *bbolt.Tx) error {
		if info.Size() < bt.Size() {
			return fmt.Errorf("%w: %s has %d bytes of %d", ErrDamaged, f.path, info.Size(), bt.Size())
		}
		if k, _ := bt.Cursor().First(); k == nil {
			fresh = true
			return nil
		}
		m := bt.Bucket(bucketMeta)
		if m != nil && has.older != "" && string(m.Get(keyFormat)) == has.older {
			fresh = true
			return check(bt)
		}
		if m == nil || string(m.Get(keyFormat)) != has.format {
			return fmt.Errorf("%w: %s is not in the format %q", ErrDamaged, f.path, has.format)
		}
		for _, name := range has.buckets {
			if bt.Bucket(name) == nil {
				return fmt.Errorf("%w: %s lacks its table %q", ErrDamaged, f.path, name)
			}
		}
		return check(bt)
	})
	if err != nil || !fresh {
		return err
	}
	err = f.db.Update(func(bt *bbolt.Tx) error {
		for _, name := range append([][]byte{bucketMeta}, has.buckets...) {
			if _, err := bt.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return bt.Bucket(bucketMeta).Put(keyFormat, []byte(has.format))
	})
	if isFull(err) {
		err = fmt.Errorf("%w: %w", ErrFull, err)
	}
	if err != nil {
		return fmt.Errorf("make file of pulls %s: %w", f.path, err)
	}
	return nil
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// guard turns a panic of bbolt, which panics on pages that make no sense, or a memory
// fault in the mapped file (one that was cut) into an error.
func (f *file) guard(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %s: panic: %v (start accel again)", ErrDamaged, f.path, p)
		f.mu.Lock()
		f.failed = *err
		f.mu.Unlock()
	}
}

func (f *file) usable() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return fmt.Errorf("%w: %s", ErrClosed, f.path)
	}
	return f.failed
}

func (f *file) view(fn func(*bbolt.Tx) error) (err error) {
	if err := f.usable(); err != nil {
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer f.guard(&err)
	return f.db.View(fn)
}

// update runs fn in a transaction that is durable when it returns nil, together with
// other callers'. fn may be run more than once. ErrFull where there is no room.
func (f *file) update(fn func(*bbolt.Tx) error) (err error) {
	if err := f.usable(); err != nil {
		return err
	}
	defer f.guard(&err)
	err = f.db.Batch(func(bt *bbolt.Tx) (err error) {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		return fn(bt)
	})
	if isFull(err) {
		err = fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// close waits for running calls. A second close is no error.
func (f *file) close() error {
	f.mu.Lock()
	closed, failed := f.closed, f.failed
	f.closed = true
	f.mu.Unlock()
	switch {
	case closed:
		return nil
	case failed != nil:
		return f.raw.Close() // gives the lock back; the rest might hang
	}
	if err := f.db.Close(); err != nil {
		return fmt.Errorf("close file of pulls %s: %w", f.path, err)
	}
	return nil
}
