package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"accel"
	"accel/internal/boltfile"

	"go.etcd.io/bbolt"
)

// Errors that Open returns beside those of package accel.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = boltfile.ErrLocked
	// ErrDamaged: the file was cut or overwritten. Open heals it.
	ErrDamaged = boltfile.ErrDamaged
)

// format is the layout that this code reads and writes.
const format = "accel fleet 1"

// open reads all of an old file: what does not agree now would fail some node for ever later.
func (f *Fleet) open() (err error) {
	has := boltfile.Schema{Format: format, Buckets: buckets, Pages: true, Check: func(bt *bbolt.Tx) error {
		if err := f.check(bt); err != nil {
			return err
		}
		return f.loadNodes(bt)
	}}
	f.file, err = boltfile.OpenAnew(f.path, has, func(aside string, damage error) {
		clear(f.nodes)
		f.o.Log.Error("the fleet's file is set aside; nodes and recent images come back by themselves", "file", f.path, "aside", aside, "error", damage)
	})
	return err
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

// Close closes the file. Running calls are waited for; a second Close is no error.
func (f *Fleet) Close() error { return f.file.Close() }

func (f *Fleet) view(ctx context.Context, fn func(*change) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	err = f.file.View(func(bt *bbolt.Tx) error { return fn(&change{bt: bt, Fleet: f, now: stamp(f.o.Now())}) })
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
	var c *change
	err = f.file.Update(func(bt *bbolt.Tx) error {
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
