package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// openFile makes l.file.
func (b *blob) openFile(s *Store, f *fill) error {
	l := b.live
	l.opening.Lock()
	defer l.opening.Unlock()
	s.mu.Lock()
	gone, there, opened := b.gone, b.complete || b.missing < partsOf(b.size), l.file != nil
	s.mu.Unlock()
	if gone != nil {
		return gone
	}
	if opened {
		return nil
	}
	path := s.path(b.digest)
	if there {
		file, err := openSized(path, os.O_RDWR, b.size)
		if err != nil {
			s.lose(&b.item, fmt.Errorf("%w: blob %s: %w", ErrDamaged, b.digest, err))
			return localError{err}
		}
		s.setFile(b, file, false)
		return nil
	}
	if err := s.clearTomb(b.key()); err != nil {
		return localError{err}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return localError{err}
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, os.ErrExist) {
		return b.takeOver(s, path)
	}
	if err != nil {
		return localError{err}
	}
	if err := file.Truncate(b.size); err != nil {
		file.Close()
		return localError{errors.Join(err, os.Remove(path))}
	}
	s.setFile(b, file, true)
	return nil
}

func (s *Store) setFile(b *blob, file *os.File, isNew bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.live.file, b.live.isNew = file, isNew
}

// takeOver looks at a file that the index does not know: when the digest is right, it is the blob.
func (b *blob) takeOver(s *Store, path string) error {
	file, err := openSized(path, os.O_RDWR, b.size)
	if err == nil {
		if err = checkFile(s.run, file, b.digest, b.size); err == nil {
			s.mu.Lock()
			b.live.file, b.live.isNew = file, true
			s.completed(b)
			if n, err := allocatedOf(file); err == nil {
				s.allocate(&b.item, n)
			}
			s.mu.Unlock()
			return nil
		}
		file.Close()
		if s.run.Err() != nil {
			return err
		}
	}
	// What was in part there when the process died, or is no content.
	if err := os.Remove(path); err != nil {
		return localError{err}
	}
	file, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return localError{err}
	}
	if err := file.Truncate(b.size); err != nil {
		file.Close()
		return localError{errors.Join(err, os.Remove(path))}
	}
	s.setFile(b, file, true)
	return nil
}

func openSized(path string, flag int, size int64) (*os.File, error) {
	file, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.Size() != size {
		err = fmt.Errorf("%s has %d bytes, not %d", path, info.Size(), size)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}
