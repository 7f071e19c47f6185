package cache

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"accel"
	"accel/internal/durable"

	"github.com/opencontainers/go-digest"
)

// creation is a layer that is being made, or taken back from files that the index does not know.
type creation struct {
	done  chan struct{} // closed when the rest is set
	layer *Layer
	err   error
	ended bool // its caller's context did; whoever waits tries himself
}

// CreateLayer returns the layer d, and makes it first where there is none: write makes the four files, in a folder of
// their own; they are synced, moved to their place, and the layer, with no chunk marked, is in the index. Callers at the same time share one call of
// write. Where the disk is full, others are evicted and write is called again. Files that the index does not know, as after it was
// damaged, are taken back with the chunks that Options.VerifyLayer finds right. Errors: ErrNoSpace; accel.ErrInvalid where info
// makes no sense or the files are not as it says; those of write.
func (s *Store) CreateLayer(ctx context.Context, d digest.Digest, info LayerInfo, write func(LayerFiles) error) (*Layer, error) {
	if _, err := keyOf(d); err != nil {
		return nil, err
	}
	if info.Chunks < 0 || info.Chunks > maxLayerChunks || info.DataBytes < 0 || info.DataBytes > maxBlobBytes || info.FilesBytes < 0 || info.FilesBytes > maxBlobBytes {
		return nil, fmt.Errorf("%w: layer %s of %d chunks in %d bytes and %d of files", accel.ErrInvalid, d, info.Chunks, info.DataBytes, info.FilesBytes)
	}
	for {
		l, err := s.Layer(d)
		if !errors.Is(err, accel.ErrNotFound) {
			return l, err
		}
		c, mine := s.begin(d)
		if mine {
			l, err := s.takeBack(ctx, d)
			if errors.Is(err, accel.ErrNotFound) {
				l, err = s.create(d, info, write)
			}
			s.finish(d, c, l, err, ctx.Err() != nil)
			if err != nil {
				return nil, err
			}
			return l, nil
		}
		select {
		case <-c.done:
			if c.err == nil || !c.ended {
				return c.layer, c.err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// begin returns the creation of d that runs, or one that the caller has to end by finish.
func (s *Store) begin(d digest.Digest) (c *creation, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.creating[d]; c != nil {
		return c, false
	}
	c = &creation{done: make(chan struct{})}
	if l := s.layers[d]; l != nil { // made just before
		c.layer = l
		close(c.done)
		return c, false
	}
	s.creating[d] = c
	return c, true
}

func (s *Store) finish(d digest.Digest, c *creation, l *Layer, err error, ended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.layer, c.err, c.ended = l, err, ended
	delete(s.creating, d)
	close(c.done)
}

// create makes a layer of which there are no files.
func (s *Store) create(d digest.Digest, info LayerInfo, write func(LayerFiles) error) (*Layer, error) {
	k := itemKey{FormLayer, d}
	if err := s.clearTomb(k); err != nil {
		return nil, err
	}
	if err := s.take(k, info.FilesBytes); err != nil {
		return nil, err
	}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reserved -= info.FilesBytes
	}()
	for {
		l, err := s.stage(d, info, write)
		if err == nil {
			return l, s.register(l)
		}
		if !noSpace(err) {
			return nil, err
		}
		if !s.evict(max(info.FilesBytes, partBytes)) {
			return nil, fmt.Errorf("%w: %w", ErrNoSpace, err)
		}
	}
}

// stage has the files written in a folder of their own, and moves that to its place.
func (s *Store) stage(d digest.Digest, info LayerInfo, write func(LayerFiles) error) (_ *Layer, err error) {
	staged := filepath.Join(s.o.Dir, stagingDir, d.Encoded()[:12]+"-"+rand.Text())
	dir := staged // which goes, should anything fail
	s.mu.Lock()
	s.staged[staged] = struct{}{} // before it is there: a sweep removes what nobody knows
	s.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.staged, staged)
	}()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make layer %s: %w", d, err)
	}
	files := layerFiles(dir)
	if err := write(files); err != nil {
		return nil, fmt.Errorf("make layer %s: %w", d, err)
	}
	kept := layerInfo{chunks: int64(info.Chunks), dataBytes: info.DataBytes}
	if err := kept.persist(dir, d); err != nil {
		return nil, fmt.Errorf("make layer %s: %w", d, err)
	}
	place := s.layerDir(d)
	shard := filepath.Dir(place)
	if err := os.MkdirAll(shard, 0o700); err != nil {
		return nil, fmt.Errorf("make layer %s: %w", d, err)
	}
	if err := os.Rename(dir, place); err != nil {
		return nil, fmt.Errorf("make layer %s: %w", d, err)
	}
	dir = place
	for _, parent := range []string{shard, filepath.Dir(shard), filepath.Join(s.o.Dir, layersDir)} {
		if err := durable.SyncFolder(parent); err != nil {
			return nil, fmt.Errorf("make layer %s: %w", d, err)
		}
	}
	l := newLayer(s, d, kept, 0)
	l.allocated, err = allocatedIn(layerFiles(place))
	return l, err
}

