// Package boltfile keeps a bbolt file of a component of its own: one whose panics are errors, which is
// checked when it is opened, and which is set aside where that is what its owner wants with a damaged one.
package boltfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"accel/internal/durable"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Errors of this package; their messages name the file.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("file is in use by another process")
	// ErrDamaged: the file was cut or overwritten.
	ErrDamaged = errors.New("file is damaged")
	// ErrFull: the disk has no room. Nothing was changed, and it passes when there is room again.
	ErrFull = errors.New("no room on the disk")
	// ErrClosed: Close was called before.
	ErrClosed = errors.New("file is closed")
)

const (
	// lockWait is how long opening waits for a process that is just ending.
	lockWait = 2 * time.Second
	// gather is how long a write waits for others that share its sync.
	gather = 2 * time.Millisecond
)

// Meta is the bucket that each file has, and Format the key in it by which its layout is known.
var (
	Meta   = []byte("meta")
	Format = []byte("format")
)

// File is a bbolt file whose panics are errors. It is safe for concurrent use.
type File struct {
	path string
	db   *bbolt.DB
	raw  *os.File // db's, which holds the lock

	mu     sync.Mutex
	failed error // bbolt panicked and may hold its locks for ever: nothing is asked of it any more
	closed bool
}

// Schema is what a file has.
type Schema struct {
	Format  string
	Older   string   // a format that lacked some of the buckets, which are made; empty: none
	Buckets [][]byte // and Meta
	// Check looks at an old file; its error says ErrDamaged where that is so. nil: nothing does.
	Check func(*bbolt.Tx) error
	// Pages has what lies below the rows looked at too, which reads all of the file: a free list that is wrong makes a
	// later commit panic.
	Pages bool
}

// Open opens the file path, or makes it (mode 0600, its folder 0700). The errors are the package's, Schema.Check's and the
// file system's.
func Open(path string, has Schema) (*File, error) {
	_, err := os.Stat(path)
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, fmt.Errorf("make the folder of %s: %w", path, err)
		}
	}
	f := &File{path: path}
	if err := f.open(has); err != nil {
		if f.raw != nil {
			f.raw.Close() // also what bbolt leaves open, and so locked, when it panics
		}
		if fresh && errors.Is(err, ErrFull) {
			err = errors.Join(err, os.Remove(path)) // it is not whole, and has nothing
		}
		return nil, err
	}
	if fresh { // bbolt syncs the file, not its name
		if err := durable.SyncFolder(filepath.Dir(path)); err != nil {
			return nil, errors.Join(fmt.Errorf("sync the folder of %s: %w", path, err), f.Close())
		}
	}
	return f, nil
}

// OpenAnew is Open that moves a damaged file away, to path.damaged (the last one is kept), and begins a new one. tell is
// called before, to log that.
func OpenAnew(path string, has Schema, tell func(aside string, damage error)) (*File, error) {
	f, err := Open(path, has)
	if !errors.Is(err, ErrDamaged) {
		return f, err
	}
	aside := path + ".damaged"
	tell(aside, err)
	if moved := errors.Join(os.Rename(path, aside), durable.SyncFolder(filepath.Dir(path))); moved != nil {
		return nil, fmt.Errorf("set %s aside: %w (%w)", path, moved, err)
	}
	return Open(path, has)
}

// Path is the file's.
func (f *File) Path() string { return f.path }

func (f *File) open(has Schema) (err error) {
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
		return fmt.Errorf("open %s: %w: %w", f.path, ErrFull, err)
	case errors.As(err, new(syscall.Errno)): // no permission, no space, a folder
		return fmt.Errorf("open %s: %w", f.path, err)
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrDamaged, f.path, err)
	}
	f.db.MaxBatchDelay = gather
	if err := f.inspect(has); err != nil {
		return errors.Join(err, f.db.Close())
	}
	return nil
}

// inspect makes the buckets of a new or older file, and looks at what a cut or foreign one would lack.
func (f *File) inspect(has Schema) error {
	info, err := os.Stat(f.path)
	if err != nil {
		return fmt.Errorf("open %s: %w", f.path, err)
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
		m := bt.Bucket(Meta)
		if m != nil && has.Older != "" && string(m.Get(Format)) == has.Older {
			fresh = true
			return f.check(bt, has)
		}
		if m == nil || string(m.Get(Format)) != has.Format {
			return fmt.Errorf("%w: %s is not in the format %q", ErrDamaged, f.path, has.Format)
		}
		for _, name := range has.Buckets {
			if bt.Bucket(name) == nil {
				return fmt.Errorf("%w: %s lacks its table %q", ErrDamaged, f.path, name)
			}
		}
		return f.check(bt, has)
	})
	if err != nil || !fresh {
		return err
	}
	err = f.db.Update(func(bt *bbolt.Tx) error {
		for _, name := range append([][]byte{Meta}, has.Buckets...) {
			if _, err := bt.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return bt.Bucket(Meta).Put(Format, []byte(has.Format))
	})
	if isFull(err) {
		err = fmt.Errorf("%w: %w", ErrFull, err)
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", f.path, err)
	}
	return nil
}

// check looks at an old file's rows, and below them.
func (f *File) check(bt *bbolt.Tx, has Schema) error {
	if has.Check != nil {
		if err := has.Check(bt); err != nil {
			return err
		}
	}
	if !has.Pages {
		return nil
	}
	return f.CheckPages(bt)
}

// CheckPages says what is wrong below the rows.
func (f *File) CheckPages(bt *bbolt.Tx) error {
	var first error
	for err := range bt.Check() { // to its end, for it reads the transaction
		if first == nil {
			first = fmt.Errorf("%w: %s: %w", ErrDamaged, f.path, err)
		}
	}
	return first
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// guard turns a panic of bbolt, which panics on pages that make no sense, or a memory
// fault in the mapped file (one that was cut) into an error.
func (f *File) guard(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %s: panic: %v (start accel again)", ErrDamaged, f.path, p)
		f.mu.Lock()
		f.failed = *err
		f.mu.Unlock()
	}
}

func (f *File) usable() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return fmt.Errorf("%w: %s", ErrClosed, f.path)
	}
	return f.failed
}

// View runs fn in a transaction that reads.
func (f *File) View(fn func(*bbolt.Tx) error) (err error) {
	if err := f.usable(); err != nil {
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer f.guard(&err)
	return f.db.View(fn)
}

// Update runs fn in a transaction that is durable when it returns nil, together with
// other callers'. fn may be run more than once. ErrFull where there is no room.
func (f *File) Update(fn func(*bbolt.Tx) error) (err error) {
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

// Close waits for running calls. A second Close is no error.
func (f *File) Close() error {
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
		return fmt.Errorf("close %s: %w", f.path, err)
	}
	return nil
}
