package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"accel"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Errors that Open returns beside those of package accel.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("file of profiles is in use by another process")
	// ErrDamaged: the file was cut or overwritten. Open heals it.
	ErrDamaged = errors.New("file of profiles is damaged")
)

const (
	// lockWait is how long Open waits for a process that is just ending.
	lockWait = 2 * time.Second
	// gather is how long a write waits for others that share its sync: when a deployment
	// grows, many nodes report at once.
	gather = 2 * time.Millisecond
	// format is the layout that this code reads and writes.
	format = "accel profiles 1"
)

func (l *Ledger) open() error {
	_, err := os.Stat(l.path)
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		if err := os.MkdirAll(filepath.Dir(l.path), 0o700); err != nil {
			return fmt.Errorf("make the folder of profiles %s: %w", l.path, err)
		}
	}
	if err := l.openFile(); err != nil {
		return err
	}
	if fresh { // bbolt syncs the file, not its name
		if err := syncFolder(filepath.Dir(l.path)); err != nil {
			return errors.Join(fmt.Errorf("sync the folder of profiles %s: %w", l.path, err), l.db.Close())
		}
	}
	return nil
}

func (l *Ledger) openFile() (err error) {
	var file *os.File
	defer func() {
		if err != nil && file != nil {
			file.Close() // also what bbolt leaves open, and so locked, when it panics
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // of this goroutine
	defer l.guard(&err)
	db, err := bbolt.Open(l.path, 0o600, &bbolt.Options{
		Timeout: lockWait, FreelistType: bbolt.FreelistMapType,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			file, err = os.OpenFile(name, flag, mode)
			return file, err
		},
	})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%w: %s (waited %s)", ErrLocked, l.path, lockWait)
	case errors.As(err, new(syscall.Errno)): // no permission, no space, a folder
		return fmt.Errorf("open profiles: %w", err)
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrDamaged, l.path, err)
	}
	db.MaxBatchDelay = gather
	l.db = db
	if err := l.inspect(); err != nil {
		return errors.Join(err, db.Close())
	}
	return nil
}

// inspect makes the buckets of a new file, and checks the rows of an old one.
func (l *Ledger) inspect() error {
	info, err := os.Stat(l.path)
	if err != nil {
		return fmt.Errorf("open profiles: %w", err)
	}
	fresh := false
	err = l.db.View(func(bt *bbolt.Tx) error {
		if info.Size() < bt.Size() {
			return fmt.Errorf("%w: %s has %d bytes of %d", ErrDamaged, l.path, info.Size(), bt.Size())
		}
		if k, _ := bt.Cursor().First(); k == nil {
			fresh = true
			return nil
		}
		if m := bt.Bucket(bucketMeta); m == nil || string(m.Get(keyFormat)) != format {
			return fmt.Errorf("%w: %s is not in the format %q", ErrDamaged, l.path, format)
		}
		if err := l.check(bt); err != nil {
			return err
		}
		return l.checkPages(bt)
	})
	if err != nil || !fresh {
		return err
	}
	err = l.db.Update(func(bt *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := bt.CreateBucket(name); err != nil {
				return err
			}
		}
		return bt.Bucket(bucketMeta).Put(keyFormat, []byte(format))
	})
	if err != nil {
		return fmt.Errorf("make the file of profiles %s: %w", l.path, err)
	}
	return nil
}

// checkPages looks at what lies below the rows: a free list that is wrong makes a later
// commit panic.
func (l *Ledger) checkPages(bt *bbolt.Tx) error {
	var first error
	for err := range bt.Check() { // to its end, for it reads the transaction
		if first == nil {
			first = fmt.Errorf("%w: %s: %w", ErrDamaged, l.path, err)
		}
	}
	return first
}

// setAside moves a damaged file away; the last one is kept.
func (l *Ledger) setAside(damage error) error {
	aside := l.path + ".damaged"
	l.o.Log.Error("the file of profiles is set aside; images are predicted anew when they are checked, and recorded by their next starts", "file", l.path, "aside", aside, "error", damage)
	if err := os.Rename(l.path, aside); err != nil {
		return errors.Join(damage, err)
	}
	return syncFolder(filepath.Dir(l.path))
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
func (l *Ledger) guard(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %s: panic: %v (start accel again, which heals it)", ErrDamaged, l.path, p)
	}
}

// Close closes the file. Running calls are waited for; a second Close is no error.
func (l *Ledger) Close() error {
	if err := l.db.Close(); err != nil {
		return fmt.Errorf("close the file of profiles %s: %w", l.path, err)
	}
	return nil
}

func (l *Ledger) view(ctx context.Context, fn func(*bbolt.Tx) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer l.guard(&err)
	return l.located(l.db.View(fn))
}

// update runs fn in a transaction that is durable when it returns nil. fn may be run more
// than once, so it must have no effect outside of it but setting its results anew.
func (l *Ledger) update(ctx context.Context, fn func(*bbolt.Tx) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	defer l.guard(&err)
	return l.located(l.db.Batch(func(bt *bbolt.Tx) error {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		return fn(bt)
	}))
}

// located adds the file's name to errors of bbolt.
func (l *Ledger) located(err error) error {
	for _, ours := range []error{accel.ErrNotFound, accel.ErrInvalid, ErrDamaged} {
		if errors.Is(err, ours) {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("file of profiles %s: %w", l.path, err)
	}
	return nil
}
