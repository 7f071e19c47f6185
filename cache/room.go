package cache

import (
	"fmt"
	"os"
	"syscall"

	"accel"
)

// allocate notes what b takes on disk; s.mu is held.
func (s *Store) allocate(b *blob, n int64) {
	if b.gone == nil {
		s.used += n - b.allocated
	}
	b.allocated = n
}

// unreserve gives n reserved bytes of f back; s.mu is held.
func (s *Store) unreserve(f *fill, n int64) {
	f.reserved -= n
	s.reserved -= n
}

// reserve makes room for n more bytes that f is going to write.
func (s *Store) reserve(f *fill, n int64) error {
	for {
		free, err := s.free()
		if err != nil {
			return localError{err}
		}
		s.mu.Lock()
		short := s.short(free, n)
		if short <= 0 {
			s.reserved += n
			f.reserved += n
			s.mu.Unlock()
			return nil
		}
		victims := s.victims(short)
		s.mu.Unlock()
		if len(victims) == 0 {
			return localError{fmt.Errorf("%w: blob %s needs %d bytes more", ErrNoSpace, f.b.digest, short)}
		}
		s.unlink(victims)
	}
}

// reservePart reserves what of a part is not reserved yet.
func (s *Store) reservePart(f *fill, part int64) error {
	s.mu.Lock()
	n := f.b.partEnd(part) - part*partBytes - f.reserved
	s.mu.Unlock()
	if n <= 0 {
		return nil
	}
	return s.reserve(f, n)
}

// makeRoom evicts until n bytes more would fit.
func (s *Store) makeRoom(n int64) error {
	for {
		free, err := s.free()
		if err != nil {
			return err
		}
		s.mu.Lock()
		short := s.short(free, n)
		if short <= 0 {
			s.mu.Unlock()
			return nil
		}
		victims := s.victims(short)
		if len(victims) == 0 { // not enough by far, but better than nothing
			victims = s.victims(1)
		}
		s.mu.Unlock()
		if len(victims) == 0 {
			return fmt.Errorf("%w: %d bytes too many", ErrNoSpace, short)
		}
		s.unlink(victims)
	}
}

// evict removes at least n bytes where that much may go, else what may.
func (s *Store) evict(n int64) bool {
	s.mu.Lock()
	victims := s.victims(n)
	if len(victims) == 0 {
		victims = s.victims(1)
	}
	s.mu.Unlock()
	s.unlink(victims)
	return len(victims) > 0
}

// free is what the file system has for us.
func (s *Store) free() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.o.Dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: s.o.Dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// short is how many bytes have to go before n more may be written. s.mu is held.
func (s *Store) short(free, n int64) int64 {
	short := s.o.FreeFloorBytes + s.reserved + n - free
	if s.o.BudgetBytes > 0 {
		short = max(short, s.total()+s.reserved+n-s.o.BudgetBytes)
	}
	return short
}

// total is what the store takes on disk. s.mu is held.
func (s *Store) total() int64 { return s.used + s.strays + s.index.allocated() }

// victims takes out of the store what is to be evicted for n bytes; none, when all
// that may go is less. s.mu is held; the files are still there (see unlink).
func (s *Store) victims(n int64) []*blob {
	able := int64(0)
	for b := s.order.oldest; b != nil && able < n; b = b.newer {
		if b.evictable() {
			able += b.allocated
		}
	}
	if able < n {
		return nil
	}
	var victims []*blob
	for n > 0 {
		b := s.order.next()
		if b == nil {
			break
		}
		n -= b.allocated
		s.drop(b, fmt.Errorf("%w: evicted", accel.ErrNotFound))
		s.m.evicted(b)
		victims = append(victims, b)
	}
	return victims
}

// evictable: nobody holds it or does anything with it.
func (b *blob) evictable() bool {
	return b.pins == 0 && b.allocated > 0 && (b.live == nil || (b.live.readers == 0 && len(b.live.fills) == 0 && !b.live.verifying && !b.live.syncing))
}

// tomb stands for a blob that was dropped until the index has forgotten it: before
// that, no new file of that name may be made, or the old marks would be taken for its own.
type tomb struct {
	unlinked chan struct{} // closed when the file is gone
}

// drop takes b out of the store; s.mu is held. unlink has to follow.
func (s *Store) drop(b *blob, why error) {
	if b.gone != nil {
		return
	}
	s.used -= b.allocated
	b.gone = why
	s.order.remove(b)
	delete(s.blobs, b.digest)
	delete(s.dirty, b)
	s.tombs[b.digest] = &tomb{unlinked: make(chan struct{})}
	if l := b.live; l != nil {
		l.dirty = false
		for _, f := range l.fills {
			if f.cancel != nil {
				f.cancel()
			}
		}
	}
	b.wake()
	s.release(b)
}

// forget drops a blob that has no part and that the index does not know. s.mu is held.
func (s *Store) forget(b *blob) {
	s.used -= b.allocated
	b.gone = fmt.Errorf("%w: nothing of it came", accel.ErrNotFound)
	s.order.remove(b)
	delete(s.blobs, b.digest)
	delete(s.dirty, b)
	b.live.dirty = false
	if b.live.file != nil {
		s.removeFile(b)
	}
}

// unlink removes the files of blobs that were dropped.
func (s *Store) unlink(dropped []*blob) {
	for _, b := range dropped {
		s.removeFile(b)
		s.mu.Lock()
		t := s.tombs[b.digest]
		s.mu.Unlock()
		close(t.unlinked)
	}
}

// dropNow is drop and unlink in one; s.mu is held.
func (s *Store) dropNow(b *blob, why error) {
	s.drop(b, why)
	s.removeFile(b)
	close(s.tombs[b.digest].unlinked)
}

func (s *Store) removeFile(b *blob) {
	if err := os.Remove(s.path(b.digest)); err != nil && !os.IsNotExist(err) {
		s.o.Log.Warn("a file of the cache could not be removed", "err", err)
	}
}

// lose drops b, of which something is wrong.
func (s *Store) lose(b *blob, why error) {
	s.mu.Lock()
	if b.gone != nil {
		s.mu.Unlock()
		return
	}
	s.drop(b, why)
	s.mu.Unlock()
	s.m.lost(why)
	s.o.Log.Warn("content of the cache was dropped", "blob", b.digest, "err", why)
	s.unlink([]*blob{b})
}