// persist fills in what there is of the fixed files, writes it beside them and makes all of it durable.
func (i *layerInfo) persist(dir string, d digest.Digest) error {
	files := layerFiles(dir)
	if err := sized(files.Data, i.dataBytes); err != nil {
		return fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	var wg sync.WaitGroup
	errs := make([]error, len(i.files)+1)
	for n, path := range files.fixed() {
		wg.Go(func() { // the file system writes them together
			if i.files[n], errs[n] = sumOf(path); errs[n] == nil {
				errs[n] = syncFile(path)
			}
			if errors.Is(errs[n], os.ErrNotExist) {
				errs[n] = fmt.Errorf("%w: %w", accel.ErrInvalid, errs[n])
			}
		})
	}
	wg.Go(func() { errs[len(i.files)] = syncFile(files.Data) })
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.WriteFile(infoPath(dir), i.seal(d), 0o600); err != nil {
		return err
	}
	return errors.Join(syncFile(infoPath(dir)), durable.SyncFolder(dir))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// register puts l, whose files are in their place, into the store and the index. A full disk is no error: until the row
// is written, a crash costs a look at the files.
func (s *Store) register(l *Layer) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	l.seq, l.usedAt = s.nextSeq(), s.o.Now().UnixNano()
	n := l.allocated
	l.allocated = 0
	s.layers[l.digest] = l
	s.add(&l.item)
	s.allocate(&l.item, n)
	s.dirtyLayers[l] = struct{}{}
	s.mu.Unlock()
	if err := s.commit(); err != nil && !noSpace(err) {
		return err
	} else if err != nil {
		s.o.Log.Warn("a new layer could not be written to the cache's index; tried again", "layer", l.digest, "err", err)
	}
	return nil
}

// takeBack takes files back that the index does not know, or removes them, accel.ErrNotFound, where that is not possible. It is called
// within a creation.
func (s *Store) takeBack(ctx context.Context, d digest.Digest) (*Layer, error) {
	dir := s.layerDir(d)
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: layer %s", accel.ErrNotFound, d)
	}
	if err := s.clearTomb(itemKey{FormLayer, d}); err != nil {
		return nil, err
	}
	l, err := s.inspect(ctx, d)
	switch {
	case err == nil:
		return l, s.register(l)
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case noDescriptors(err):
		return nil, fmt.Errorf("look at layer %s: %w", d, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("remove what is left of layer %s: %w", d, err)
	}
	return nil, fmt.Errorf("%w: layer %s: %w", accel.ErrNotFound, d, err)
}

// inspect finds out from its files alone what there is of a layer.
func (s *Store) inspect(ctx context.Context, d digest.Digest) (*Layer, error) {
	dir := s.layerDir(d)
	info, err := readInfo(dir, d)
	if err != nil {
		return nil, err
	}
	if err := info.intact(dir); err != nil {
		return nil, err
	}
	l := newLayer(s, d, info, 0)
	l.used = true
	files := layerFiles(dir)
	if l.allocated, err = allocatedIn(files); err != nil {
		return nil, err
	}
	var st syscall.Stat_t
	if err := syscall.Lstat(files.Data, &st); err != nil {
		return nil, err
	}
	if st.Blocks > 0 && !l.complete {
		if s.o.VerifyLayer == nil {
			return nil, errors.New("nothing can check its chunks")
		}
		wrong, err := s.o.VerifyLayer(ctx, d, files, func(int) bool { return true }, func(int64) {})
		if err != nil {
			return nil, err
		}
		l.complete, l.marks, l.missing = true, nil, 0
		l.unmark(wrong)
	}
	// What was right may have been so in memory only.
	shard := filepath.Dir(dir)
	err = syncFile(files.Data)
	for _, parent := range []string{dir, shard, filepath.Dir(shard), filepath.Join(s.o.Dir, layersDir)} {
		err = errors.Join(err, durable.SyncFolder(parent))
	}
	return l, err
}

// intact reports a file that is not as it was made.
func (i *layerInfo) intact(dir string) error {
	if err := i.sizesIn(dir); err != nil {
		return err
	}
	for n, path := range layerFiles(dir).fixed() {
		got, err := sumOf(path)
		if err != nil {
			return err
		}
		if got != i.files[n] {
			return fmt.Errorf("%w: %s is not as it was made", ErrDamaged, path)
		}
	}
	return nil
}
