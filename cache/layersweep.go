package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"accel"

	"github.com/opencontainers/go-digest"
)

// sweepLayers is sweep for layers, and for what is left of making some.
func (s *Store) sweepLayers(ctx context.Context, since uint64, rep *Report) error {
	strays, err := s.strayLayers(ctx)
	s.mu.Lock()
	for _, f := range strays {
		s.strays += f.allocated
	}
	known := make([]*Layer, 0, len(s.layers))
	for _, l := range s.layers {
		if l.seq <= since {
			known = append(known, l)
		}
	}
	s.mu.Unlock()
	for _, l := range known {
		if l.lookAtFiles() != nil {
			rep.Damaged = append(rep.Damaged, l.digest)
		}
	}
	return errors.Join(err, s.eachStray(strays, func(f stray) error {
		if f.digest != "" {
			return s.adoptLayer(ctx, f, rep)
		}
		s.removeStray(f, rep)
		return ctx.Err()
	}))
}

// strayLayers finds what lies in the folders of layers and of such as are being made and that nobody knows.
func (s *Store) strayLayers(ctx context.Context) (strays []stray, err error) {
	root := filepath.Join(s.o.Dir, layersDir)
	err = filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil // evicted meanwhile
		case err != nil || ctx.Err() != nil:
			return errors.Join(err, ctx.Err())
		case path == root || filepath.Dir(path) == root && entry.IsDir() || filepath.Dir(filepath.Dir(path)) == root && entry.IsDir():
			return nil
		}
		f := stray{path: path}
		d := digest.NewDigestFromEncoded(digest.Algorithm(filepath.Base(filepath.Dir(filepath.Dir(path)))), filepath.Base(path))
		if _, err := keyOf(d); err == nil && s.layerDir(d) == path && entry.IsDir() {
			f.digest = d
		}
		if f.digest == "" || !s.knowsLayer(d) {
			f.allocated = allocatedUnder(path)
			strays = append(strays, f)
		}
		if entry.IsDir() {
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	staged, err := os.ReadDir(filepath.Join(s.o.Dir, stagingDir))
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, entry := range staged {
		path := filepath.Join(s.o.Dir, stagingDir, entry.Name())
		if _, live := s.staged[path]; !live {
			strays = append(strays, stray{path: path, allocated: allocatedUnder(path)})
		}
	}
	return strays, nil
}

// knowsLayer reports whether somebody deals with the folder of layer d.
func (s *Store) knowsLayer(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.layers[d] != nil || s.creating[d] != nil || s.tombs[itemKey{FormLayer, d}] != nil
}

// adoptLayer takes in or removes one folder, unless somebody asked for that layer meanwhile and looks at it himself.
func (s *Store) adoptLayer(ctx context.Context, f stray, rep *Report) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.mu.Unlock()
	c, mine := s.begin(f.digest)
	if !mine {
		return nil
	}
	l, err := s.takeBack(ctx, f.digest)
	s.finish(f.digest, c, l, err, ctx.Err() != nil || err != nil)
	switch {
	case err == nil:
		rep.AdoptedLayers++
	case errors.Is(err, accel.ErrNotFound):
		rep.RemovedFiles++
		rep.FreedBytes += f.allocated
	case ctx.Err() != nil || errors.Is(err, ErrClosed):
		return err
	default:
		s.o.Log.Warn("a layer's files could not be taken back; tried again later", "layer", f.digest, "err", err)
	}
	return nil
}

func (s *Store) removeStray(f stray, rep *Report) {
	if err := os.RemoveAll(f.path); err != nil {
		s.o.Log.Warn("a file of the cache could not be removed", "err", err)
		return
	}
	rep.RemovedFiles++
	rep.FreedBytes += f.allocated
}

// allocatedUnder is what a file or folder takes on disk, as far as that can be told.
func allocatedUnder(path string) (total int64) {
	_ = filepath.WalkDir(path, func(path string, entry os.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil && !entry.IsDir() && syscall.Lstat(path, &st) == nil {
			total += st.Blocks * 512
		}
		return nil
	})
	return total
}
