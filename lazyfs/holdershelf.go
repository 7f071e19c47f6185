package lazyfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sort"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// shelf is the layers that a holder serves, each as one file.
type shelf struct {
	changed func(d digest.Digest) // how often a layer is open changed; called without the lock

	mu       sync.Mutex
	lastNode uint64
	byNode   map[uint64]*held
	byName   map[string]*held
}

// held is one layer.
type held struct {
	layer  heldLayer
	node   uint64
	size   int64
	table  *Table
	bitmap *bitmap
	reads  *readTimes // nil: not noted
	data   *os.File

	// The shelf's lock guards these.
	opens   int  // open FUSE files: an EROFS mount has one
	users   int  // requests at work
	dropped bool // closed with the last user
}

func newShelf(changed func(digest.Digest)) *shelf {
	return &shelf{changed: changed, lastNode: rootNode, byNode: map[uint64]*held{}, byName: map[string]*held{}}
}

// fileName is the layer's file in the FUSE mount, and part of its mounts' source.
func fileName(d digest.Digest) string { return d.Encoded() }

func hold(l heldLayer) (f *held, err error) {
	f = &held{layer: l}
	opened := f
	defer func() {
		if err != nil {
			err = errors.Join(err, opened.close())
		}
	}()
	if f.table, err = OpenTable(l.Table); err != nil {
		return nil, err
	}
	if f.bitmap, err = mapBitmap(l.Bits, f.table.Len(), false); err != nil {
		return nil, err
	}
	if l.Reads != "" {
		if reads, err := mapReads(l.Reads, f.table.Len()); err == nil { // else they are not noted
			f.reads = reads
		}
	}
	if f.data, err = os.Open(l.Data); err != nil {
		return nil, err
	}
	info, err := f.data.Stat()
	if err != nil {
		return nil, err
	}
	if f.size = info.Size(); f.size != f.table.DataBytes() {
		return nil, fmt.Errorf("%w: %s has %d bytes, not %d", ErrDamaged, l.Data, f.size, f.table.DataBytes())
	}
	return f, nil
}

func (f *held) close() error {
	var errs []error
	if f.table != nil {
		errs = append(errs, f.table.Close())
	}
	if f.bitmap != nil {
		errs = append(errs, f.bitmap.close())
	}
	if f.reads != nil {
		errs = append(errs, f.reads.close())
	}
	if f.data != nil {
		errs = append(errs, f.data.Close())
	}
	return errors.Join(errs...)
}

// missing is the span of chunks, from the first that is missing to the last, that a
// read needs; n is 0 where all is there. A fault under the mapped files (a disk
// error, a file cut short) is an error: the goroutine has SetPanicOnFault.
func (f *held) missing(offset int64, size int) (first, n int, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, fault)
		}
	}()
	from, to := f.chunks(offset, size)
	first = f.bitmap.missing(from, to)
	for last := to; last > first; last-- {
		if !f.bitmap.has(last - 1) {
			return first, last - first, nil
		}
	}
	return 0, 0, nil
}

// chunks are those that a read needs, [from, to).
func (f *held) chunks(offset int64, size int) (from, to int) {
	count := f.table.Len()
	from = sort.Search(count, func(i int) bool { c := f.table.At(i); return c.DataOffset+c.Bytes > offset })
	end := offset + int64(size)
	to = from + sort.Search(count-from, func(i int) bool { return f.table.dataOffset(from+i) >= end })
	return from, to
}

// wanted is missing for a read that has just come, which it notes.
func (f *held) wanted(offset int64, size int) (first, n int, err error) {
	first, n, err = f.missing(offset, size)
	if err == nil && f.reads != nil {
		f.noteRead(offset, size)
	}
	return first, n, err
}

// noteRead fails no read: a file that was cut short costs a profile alone.
func (f *held) noteRead(offset int64, size int) {
	defer func() { _ = recover() }()
	f.reads.note(f.chunks(offset, size))
}

// attr writes the file's attributes.
func (f *held) attr(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], f.node)
	le.PutUint64(b[8:], uint64(f.size))
	le.PutUint64(b[16:], uint64(f.size/512))
	le.PutUint32(b[60:], unix.S_IFREG|0o400)
	le.PutUint32(b[64:], 1) // links
	le.PutUint32(b[80:], BlockBytes)
}

// add puts l on the shelf. One of that name with other files gives way, or ErrInUse
// while it is open.
func (s *shelf) add(l heldLayer) error {
	f, err := hold(l)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	name := fileName(l.Digest)
	if old := s.byName[name]; old != nil {
		if sameFile(old.data, f.data) && old.bitmap.same(l.Bits) {
			return f.close()
		}
		if err = s.drop(old); err != nil {
			return errors.Join(err, f.close())
		}
	}
	s.lastNode++
	f.node = s.lastNode
	s.byNode[f.node], s.byName[name] = f, f
	return nil
}

func sameFile(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

func (s *shelf) remove(d digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.byName[fileName(d)]; f != nil {
		return s.drop(f)
	}
	return nil
}

// drop has the lock.
func (s *shelf) drop(f *held) error {
	if f.opens > 0 {
		return fmt.Errorf("%w: %s is open %d times", ErrInUse, f.layer.Digest, f.opens)
	}
	delete(s.byNode, f.node)
	delete(s.byName, fileName(f.layer.Digest))
	f.dropped = true
	if f.users > 0 {
		return nil
	}
	return f.close()
}

func (s *shelf) lookup(name string) *held {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byName[name]
}

// get keeps the layer from being closed until put.
func (s *shelf) get(node uint64) *held {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.byNode[node]
	if f != nil {
		f.users++
	}
	return f
}

func (s *shelf) put(f *held) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.users--; f.users == 0 && f.dropped {
		_ = f.close() // read only: nothing is lost
	}
}

func (s *shelf) open(node uint64) bool { return s.count(node, 1) }

func (s *shelf) release(node uint64) { s.count(node, -1) }

func (s *shelf) count(node uint64, by int) bool {
	s.mu.Lock()
	f := s.byNode[node]
	if f != nil {
		f.opens += by
	}
	s.mu.Unlock()
	if f == nil {
		return false
	}
	s.changed(f.layer.Digest)
	return true
}

// opens is how often the layer is open.
func (s *shelf) opens(d digest.Digest) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.byName[fileName(d)]; f != nil {
		return f.opens
	}
	return 0
}

// list is the layers with how often each is open, and the sum.
func (s *shelf) list() (layers []heldLayer, opens int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.byNode {
		l := f.layer
		l.Opens = f.opens
		opens += f.opens
		layers = append(layers, l)
	}
	return layers, opens
}

// close is for when the FUSE mount is gone.
func (s *shelf) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.byNode {
		_ = f.close() // read only: nothing is lost
	}
	clear(s.byNode)
	clear(s.byName)
}
