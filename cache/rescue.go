package cache

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"syscall"
	"time"
	"unsafe"

	"go.etcd.io/bbolt"
)

func rowsOf(tx *bbolt.Tx) (*bbolt.Bucket, error) {
	rows := tx.Bucket(bucket)
	if rows == nil || rows.Root() == 0 { // within another row: never ours
		return nil, fmt.Errorf("%w: it has no rows", ErrDamaged)
	}
	return rows, nil
}

// eachRow shows the rows one after the other.
func eachRow(tx *bbolt.Tx, each func(table, key string, k, v []byte) error) error {
	rows, err := rowsOf(tx)
	if err != nil {
		return err
	}
	most := tx.Size() / checksumBytes // rows that the file can hold; more of them are a circle
	inside := mapped(tx)
	var last []byte
	c := rows.Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		if len(k) == 0 || !inside(k) || !inside(v) {
			return fmt.Errorf("%w: a row lies outside of the file", ErrDamaged)
		}
		if most--; most < 0 || bytes.Compare(last, k) >= 0 {
			return fmt.Errorf("%w: rows are out of order", ErrDamaged)
		}
		if last = k; bytes.Equal(k, formatKey) {
			continue
		}
		if err := each(string(k[:1]), string(k[1:]), k, v); err != nil {
			return err
		}
	}
	return nil
}

// mapped says whether a slice that bbolt gave lies in the file: where it comes from noise, it
// may be anywhere.
func mapped(tx *bbolt.Tx) func([]byte) bool {
	start := tx.DB().Info().Data
	end := start + uintptr(tx.Size())
	return func(b []byte) bool {
		at := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
		return len(b) == 0 || (at >= start && at < end && uintptr(len(b)) <= end-at)
	}
}

// ofFiles: rows about what is in files.
func ofFiles(table string) bool {
	return table == tableBlobs || table == tableLayers || table == tableMarks
}

// setAside moves the index away and keeps of it what is good by itself: rows about
// blobs and layers are not (the page may be an old one), the files tell what there is.
func (x *index) setAside(why error, save bool) error {
	if err := os.Rename(x.path, x.asidePath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("set the damaged index aside: %w (it is damaged: %w)", err, why)
	}
	if err := os.Remove(x.suspectPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("set the damaged index aside: %w", err)
	}
	if save {
		x.save()
	}
	x.log.Warn("the cache's index was damaged and is rebuilt from the files", "err", why, "aside", x.asidePath(), "saved_rows", len(x.pending))
	return nil
}

func (x *index) save() {
	var err error
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer guard(&err, "save") // what was read until then is kept
	var file *os.File
	defer func() {
		if file != nil {
			_ = abandon(file) // it was only read
		}
	}()
	db, err := bbolt.Open(x.asidePath(), 0o600, &bbolt.Options{
		ReadOnly: true, Timeout: time.Second, NoStatistics: true,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			file, err = os.OpenFile(name, flag, mode)
			return file, err
		},
	})
	if err != nil {
		return
	}
	tx, err := db.Begin(false)
	if err != nil {
		return
	}
	x.saveRows(tx)
	_ = tx.Rollback() // of a read
	_ = db.Close()    // of a file that was only read
}

// abandon closes the file of a bbolt.DB that cannot be closed itself: after a panic it
// may hold its locks. The map of the file stays, and with it the lock would.
func abandon(file *os.File) error {
	return errors.Join(syscall.Flock(int(file.Fd()), syscall.LOCK_UN), file.Close())
}

// saveRows keeps what is good; the first thing that makes no sense ends it.
func (x *index) saveRows(tx *bbolt.Tx) {
	var err error
	defer guard(&err, "save")
	err = eachRow(tx, func(table, key string, _, v []byte) error {
		if _, err := openRow(table, key, v); err == nil && !ofFiles(table) {
			x.pending[rowKey{table, key}] = bytes.Clone(v)
		}
		return nil
	})
}

// guard turns a panic of bbolt, which panics on pages that make no sense, or a memory
// fault in the mapped file (one that was cut) into an error.
func guard(err *error, doing string) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: %s the index: panic: %v", ErrDamaged, doing, p)
	}
}

func (x *index) giveUp(err error, wedged bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.wedged = x.wedged || wedged
	if x.failed != nil {
		return
	}
	x.failed = fmt.Errorf("the cache's index was given up, start again: %w", err)
	f, err := os.Create(x.suspectPath())
	if err != nil {
		x.log.Error("the damaged index could not be marked as such; remove it by hand", "index", x.path, "err", err)
		return
	}
	f.Close()
}

func (x *index) failure() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.failed
}
