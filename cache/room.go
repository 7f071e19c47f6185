package cache

import (
	"fmt"
	"os"
	"syscall"

	"accel"

	"github.com/opencontainers/go-digest"
)

// allocate notes what i takes on disk; s.mu is held.
func (s *Store) allocate(i *item, n int64) {
	if i.gone == nil {
		s.used += n - i.allocated
	}
	i.allocated = n
}

// unreserve gives n reserved bytes of f back; s.mu is held.
func (s *Store) unreserve(f *fill, n int64) {
	f.reserved -= n
	s.reserved -= n
}

// reserve makes room for n more bytes that f is going to write.
func (s *Store) reserve(f *fill, n int64) error {
	if err := s.take(f.b.key(), n); err != nil {
		return localError{err}
	}
	s.mu.Lock()
	f.reserved += n
	s.mu.Unlock()
	return nil
}

// take makes room for n more bytes that are going to be written, and counts them in s.reserved.
func (s *Store) take(of itemKey, n int64) error {
	for {
		free, err := s.free()
		if err != nil {
			return err
		}
		s.mu.Lock()
		short := s.short(free, n)
		if short <= 0 {
			s.reserved += n
			s.mu.Unlock()
			return nil
		}
		victims := s.victims(short)
		s.mu.Unlock()
		if len(victims) == 0 {
			return fmt.Errorf("%w: %s needs %d bytes more", ErrNoSpace, of, short)
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
func (s *Store) victims(n int64) []*item {
	able := int64(0)
	for i := s.order.oldest; i != nil && able < n; i = i.newer {
		if i.evictable() {
			able += i.allocated
		}
	}
	if able < n {
		return nil
	}
	var victims []*item
	for n > 0 {
		i := s.order.next()
		if i == nil {
			break
		}
		n -= i.allocated
		s.drop(i, fmt.Errorf("%w: evicted", accel.ErrNotFound))
		s.m.evicted(i)
		victims = append(victims, i)
	}
	return victims
}

// tomb stands for an item that was dropped until the index has forgotten it: before
// that, no new file of that name may be made, or the old marks would be taken for its own.
type tomb struct {
	unlinked chan struct{} // closed when the file is gone
	segments int64         // of marks in the index, at most
}

// drop takes i out of the store; s.mu is held. unlink has to follow.
func (s *Store) drop(i *item, why error) {
	if i.gone != nil {
		return
	}
	s.used -= i.allocated
	i.gone = why
	s.order.remove(i)
	t := &tomb{unlinked: make(chan struct{})}
	s.tombs[i.key()] = t
	if l := i.layer; l != nil {
		t.segments = segmentsOf(l.info.chunks)
		delete(s.layers, i.digest)
		delete(s.dirtyLayers, l)
		return
	}
	b := i.blob
	delete(s.blobs, b.digest)
	delete(s.dirty, b)
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
	s.order.remove(&b.item)
	delete(s.blobs, b.digest)
	delete(s.dirty, b)
	b.live.dirty = false
	if b.live.file != nil {
		s.removeFile(&b.item)
	}
}

// unlink removes the files of what was dropped.
func (s *Store) unlink(dropped []*item) {
	for _, i := range dropped {
		s.removeFile(i)
		s.mu.Lock()
		t := s.tombs[i.key()]
		s.mu.Unlock()
		close(t.unlinked)
	}
}

// dropNow is drop and unlink in one; s.mu is held.
func (s *Store) dropNow(i *item, why error) {
	s.drop(i, why)
	s.removeFile(i)
	close(s.tombs[i.key()].unlinked)
}

func (s *Store) removeFile(i *item) {
	var err error
	if i.layer != nil {
		err = os.RemoveAll(s.layerDir(i.digest))
	} else {
		err = os.Remove(s.path(i.digest))
	}
	if err != nil && !os.IsNotExist(err) {
		s.o.Log.Warn("a file of the cache could not be removed", "err", err)
	}
}

// lose drops i, of which something is wrong.
func (s *Store) lose(i *item, why error) {
	s.mu.Lock()
	if i.gone != nil {
		s.mu.Unlock()
		return
	}
	s.drop(i, why)
	s.mu.Unlock()
	s.m.lost(i, why)
	s.o.Log.Warn("content of the cache was dropped", "form", i.key().form, "digest", i.digest, "err", why)
	s.unlink([]*item{i})
}

// forms are the items of one digest. s.mu is held.
func (s *Store) forms(d digest.Digest) []*item {
	var all []*item
	if b := s.blobs[d]; b != nil {
		all = append(all, &b.item)
	}
	if l := s.layers[d]; l != nil {
		all = append(all, &l.item)
	}
	return all
}

// add lists i, which is new in the store. s.mu is held.
func (s *Store) add(i *item) {
	i.pins = s.pinned[i.digest]
	s.order.add(i)
}

func (s *Store) addBlob(b *blob) {
	s.blobs[b.digest] = b
	s.add(&b.item)
}
