package fleet

import (
	"context"
	"encoding/json"
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
	ErrLocked = errors.New("fleet file is in use by another process")
	// ErrDamaged: the file was cut or overwritten. Open heals it.
	ErrDamaged = errors.New("fleet file is damaged")
)

const (
	// lockWait is how long Open waits for a process that is just ending.
	lockWait = 2 * time.Second
	// gather is how long a write waits for others that share its sync: when an image
	// becomes Ready, all nodes report at once.
	gather = 2 * time.Millisecond
	// format is the layout that this code reads and writes.
	format = "accel fleet 1"
)

func (f *Fleet) open() (err error) {
	_, err = os.Stat(f.path)
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		if err := os.MkdirAll(filepath.Dir(f.path), 0o700); err != nil {
			return fmt.Errorf("make the folder of fleet file %s: %w", f.path, err)
		}
	}
	if err := f.openFile(); err != nil {
		return err
	}
	if fresh { // bbolt syncs the file, not its name
		if err := syncFolder(filepath.Dir(f.path)); err != nil {
			return errors.Join(fmt.Errorf("sync the folder of fleet file %s: %w", f.path, err), f.db.Close())
		}
	}
	return nil
}

func (f *Fleet) openFile() (err error) {
	var file *os.File
	defer func() {
		if err != nil && file != nil {
			file.Close() // also what bbolt leaves open, and so locked, when it panics
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // of this goroutine
	defer f.guard(&err)
	db, err := bbolt.Open(f.path, 0o600, &bbolt.Options{
		Timeout: lockWait, FreelistType: bbolt.FreelistMapType,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			file, err = os.OpenFile(name, flag, mode)
			return file, err
		},
	})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%w: %s (waited %s)", ErrLocked, f.path, lockWait)
	case errors.As(err, new(syscall.Errno)): // no permission, no space, a folder
		return fmt.Errorf("open fleet file: %w", err)
	case err != nil:
		return fmt.Errorf("%w: %s: %w", ErrDamaged, f.path, err)
	}
	db.MaxBatchDelay = gather
	f.db = db
	if err := f.inspect(); err != nil {
		return errors.Join(err, db.Close())
	}
	return nil
}

// inspect makes the buckets of a new file, and reads all of an old one: what does not
// agree now would fail some node for ever later.
func (f *Fleet) inspect() error {
	info, err := os.Stat(f.path)
	if err != nil {
		return fmt.Errorf("open fleet file: %w", err)
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
		if m := bt.Bucket(bucketMeta); m == nil || string(m.Get(keyFormat)) != format {
			return fmt.Errorf("%w: %s is not in the format %q", ErrDamaged, f.path, format)
		}
		if err := f.check(bt); err != nil {
			return err
		}
		if err := f.checkPages(bt); err != nil {
			return err
		}
		return f.loadNodes(bt)
	})
	if err != nil || !fresh {
		return err
	}
	err = f.db.Update(func(bt *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := bt.CreateBucket(name); err != nil {
				return err
			}
		}
		return bt.Bucket(bucketMeta).Put(keyFormat, []byte(format))
	})
	if err != nil {
		return fmt.Errorf("make fleet file %s: %w", f.path, err)
	}
	return nil
}

// checkPages looks at what lies below the rows: a free list that is wrong makes a later
// commit panic.
func (f *Fleet) checkPages(bt *bbolt.Tx) error {
	var first error
	for err := range bt.Check() { // to its end, for it reads the transaction
		if first == nil {
			first = fmt.Errorf("%w: %s: %w", ErrDamaged, f.path, err)
		}
	}
	return first
}

func (f *Fleet) loadNodes(bt *bbolt.Tx) error {
	clear(f.nodes)
	return bt.Bucket(bucketNodes).ForEach(func(k, v []byte) error {
		m := &member{}
		if err := json.Unmarshal(v, &m.Node); err != nil {
			return fmt.Errorf("%w: %s: node %q: %w", ErrDamaged, f.path, k, err)
		}
		if m.Name != string(k) {
			return fmt.Errorf("%w: %s: node %q has the name %q", ErrDamaged, f.path, k, m.Name)
		}
		m.heard, m.savedAt, m.owesCatchUp = m.SeenAt, m.SeenAt, true
		f.nodes[m.Name] = m
		return nil
	})
}

// setAside moves a damaged file away; the last one is kept.
func (f *Fleet) setAside(damage error) error {
	aside := f.path + ".damaged"
	f.o.Log.Error("the fleet's file is set aside; nodes and recent images come back by themselves", "file", f.path, "aside", aside, "error", damage)
	if err := os.Rename(f.path, aside); err != nil {
		return errors.Join(damage, err)
	}
	return syncFolder(filepath.Dir(f.path))
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
func (f *Fleet) guard(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %s: panic: %v (start accel again, which heals it)", ErrDamaged, f.path, p)
	}
}

// Close closes the file. Running calls are waited for; a second Close is no error.
func (f *Fleet) Close() error {
	if err := f.db.Close(); err != nil {
		return fmt.Errorf("close fleet file %s: %w", f.path, err)
	}
	return nil
}

func (f *Fleet) view(ctx context.Context, fn func(*change) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer f.guard(&err)
	err = f.db.View(func(bt *bbolt.Tx) error { return fn(&change{bt: bt, Fleet: f, now: stamp(f.o.Now())}) })
	return f.located(err)
}

// change is one run of a transaction: the time that all of it happens at, and what
// is to be told after the commit.
type change struct {
	*Fleet
	bt       *bbolt.Tx
	now      time.Time
	wake     map[string]struct{} // nodes with something new to fetch
	made     int
	finished map[accel.WarmState]int
	fetched  int64
	gaveWay  int
	refused  int
}

// update runs fn in a transaction that is durable when it returns nil. fn may be run
// more than once, so it must have no effect outside its change but setting its results anew.
func (f *Fleet) update(ctx context.Context, fn func(*change) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	defer f.guard(&err)
	var c *change
	err = f.db.Batch(func(bt *bbolt.Tx) error {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		c = &change{bt: bt, Fleet: f, now: stamp(f.o.Now()), wake: map[string]struct{}{}, finished: map[accel.WarmState]int{}}
		return fn(c)
	})
	if err != nil {
		return f.located(err)
	}
	f.metrics.count(c)
	f.hub.wake(c.wake)
	return nil
}

// located adds the file's name to errors of bbolt.
func (f *Fleet) located(err error) error {
	for _, ours := range []error{accel.ErrNotFound, accel.ErrInvalid, accel.ErrConflict, ErrDamaged} {
		if errors.Is(err, ours) {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("fleet file %s: %w", f.path, err)
	}
	return nil
}
