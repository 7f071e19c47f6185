package ledger

import (
	"errors"

	"go.etcd.io/bbolt"
)

// Check reads everything and returns an ErrDamaged for what does not agree.
func (l *Ledger) Check() error {
	return l.file.View(func(bt *bbolt.Tx) error { return errors.Join(l.check(bt), l.file.CheckPages(bt)) })
}
