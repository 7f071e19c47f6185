package lazyfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readTimes says when each chunk of a layer was first read through a holder: what a start
// reads, also where it was there already. It is a file in Options.Dir that the daemon and the
// holders map: holders write times, the daemon clears them. A number is there as a whole
// or not at all, and one that is lost or too late harms nothing but a profile.
//
// A read is what the kernel asks for: its read-ahead around a page fault is in it. That is the honest
// grain, since the program waits until all of that request is there.
//
//	header: magic [8] | chunks u64 | time of the last reset, CLOCK_BOOTTIME in ns, i64 | zero [40]
//	then u32 for each chunk: milliseconds since the reset, and one; 0: not read
type readTimes struct {
	mapped []byte
	reset  *atomic.Int64
	times  []atomic.Uint32
}

const (
	readsMagic       = "accelrd1"
	readsHeaderBytes = 64
)

func readsBytes(chunks int) int64 { return readsHeaderBytes + 4*int64(chunks) }

// openReads maps the file at path, or makes it.
func openReads(path string, chunks int) (*readTimes, error) {
	r, err := mapReads(path, chunks)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDamaged) {
		if err = createReads(path, chunks); err == nil {
			r, err = mapReads(path, chunks)
		}
	}
	return r, err
}

// mapReads maps an existing file of so many chunks.
func mapReads(path string, chunks int) (*readTimes, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != readsBytes(chunks) {
		return nil, fmt.Errorf("%w: %s has %d bytes, not %d", ErrDamaged, path, info.Size(), readsBytes(chunks))
	}
	mapped, err := unix.Mmap(int(file.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	if string(mapped[:8]) != readsMagic || binary.LittleEndian.Uint64(mapped[8:]) != uint64(chunks) {
		return nil, errors.Join(fmt.Errorf("%w: %s is of another layer", ErrDamaged, path), unix.Munmap(mapped))
	}
	r := &readTimes{mapped: mapped, reset: (*atomic.Int64)(unsafe.Pointer(&mapped[16]))}
	if chunks > 0 {
		r.times = unsafe.Slice((*atomic.Uint32)(unsafe.Pointer(&mapped[readsHeaderBytes])), chunks)
	}
	return r, nil
}

func createReads(path string, chunks int) error {
	header := make([]byte, readsHeaderBytes)
	copy(header, readsMagic)
	binary.LittleEndian.PutUint64(header[8:], uint64(chunks))
	binary.NativeEndian.PutUint64(header[16:], uint64(sinceBoot()))
	return createMapped(path, header, readsBytes(chunks))
}

// sinceBoot is one clock for all processes, that nobody sets.
func sinceBoot() int64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0 // no Linux since 2.6.39 lacks it
	}
	return now.Nano()
}

// note marks the chunks [from, to) as read now, where they were not before.
func (r *readTimes) note(from, to int) {
	var stamp uint32
	for i := from; i < to; i++ {
		if r.times[i].Load() != 0 {
			continue
		}
		if stamp == 0 {
			ms := max(0, sinceBoot()-r.reset.Load()) / int64(time.Millisecond)
			stamp = uint32(min(ms, math.MaxUint32-1)) + 1
		}
		r.times[i].CompareAndSwap(0, stamp)
	}
}

func (r *readTimes) clear() {
	// The time first: who notes a read meanwhile has one that is too late, not one before its time.
	r.reset.Store(sinceBoot())
	for i := range r.times {
		r.times[i].Store(0)
	}
}

func (r *readTimes) close() error { return unix.Munmap(r.mapped) }

// Reads are the chunks that were read through lazy mounts since ResetReads, in their own order, each
// with the time when it was first. What the kernel had in its page cache is not among them, nor
// what plain mounts read, nor what a holder of a version before this served.
func (l *Layer) Reads() iter.Seq2[int, time.Time] {
	return func(yield func(int, time.Time) bool) {
		reads, reset := l.readsNow()
		for _, r := range reads {
			if !yield(int(r.chunk), reset.Add(time.Duration(r.ms)*time.Millisecond)) {
				return
			}
		}
	}
}

type readOf struct {
	chunk int32
	ms    uint32 // since the reset
}

// readsNow copies, so that the caller of Reads may do with the layer what he likes.
func (l *Layer) readsNow() (reads []readOf, reset time.Time) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed || l.reads == nil {
		return nil, time.Time{}
	}
	now := time.Now()
	since := sinceBoot() - l.reads.reset.Load()
	latest := uint32(min(max(0, since)/int64(time.Millisecond), math.MaxUint32))
	for i := range l.reads.times {
		if ms := l.reads.times[i].Load(); ms > 0 {
			reads = append(reads, readOf{int32(i), min(ms-1, latest)})
		}
	}
	return reads, now.Add(-time.Duration(since))
}

// ResetReads forgets what was read.
func (l *Layer) ResetReads() {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if !l.closed && l.reads != nil {
		l.reads.clear()
	}
}
