package cache

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
)

// openIndex opens or makes the index and shows load every row. What is damaged is
// set aside, and load begins again with what could be saved; reset is called before.
func openIndex(path string, log *slog.Logger, reset func(), load func(table, key string, content []byte) error) (*index, error) {
	x := &index{path: path, log: log, kept: kept, pending: map[rowKey][]byte{}}
	attempts := x.begin()
	_, suspected := os.Stat(x.suspectPath())
	if attempts > openAttempts || suspected == nil {
		why := fmt.Errorf("%w: it was given up while in use", ErrDamaged)
		if attempts > openAttempts {
			why = fmt.Errorf("%w: the process died %d times while opening it", ErrDamaged, attempts-1)
		}
		if err := x.setAside(why, attempts <= openAttempts); err != nil {
			return nil, err
		}
	}
	reset()
	err := x.open(load)
	if errors.Is(err, ErrDamaged) {
		if err := x.setAside(err, true); err != nil {
			return nil, err
		}
		reset()
		err = x.open(load)
	}
	if err != nil {
		return nil, err
	}
	for k, row := range x.pending { // saved ones
		if err := load(k.table, k.key, row[checksumBytes:]); err != nil {
			delete(x.pending, k)
		}
	}
	if err := os.Remove(x.attemptsPath()); err != nil {
		return nil, errors.Join(fmt.Errorf("open the cache's index: %w", err), x.close())
	}
	return x, nil
}

func (x *index) attemptsPath() string { return x.path + ".opening" }
func (x *index) suspectPath() string  { return x.path + ".suspect" }
func (x *index) asidePath() string    { return x.path + ".damaged" }

// begin counts the attempts to open the index, this one included, since one succeeded.
func (x *index) begin() int {
	f, err := os.OpenFile(x.attemptsPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
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
	return int(info.Size())
}

func (x *index) open(load func(table, key string, content []byte) error) (err error) {
	defer func() {
		if err != nil && x.file != nil {
			_ = abandon(x.file) // the error is known
			x.db, x.file = nil, nil
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // of this goroutine
	defer guard(&err, "open")
	x.db, err = bbolt.Open(x.path, 0o600, &bbolt.Options{
		Timeout:         time.Second, // the directory's lock is ours, so there is nobody to wait for
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: mapBytes,
		NoStatistics:    true,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			x.file, err = os.OpenFile(name, flag, mode)
			return x.file, err
		},
	})
	switch {
	case errors.As(err, new(syscall.Errno)): // no permission, no space, a folder
		return fmt.Errorf("open the cache's index %s: %w", x.path, err)
	case err != nil:
		return fmt.Errorf("%w: open: %w", ErrDamaged, err)
	}
	if err := x.prepare(); err != nil {
		return err
	}
	return x.db.View(func(tx *bbolt.Tx) error {
		x.counts = map[string]int{}
		return x.walk(tx, load)
	})
}

// prepare makes the bucket of a new file.
func (x *index) prepare() error {
	fresh := false
	err := x.db.View(func(tx *bbolt.Tx) error {
		info, err := x.file.Stat()
		if err != nil {
			return err
		}
		if info.Size() < tx.Size() {
			return fmt.Errorf("%w: it has %d bytes of %d", ErrDamaged, info.Size(), tx.Size())
		}
		if k, _ := tx.Cursor().First(); k == nil {
			fresh = true
			return nil
		}
		rows, err := rowsOf(tx)
		if err != nil {
			return err
		}
		if f := rows.Get(formatKey); !bytes.HasPrefix(f, []byte(format+"\x00")) {
			return fmt.Errorf("%w: its format is %.40q, this version of accel reads %q", ErrDamaged, f, format)
		}
		return nil
	})
	if err != nil || !fresh {
		return err
	}
	return x.db.Update(func(tx *bbolt.Tx) error {
		rows, err := tx.CreateBucket(bucket)
		if err != nil {
			return err
		}
		return rows.Put(formatKey, append([]byte(format), formatFill...))
	})
}

// walk shows load every row.
func (x *index) walk(tx *bbolt.Tx, load func(table, key string, content []byte) error) error {
	return eachRow(tx, func(table, key string, _, v []byte) error {
		content, err := openRow(table, key, v)
		if err != nil {
			return err
		}
		if err := load(table, key, content); err != nil {
			return fmt.Errorf("%w: table %s: %w", ErrDamaged, table, err)
		}
		x.counts[table]++
		return nil
	})
}
