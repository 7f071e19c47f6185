package boltstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"accel/internal/durable"
	"accel/readiness"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Errors that Open and transactions return beside those of package accel.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("store file is in use by another process")
	// ErrDamaged: the file is no store, or was cut or overwritten.
	ErrDamaged = errors.New("store file is damaged")
	// ErrClosed: Close was called before.
	ErrClosed = errors.New("store is closed")
)

const (
	// lockWait is how long Open waits for a process that is just ending.
	lockWait = 2 * time.Second
	// mapBytes is address space, not memory: below this size the file never needs
	// to be mapped anew, for which bbolt waits until no transaction reads.
	mapBytes = 1 << 30
	// format is the layout that this code reads and writes.
	format = "accel readiness 1"
)

// Store is a readiness.Store in one file. It is safe for concurrent use.
type Store struct {
	db   *bbolt.DB
	file *os.File // db's, which holds the lock
	path string

	mu     sync.Mutex
	queue  []*call // updates that no leader has taken yet
	failed error   // why nothing may be written any more, nil while all is well
	wedged bool    // bbolt panicked and may hold its locks for ever: not even reads
	closed bool

	lead     chan struct{}  // holds one token while an update commits
	busy     sync.WaitGroup // running View and Update calls
	resident residency
}

// Open opens the store in the file path, which is made (mode 0600, its folder 0700) where there is
// none. ErrLocked when another process has it open for longer than 2 s; ErrDamaged
// when the file is there but is no whole store. The error names the file.
func Open(path string) (*Store, error) {
	_, err := os.Stat(path)
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, fmt.Errorf("make the store's folder: %w", err)
		}
	}
	s := &Store{path: path, lead: make(chan struct{}, 1)}
	if err := s.open(); err != nil {
		return nil, err
	}
	if fresh { // bbolt syncs the file, not the name
		if err := durable.SyncFolder(filepath.Dir(path)); err != nil {
			return nil, errors.Join(fmt.Errorf("sync the folder of store %s: %w", path, err), s.Close())
		}
	}
	return s, nil
}

func (s *Store) open() (err error) {
	defer func() {
		if err != nil && s.file != nil {
			s.file.Close() // also what bbolt leaves open, and so locked, when it panics
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // of this goroutine
	defer s.guard(&err, "open")
	s.db, err = bbolt.Open(s.path, 0o600, &bbolt.Options{
		Timeout: lockWait,
		// Written with each commit, which costs a page or two; in return the start
		// need not walk the whole file.
		NoFreelistSync:  false,
		FreelistType:    bbolt.FreelistMapType,
		InitialMmapSize: mapBytes,
		NoStatistics:    true,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			s.file, err = os.OpenFile(name, flag, mode)
			return s.file, err
		},
	})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%w: %s (waited %s; does another accel run with this data directory?)", ErrLocked, s.path, lockWait)
	case errors.As(err, new(syscall.Errno)): // no permission, no space, a folder
		return fmt.Errorf("open store %s: %w", s.path, err)
	case err != nil:
		return s.damaged("open", err)
	}
	if err := s.inspect(); err != nil {
		return errors.Join(err, s.db.Close())
	}
	return nil
}

// inspect looks at what a cut or foreign file would lack, and makes the buckets
// of a new one.
func (s *Store) inspect() error {
	info, err := os.Stat(s.path)
	if err != nil {
		return fmt.Errorf("open store %s: %w", s.path, err)
	}
	complete := false
	err = s.db.View(func(bt *bbolt.Tx) error {
		if info.Size() < bt.Size() {
			return s.damaged("open", fmt.Errorf("it has %d bytes of %d", info.Size(), bt.Size()))
		}
		found := 0
		for _, name := range buckets {
			b := bt.Bucket(name)
			if b == nil {
				continue
			}
			found++
			c := b.Cursor()
			c.First()
			c.Last()
		}
		complete = found == len(buckets)
		if k, _ := bt.Cursor().First(); k == nil {
			return nil // new: no bucket at all
		}
		m := bt.Bucket(bucketMeta)
		if m == nil || !complete {
			return s.damaged("open", fmt.Errorf("it has %d of %d tables", found, len(buckets)))
		}
		if f := m.Get(keyFormat); string(f) != format {
			return fmt.Errorf("open store %s: its format is %q, this version of accel reads %q", s.path, f, format)
		}
		return nil
	})
	if err != nil || complete {
		return err
	}
	err = s.db.Update(func(bt *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := bt.CreateBucket(name); err != nil {
				return err
			}
		}
		return bt.Bucket(bucketMeta).Put(keyFormat, []byte(format))
	})
	if err != nil {
		return fmt.Errorf("make store %s: %w", s.path, err)
	}
	return nil
}

func (s *Store) damaged(doing string, err error) error {
	return fmt.Errorf("%w: %s store %s: %w (stop accel, move the file away or restore it; reconcile finds the images again)", ErrDamaged, doing, s.path, err)
}

// guard turns a panic of bbolt, which panics on pages that make no sense, or a memory
// fault in the mapped file (one that was cut) into an error.
func (s *Store) guard(err *error, doing string) {
	if p := recover(); p != nil {
		*err = s.damaged(doing, fmt.Errorf("panic: %v", p))
	}
}

// View implements readiness.Store.
func (s *Store) View(ctx context.Context, fn func(readiness.Tx) error) error {
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer s.busy.Done()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer s.trim()
	return s.view(ctx, fn)
}

func (s *Store) view(ctx context.Context, fn func(readiness.Tx) error) (err error) {
	defer s.guard(&err, "read")
	bt, err := s.begin(false)
	if err != nil {
		return err
	}
	defer bt.Rollback() //nolint:errcheck // of a read
	return fn(&tx{ctx: ctx, bt: bt})
}

// enter counts a call in, so that Close waits for it.
func (s *Store) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("%w: %s", ErrClosed, s.path)
	}
	s.busy.Add(1)
	return nil
}

// Close waits for running calls and closes the file. A second Close is no error.
func (s *Store) Close() error {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.busy.Wait()
	s.mu.Lock()
	wedged := s.wedged
	s.mu.Unlock()
	if wedged {
		return s.file.Close() // gives the lock back; the rest would hang
	}
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close store %s: %w", s.path, err)
	}
	return nil
}

// begin starts a transaction of bbolt unless the store has been given up.
func (s *Store) begin(write bool) (bt *bbolt.Tx, err error) {
	s.mu.Lock()
	if s.wedged || (write && s.failed != nil) {
		err = s.failed
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	err = s.bolt("use", func() (err error) {
		bt, err = s.db.Begin(write)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("use store %s: %w", s.path, err)
	}
	return bt, nil
}

// bolt runs a step of bbolt itself. A panic there may leave bbolt's locks held, so
// nothing is asked of it afterwards.
func (s *Store) bolt(doing string, step func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.damaged(doing, fmt.Errorf("panic: %v", p))
			s.giveUp(err, true)
		}
	}()
	return step()
}

func (s *Store) giveUp(err error, wedged bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wedged = s.wedged || wedged
	if s.failed == nil {
		s.failed = fmt.Errorf("store %s was given up after an error, start accel again: %w", s.path, err)
	}
}

// noSpace reports errors after which the file is as it was and a later commit may succeed.
func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
