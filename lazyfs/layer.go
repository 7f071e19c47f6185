package lazyfs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"accel"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Layer is one layer's content as the mounts have it. All methods may be called by
// many at once; after Host.Remove or Host.Close they return ErrClosed, zero or false.
type Layer struct {
	digest digest.Digest
	files  Files
	bits   string // the bitmap's path
	times  string // that of reads; empty where there are none

	// mu is held to read while the maps below are used, to write only to unmap them.
	mu     sync.RWMutex
	closed bool
	table  *Table
	bitmap *bitmap
	reads  *readTimes // nil: not kept
	data   *os.File

	left atomic.Int64 // chunks that are missing

	// putting is held to read from a chunk's write to its note in unsynced, to write while chunks are taken back.
	putting sync.RWMutex
	syncing sync.Mutex // one Sync at a time: the kernel tells of a failure once
	// unsynced are the chunks that were put since the last good Sync, or that the
	// store's index did not know: what they say is in the page cache only.
	unsyncedMu sync.Mutex
	unsynced   []int32
	unsure     atomic.Int64 // how many of these there are, with those that a Sync has taken and not made durable yet
}

// openLayer joins what the bitmap at bits says with has.
func openLayer(d digest.Digest, f Files, bits string, has func(chunk int) bool) (l *Layer, err error) {
	l = &Layer{digest: d, files: f, bits: bits}
	opened := l
	defer func() {
		if err != nil {
			err = errors.Join(err, opened.close())
		}
	}()
	if l.table, err = OpenTable(f.Table); err != nil {
		return nil, err
	}
	if l.data, err = os.OpenFile(f.Data, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	info, err := l.data.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != l.table.DataBytes() {
		return nil, fmt.Errorf("%w: %s has %d bytes, not %d", ErrDamaged, f.Data, info.Size(), l.table.DataBytes())
	}
	if l.bitmap, err = openBitmap(bits, l.data, l.table.Len()); err != nil {
		return nil, err
	}
	for i := range l.table.Len() {
		if has != nil && has(i) {
			l.bitmap.set(i)
		} else if l.bitmap.has(i) {
			l.unsynced = append(l.unsynced, int32(i))
		} else {
			l.left.Add(1)
		}
	}
	l.unsure.Store(int64(len(l.unsynced)))
	return l, nil
}

// keepReads has the layer tell what is read of it. All else works without.
func (l *Layer) keepReads(path string) (err error) {
	if l.reads, err = openReads(path, l.table.Len()); err == nil {
		l.times = path
	}
	return err
}

func (l *Layer) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var errs []error
	if l.table != nil {
		errs = append(errs, l.table.Close())
	}
	if l.bitmap != nil {
		errs = append(errs, l.bitmap.close())
	}
	if l.reads != nil {
		errs = append(errs, l.reads.close())
	}
	if l.data != nil {
		errs = append(errs, l.data.Close())
	}
	return errors.Join(errs...)
}

// Digest is the layer's name, as Host.Add was told.
func (l *Layer) Digest() digest.Digest { return l.digest }

// Len is the number of chunks.
func (l *Layer) Len() int {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return 0
	}
	return l.table.Len()
}

// Chunk is the i-th in the data file's order; the zero Chunk where there is none.
func (l *Layer) Chunk(i int) accel.Chunk {
	l.mu.RLock()
	defer l.mu.RUnlock()
	c, err := l.at(i)
	if err != nil {
		return accel.Chunk{}
	}
	return c
}

// at has l.mu held. A fault under the mapped table (a disk error, a file cut short) is an error.
func (l *Layer) at(i int) (c accel.Chunk, err error) {
	if err = l.check(i); err != nil {
		return c, err
	}
	err = Guarded(func() error {
		c = l.table.At(i)
		return nil
	})
	if err != nil {
		err = fmt.Errorf("table of %s: %w", l.digest, err)
	}
	return c, err
}

// Has reports whether chunk i is there.
func (l *Layer) Has(i int) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.check(i) == nil && l.bitmap.has(i)
}

