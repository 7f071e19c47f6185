package ledger

import (
	"context"
	"errors"
	"fmt"

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
const format = "accel profiles 1"

func (l *Ledger) open() (err error) {
	has := boltfile.Schema{Format: format, Buckets: buckets, Pages: true, Check: l.check}
	l.file, err = boltfile.OpenAnew(l.path, has, func(aside string, damage error) {
		l.o.Log.Error("the file of profiles is set aside; images are predicted anew when they are checked, and recorded by their next starts", "file", l.path, "aside", aside, "error", damage)
	})
	return err
}

// Close closes the file. Running calls are waited for; a second Close is no error.
func (l *Ledger) Close() error { return l.file.Close() }

func (l *Ledger) view(ctx context.Context, fn func(*bbolt.Tx) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	return l.located(l.file.View(fn))
}

// update runs fn in a transaction that is durable when it returns nil. fn may be run more
// than once, so it must have no effect outside of it but setting its results anew.
func (l *Ledger) update(ctx context.Context, fn func(*bbolt.Tx) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	return l.located(l.file.Update(fn))
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
