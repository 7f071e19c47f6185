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

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// The tables of the index: the first byte of a row's key.
const (
	tableBlobs     = "b"
	tableLayers    = "i" // inflated
	tableMarks     = "k" // of chunks; has to come after the layers
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

// putAll puts sealed rows, nil to remove one, that are to be in the same commit.
func (x *index) putAll(rows map[rowKey][]byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	maps.Copy(x.pending, rows)
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
	if x.db == nil {
		defer x.mu.Unlock()
		return fmt.Errorf("write the cache's index: %w", ErrClosed)
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
