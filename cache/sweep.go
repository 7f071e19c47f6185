package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// stray is a file, or a layer's folder, that the index does not know.
type stray struct {
	path      string
	digest    digest.Digest // empty: its name is none
	size      int64
	allocated int64
}

// sweep compares the files with the index: a blob or layer whose file is gone is dropped, and what
// the index does not know is taken in when its digest is right (of a layer: those of its chunks), else removed.
// So content survives a damaged index, and what a crash left over goes.
func (s *Store) sweep(ctx context.Context, rep *Report) error {
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	s.mu.Lock()
	since := s.seq
	s.mu.Unlock()
	found := map[digest.Digest]bool{}
	var strays []stray
	err := s.eachFile(ctx, func(f stray) {
		found[f.digest] = true
		s.mu.Lock()
		defer s.mu.Unlock()
		if f.digest == "" || !s.knows(f.digest) {
			strays = append(strays, f)
			s.strays += f.allocated
		}
	})
	if err != nil {
		return err
	}
	s.dropLost(since, found, rep)
	if err := s.eachStray(strays, func(f stray) error { return s.adopt(ctx, f, rep) }); err != nil {
		return err
	}
	return s.sweepLayers(ctx, since, rep)
}

// eachStray calls do for each and counts it no longer then. After an error the rest is not counted either.
func (s *Store) eachStray(strays []stray, do func(stray) error) (err error) {
	for _, f := range strays {
		if err == nil {
			err = do(f)
		}
		s.mu.Lock()
		s.strays -= f.allocated
		s.mu.Unlock()
	}
	return err
}

// knows reports whether somebody deals with the file of blob d. s.mu is held.
func (s *Store) knows(d digest.Digest) bool {
	return s.blobs[d] != nil || s.tombs[itemKey{FormBlob, d}] != nil
}

// eachFile shows every file under blobs.
func (s *Store) eachFile(ctx context.Context, each func(stray)) error {
	root := filepath.Join(s.o.Dir, blobsDir)
	return filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil // evicted meanwhile
		}
		if err != nil || entry.IsDir() {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return nil //nolint:nilerr // evicted meanwhile
		}
		f := stray{path: path, size: st.Size, allocated: st.Blocks * 512}
		d := digest.NewDigestFromEncoded(digest.Algorithm(filepath.Base(filepath.Dir(filepath.Dir(path)))), filepath.Base(path))
		if _, err := keyOf(d); err == nil && s.path(d) == path && entry.Type().IsRegular() {
			f.digest = d
		}
		each(f)
		return nil
	})
}

// dropLost drops the blobs that were in the index before and have no file.
func (s *Store) dropLost(since uint64, found map[digest.Digest]bool, rep *Report) {
	s.mu.Lock()
	var lost []*blob
	for d, b := range s.blobs {
		if !found[d] && b.seq <= since && b.live == nil {
			if _, err := os.Lstat(s.path(d)); errors.Is(err, os.ErrNotExist) {
				lost = append(lost, b)
			}
		}
	}
	s.mu.Unlock()
	for _, b := range lost {
		s.lose(&b.item, fmt.Errorf("%w: blob %s: its file is gone", ErrDamaged, b.digest))
		rep.Damaged = append(rep.Damaged, b.digest)
	}
}

// adopt takes in or removes one file.
func (s *Store) adopt(ctx context.Context, f stray, rep *Report) error {
	good, err := f.good(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if f.digest != "" && s.knows(f.digest) {
		return nil // somebody asked for it, and looks at the file himself
	}
	if good {
		b := newBlob(f.digest, f.size, s.nextSeq())
		b.usedAt = s.o.Now().UnixNano()
		s.addBlob(b)
		s.allocate(&b.item, f.allocated)
		s.completed(b)
		rep.AdoptedBlobs++
		return nil
	}
	// s.mu keeps anybody from beginning a file of that name.
	if err := os.Remove(f.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.o.Log.Warn("a file of the cache could not be removed", "err", err)
		return nil
	}
	rep.RemovedFiles++
	rep.FreedBytes += f.allocated
	return nil
}

// good reports whether the file is the whole blob that its name says.
func (f stray) good(ctx context.Context) (bool, error) {
	if f.digest == "" || f.size == 0 || f.size > maxBlobBytes {
		return false, nil
	}
	file, err := os.OpenFile(f.path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return false, nil //nolint:nilerr // what cannot be read is no good
	}
	defer file.Close()
	// A hole is where a fill had not come to. Where the file system does not tell, the digest does.
	if hole, err := file.Seek(0, unix.SEEK_HOLE); err == nil && hole < f.size {
		return false, nil
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return false, nil //nolint:nilerr // what cannot be read is no good
	}
	if err := checkFile(ctx, file, f.digest, f.size); err != nil {
		return false, ctx.Err()
	}
	return file.Sync() == nil, nil
}

// held is what there is, for reports.
type held struct {
	blobs, layers int
	bytes         int64
}

func (s *Store) held() held {
	s.mu.Lock()
	defer s.mu.Unlock()
	return held{len(s.blobs), len(s.layers), s.used}
}