// hasAll reports whether chunks [first, first+n), which exist, are all there.
func (l *Layer) hasAll(first, n int) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return !l.closed && l.bitmap.missing(first, first+n) == first+n
}

// Left is how many chunks are missing.
func (l *Layer) Left() int { return int(l.left.Load()) }

// Complete reports whether every chunk is there.
func (l *Layer) Complete() bool { return l.Left() == 0 }

// durable reports whether every chunk is there for good. Before that a chunk may be taken back, which who reads the data file
// itself would not hear of.
func (l *Layer) durable() bool { return l.Complete() && l.unsure.Load() == 0 }

// check has l.mu held.
func (l *Layer) check(i int) error {
	if l.closed {
		return ErrClosed
	}
	if i < 0 || i >= l.table.Len() {
		return fmt.Errorf("no chunk %d in layer %s", i, l.digest)
	}
	return nil
}

// Put writes chunk i and then lets readers have it. Errors: ErrDigest where b is not
// its bytes, ErrClosed, ErrDamaged, what writing the file gave (such as ENOSPC). A chunk that is
// there stays as it is.
func (l *Layer) Put(i int, b []byte) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	c, err := l.at(i)
	if err != nil {
		return err
	}
	if int64(len(b)) != c.Bytes || sha256.Sum256(b) != c.Digest {
		return fmt.Errorf("%w: chunk %d of layer %s", ErrDigest, i, l.digest)
	}
	if l.bitmap.has(i) {
		return nil
	}
	l.putting.RLock()
	defer l.putting.RUnlock()
	if _, err := l.data.WriteAt(b, c.DataOffset); err != nil {
		return err
	}
	l.unsyncedMu.Lock()
	l.unsynced = append(l.unsynced, int32(i))
	l.unsyncedMu.Unlock()
	l.unsure.Add(1) // before the chunk counts as there
	if l.bitmap.set(i) {
		l.left.Add(-1)
	}
	return nil
}

// Read fills p with chunk i, which must be there; p has its size.
func (l *Layer) Read(i int, p []byte) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	c, err := l.at(i)
	if err != nil {
		return err
	}
	if int64(len(p)) != c.Bytes {
		return fmt.Errorf("chunk %d of layer %s has %d bytes, asked for %d", i, l.digest, c.Bytes, len(p))
	}
	if !l.bitmap.has(i) {
		return fmt.Errorf("%w: chunk %d of layer %s", ErrIncomplete, i, l.digest)
	}
	_, err = l.data.ReadAt(p, c.DataOffset)
	return err
}

// Sync makes durable what was put before. Where that fails the kernel may have thrown the bytes
// away, so the chunks in question are taken back: they are missing again.
func (l *Layer) Sync() error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return ErrClosed
	}
	l.syncing.Lock()
	defer l.syncing.Unlock()
	doubtful := l.takeUnsynced()
	err := unix.Fdatasync(int(l.data.Fd()))
	if err == nil {
		l.unsure.Add(-int64(len(doubtful)))
		return nil
	}
	// What was written before it and noted since may be gone too.
	l.putting.Lock()
	defer l.putting.Unlock()
	doubtful = append(doubtful, l.takeUnsynced()...)
	for _, i := range doubtful {
		l.forget(int(i))
	}
	l.unsure.Add(-int64(len(doubtful)))
	return fmt.Errorf("sync layer %s: %w", l.digest, err)
}

func (l *Layer) takeUnsynced() []int32 {
	l.unsyncedMu.Lock()
	defer l.unsyncedMu.Unlock()
	taken := l.unsynced
	l.unsynced = nil
	return taken
}

// Forget takes chunks that turned out wrong away: no read that begins after it has
// returned sees them until they are put again. Pages that a mount has cached stay
// as they were read, and so does what plain mounts of the data file see.
func (l *Layer) Forget(chunks ...int) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, i := range chunks {
		if err := l.check(i); err != nil {
			return err
		}
		l.forget(i)
	}
	return nil
}

func (l *Layer) forget(i int) {
	if l.bitmap.clear(i) {
		l.left.Add(1)
	}
}
