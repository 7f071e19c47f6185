package cache

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"runtime/debug"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// The tables of the index: the first byte of a row's key.
const (
	tableBlobs     = "b"
	tableManifests = "m"
	tableTags      = "t"
	tableLinks     = "l"
	tableGrants    = "g"
	tableReferrers = "r"
	tablePins      = "p"
	tableMeta      = "f"
)

// bucket holds all rows. There is one only: bbolt keeps a small bucket within
// a row of another, copies that to the heap, and follows what offsets a damaged one has there,
// which the garbage collector may find and end the process for. The padding
// of the row about the format makes it too large for that.
var (
	bucket     = []byte("rows")
	formatKey  = []byte(tableMeta + "ormat")
	formatFill = make([]byte, 2048)
)

// kept says how many rows of a table there may be; the oldest above it are removed. What a
// registry or a client makes us remember is bounded so.
var kept = map[string]int{tableTags: 50_000, tableLinks: 200_000, tableGrants: 50_000, tableReferrers: 10_000}

const (
	// format is the layout that this code reads and writes.
	format = "accel cache 1"
	// mapBytes is address space, not memory: below this size the file never needs to
	// be mapped anew, for which bbolt waits until no transaction reads.
	mapBytes = 1 << 30
	// openAttempts is how often in a row the process may die while it opens the
	// index before it is set aside unread: noise may lead bbolt in circles.
	openAttempts = 3
)

type rowKey struct{ table, key string }

// index is the file index.db. Rows that were put are readable at once and on disk
// with the next commit.
type index struct {
	path string
	log  *slog.Logger
	db   *bbolt.DB
	file *os.File
	kept map[string]int // of each table

	mu      sync.Mutex
	pending map[rowKey][]byte // sealed; nil: to be deleted
	flight  map[rowKey][]byte // of the commit that is running
	counts  map[string]int
	failed  error // why nothing may be written any more
	wedged  bool  // bbolt panicked and may hold its locks: not even reads
}

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

// setAside moves the index away and keeps of it what is good by itself: rows about
// blobs are not (the page may be an old one), the files tell what there is.
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
		if _, err := openRow(table, key, v); err == nil && table != tableBlobs {
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

// get returns a row's content, not for changing.
func (x *index) get(table, key string) ([]byte, bool) {
	k := rowKey{table, key}
	x.mu.Lock()
	row, ok := x.pending[k]
	if !ok {
		row, ok = x.flight[k]
	}
	db := x.db
	if x.wedged {
		db = nil
	}
	x.mu.Unlock()
	if ok {
		return bytes.Clone(row[min(len(row), checksumBytes):]), row != nil
	}
	if db == nil {
		return nil, false
	}
	content, err := fetchRow(db, k)
	if err != nil && !errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		x.giveUp(err, false)
	}
	return content, err == nil && content != nil
}

func fetchRow(db *bbolt.DB, k rowKey) (content []byte, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer guard(&err, "read")
	err = db.View(func(tx *bbolt.Tx) error {
		rows, err := rowsOf(tx)
		if err != nil {
			return err
		}
		v := rows.Get([]byte(k.table + k.key))
		if v == nil {
			return nil
		}
		if !mapped(tx)(v) {
			return fmt.Errorf("%w: a row lies outside of the file", ErrDamaged)
		}
		c, err := openRow(k.table, k.key, v)
		content = bytes.Clone(c)
		return err
	})
	return content, err
}

// put makes a row readable, and durable with the next commit.
func (x *index) put(table, key string, content []byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.pending[rowKey{table, key}] = sealRow(table, key, content)
}

func (x *index) remove(table, key string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.pending[rowKey{table, key}] = nil
}

// dirty reports whether there are rows to commit.
func (x *index) dirty() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.pending) > 0
}

// commit writes what is pending, and rows and deletions of its own. One at a time.
func (x *index) commit(own map[rowKey][]byte) error {
	x.mu.Lock()
	if x.failed != nil {
		defer x.mu.Unlock()
		return x.failed
	}
	x.flight, x.pending = x.pending, map[rowKey][]byte{}
	flight := x.flight
	x.mu.Unlock()
	if len(flight) == 0 && len(own) == 0 {
		return nil
	}
	counts, err := x.write(flight, own)
	x.mu.Lock()
	x.flight = nil
	if err == nil {
		x.counts = counts
	} else {
		maps.Copy(flight, x.pending) // what came since is newer
		x.pending = flight
	}
	x.mu.Unlock()
	if err != nil && !noSpace(err) {
		// After a failed sync the kernel may forget what it could not write and report
		// the next one as good: only a new start knows what is on disk.
		x.giveUp(err, errors.Is(err, ErrDamaged))
	}
	return err
}

func (x *index) write(flight, own map[rowKey][]byte) (counts map[string]int, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer guard(&err, "write")
	counts = maps.Clone(x.counts)
	err = x.db.Update(func(tx *bbolt.Tx) error {
		b, err := rowsOf(tx)
		if err != nil {
			return err
		}
		for _, rows := range []map[rowKey][]byte{flight, own} {
			for k, row := range rows {
				key := []byte(k.table + k.key)
				had := b.Get(key) != nil
				switch {
				case row != nil:
					if err := b.Put(key, row); err != nil {
						return err
					}
					if !had {
						counts[k.table]++
					}
				case had:
					if err := b.Delete(key); err != nil {
						return err
					}
					counts[k.table]--
				}
			}
		}
		for table, most := range x.kept {
			if counts[table] > most+most/10 {
				n, err := removeOldest(b, table, counts[table]-most)
				if err != nil {
					return err
				}
				counts[table] -= n
			}
		}
		return nil
	})
	if err != nil {
		err = fmt.Errorf("write the cache's index %s: %w", x.path, err)
	}
	return counts, err
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

// allocated is what the index takes on disk.
func (x *index) allocated() int64 {
	if x.file == nil {
		return 0
	}
	n, err := allocatedOf(x.file)
	if err != nil {
		return 0
	}
	return n
}

func (x *index) close() error {
	x.mu.Lock()
	wedged := x.wedged
	db := x.db
	x.db = nil
	x.mu.Unlock()
	if db == nil {
		return nil
	}
	if wedged {
		return abandon(x.file)
	}
	return db.Close()
}

// noSpace reports errors after which the file is as it was and a later try may succeed.
func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
