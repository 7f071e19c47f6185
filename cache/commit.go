package cache

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"accel/internal/durable"
)

// written is one blob as a commit puts it into the index.
type written struct {
	b     *blob
	file  *os.File
	isNew bool
	idle  bool // nobody was filling it
	row   []byte
	key   rowKey
}

// commit syncs what was written and then marks it in the index. What could not be written
// stays to be: nothing is lost but the marks, should the process end.
func (s *Store) commit() error {
	s.committing.Lock()
	defer s.committing.Unlock()
	s.mu.Lock()
	blobs := make([]written, 0, len(s.dirty))
	for b := range s.dirty {
		if !b.complete && b.missing == partsOf(b.size) {
			continue
		}
		key, err := keyOf(b.digest)
		if err != nil {
			s.mu.Unlock()
			return err
		}
		row := b.row()
		w := written{b: b, key: rowKey{tableBlobs, key}, idle: len(b.live.fills) == 0}
		w.file, w.isNew = b.live.file, b.live.isNew
		w.row = sealRow(tableBlobs, key, row.encode())
		b.live.dirty, b.live.syncing, b.touched = false, true, false
		delete(s.dirty, b)
		blobs = append(blobs, w)
	}
	layers, err := s.takeLayers()
	if err != nil {
		s.mu.Unlock()
		return err
	}
	buried := map[itemKey]*tomb{}
	for k, t := range s.tombs {
		select {
		case <-t.unlinked:
			buried[k] = t
		default: // the next commit's
		}
	}
	s.unsynced = 0
	s.mu.Unlock()
	if len(blobs) == 0 && len(layers) == 0 && len(buried) == 0 && !s.index.dirty() {
		return nil
	}
	defer s.m.committed()()

	rows := make(map[rowKey][]byte, len(blobs)+len(layers)+len(buried))
	for k, t := range buried {
		if err := t.bury(k, rows); err != nil {
			return err
		}
	}
	for _, w := range layers {
		maps.Copy(rows, w.rows)
	}
	dirs := map[string]error{}
	var failed error
	for _, w := range blobs {
		if err := s.sync(w, dirs); err != nil {
			if !noSpace(err) {
				// The kernel may have forgotten what it could not write.
				s.lose(&w.b.item, fmt.Errorf("%w: sync: %w", ErrDamaged, err))
				continue
			}
			failed = err
		}
		rows[w.key] = w.row
	}
	if failed == nil {
		failed = s.index.commit(rows)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range blobs {
		s.settle(w, failed)
	}
	for _, w := range layers {
		s.settleLayer(w, failed)
	}
	if failed == nil {
		for k, t := range buried {
			if s.tombs[k] == t {
				delete(s.tombs, k)
			}
		}
	}
	return failed
}

// sync makes the content of w durable, and its name.
func (s *Store) sync(w written, dirs map[string]error) error {
	if w.file == nil {
		return nil // only opened since the last commit
	}
	if err := w.file.Sync(); err != nil {
		return err
	}
	if !w.isNew {
		return nil
	}
	shard := filepath.Dir(w.file.Name())
	for _, dir := range []string{shard, filepath.Dir(shard), filepath.Join(s.o.Dir, blobsDir)} {
		if _, done := dirs[dir]; !done {
			dirs[dir] = durable.SyncFolder(dir)
		}
		if dirs[dir] != nil {
			return dirs[dir]
		}
	}
	return nil
}

// settle ends the commit for one blob; s.mu is held.
func (s *Store) settle(w written, failed error) {
	b := w.b
	l := b.live
	l.syncing = false
	if b.gone == nil {
		if failed != nil {
			s.markDirty(b)
		} else {
			l.isNew = l.isNew && !w.isNew
		}
		if w.file != nil && w.idle && len(l.fills) == 0 {
			if n, err := allocatedOf(w.file); err == nil {
				s.allocate(&b.item, n)
			}
		}
	}
	s.release(b)
}

// clearTomb returns when a new file of that name may be made.
func (s *Store) clearTomb(k itemKey) error {
	for range 2 {
		s.mu.Lock()
		t := s.tombs[k]
		s.mu.Unlock()
		if t == nil {
			return nil
		}
		<-t.unlinked
		if err := s.commit(); err != nil {
			return err
		}
	}
	return errors.New("the index still knows an earlier file of that digest")
}

// noteVisits has the next commit write which blobs and layers were used again.
func (s *Store) noteVisits() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.blobs {
		if b.touched {
			s.markDirty(b)
		}
	}
	for _, l := range s.layers {
		if l.touched {
			s.dirtyLayers[l] = struct{}{}
		}
	}
}
