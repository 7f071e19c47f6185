package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

const (
	// maxLayerChunks bounds the marks of one layer (2 MiB): fifty times the largest layers that are known.
	maxLayerChunks = 1 << 24
	// segmentChunks are marked by one row of the index, so that a commit writes what changed and not the
	// marks of a whole layer.
	segmentChunks = 4096
)

func segmentsOf(chunks int64) int64 { return (chunks + segmentChunks - 1) / segmentChunks }

// LayerInfo is how large a layer is.
type LayerInfo struct {
	Chunks     int
	DataBytes  int64 // size of Data
	FilesBytes int64 // what Meta, Table and TOC take together
}

// LayerFiles are the absolute paths of a layer's files. The store knows nothing of what is in them but that Data is
// sparse, of LayerInfo.DataBytes, and that the other three never change.
type LayerFiles struct{ Meta, Table, TOC, Data string }

// Layer is a layer kept inflated, by the digest of its compressed blob. It stays while it is pinned, or while
// something is reserved: the caller pins it before it opens its files, and closes them before it unpins. It is
// safe for concurrent use; what went while nobody held it says accel.ErrNotFound.
type Layer struct {
	item
	s    *Store
	info layerInfo

	// accounting is held from asking for the blocks of its files to noting them.
	accounting sync.Mutex

	// Guarded by Store.mu:
	marks    bitmap // of chunks that are there; nil when complete
	missing  int64  // chunks
	complete bool
	used     bool               // Use was called since it was made
	writers  int                // what was reserved and not released
	checks   int                // that read it now
	changed  map[int64]struct{} // segments of marks that are not as in the index
}

func newLayer(s *Store, d digest.Digest, info layerInfo, seq uint64) *Layer {
	l := &Layer{item: item{digest: d, seq: seq}, s: s, info: info, marks: newBitmap(info.chunks), missing: info.chunks, complete: info.chunks == 0}
	l.layer = l
	if l.complete {
		l.marks = nil
	}
	return l
}

// layerDir is the folder of a layer's files; d is one that keyOf let through.
func (s *Store) layerDir(d digest.Digest) string {
	return filepath.Join(s.o.Dir, layersDir, d.Algorithm().String(), d.Encoded()[:2], d.Encoded())
}

func layerFiles(dir string) LayerFiles {
	return LayerFiles{
		Meta: filepath.Join(dir, "meta"), Table: filepath.Join(dir, "table"), TOC: filepath.Join(dir, "toc"), Data: filepath.Join(dir, "data"),
	}
}

// fixed are the files that never change, as in layerInfo.files.
func (f LayerFiles) fixed() [3]string { return [3]string{f.Meta, f.Table, f.TOC} }

func infoPath(dir string) string { return filepath.Join(dir, "info") }

// Layer returns the layer d. accel.ErrNotFound, also where one of its files is gone or not as long as it was.
func (s *Store) Layer(d digest.Digest) (*Layer, error) {
	if _, err := keyOf(d); err != nil {
		return nil, err
	}
	s.mu.Lock()
	l, closed := s.layers[d], s.closed
	s.mu.Unlock()
	switch {
	case closed:
		return nil, ErrClosed
	case l == nil:
		return nil, fmt.Errorf("%w: layer %s", accel.ErrNotFound, d)
	}
	if err := l.lookAtFiles(); err != nil {
		return nil, err
	}
	return l, nil
}

// Files are where the layer's files are.
func (l *Layer) Files() LayerFiles { return layerFiles(l.s.layerDir(l.digest)) }

// Has returns whether a chunk was marked when Has was called.
func (l *Layer) Has() func(chunk int) bool {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	chunks := l.info.chunks
	if l.complete {
		return func(chunk int) bool { return chunk >= 0 && int64(chunk) < chunks }
	}
	marks := append(bitmap(nil), l.marks...)
	return func(chunk int) bool { return chunk >= 0 && int64(chunk) < chunks && marks.has(int64(chunk)) }
}

// Stat returns what there is of it.
func (l *Layer) Stat() Entry {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	return l.entry()
}

// Use notes that somebody mounted it or read from it, for eviction. The first time after it was made does not count as
// a second use: what is used once only goes before what is used again. accel.ErrNotFound where the layer was evicted,
// removed or found damaged: it has to be asked for, or made, again.
func (l *Layer) Use() error {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if err := l.usable(); err != nil {
		return err
	}
	l.usedAt, l.touched = l.s.o.Now().UnixNano(), true
	if l.used {
		l.visited = true
	}
	l.used = true
	return nil
}

// Lose drops a layer of which a user found that it cannot be used, as Check does with damaged ones. Pins stay,
// and the layer may be created again.
func (l *Layer) Lose(why error) {
	l.s.lose(&l.item, fmt.Errorf("%w: layer %s: %w", ErrDamaged, l.digest, why))
}

// Reserve makes room for bytes that are going to be written to Data. It evicts others where that is necessary; ErrNoSpace where it
// is not enough. release is called once they are written; the layer is not evicted before.
func (l *Layer) Reserve(bytes int64) (release func(), err error) {
	s := l.s
	if bytes < 0 || bytes > maxBlobBytes {
		return nil, fmt.Errorf("%w: %d bytes to reserve", accel.ErrInvalid, bytes)
	}
	s.mu.Lock()
	if err := l.usable(); err != nil {
		s.mu.Unlock()
		return nil, err
	}
	l.writers++
	s.mu.Unlock()
	err = s.take(l.key(), bytes)
	if err != nil {
		s.mu.Lock()
		l.writers--
		s.mu.Unlock()
		return nil, err
	}
	return sync.OnceFunc(func() {
		_ = l.account(func() { // files that are gone, Commit notices
			s.reserved -= bytes
			l.writers--
		})
	}), nil
}

// Commit marks chunks, whose bytes are in Data and synced. The marks are on disk when it returns; where that is not
// possible now, ErrNoSpace, they still count, and are written later. accel.ErrInvalid for a chunk that the layer does not have.
func (l *Layer) Commit(chunks []int) error {
	s := l.s
	for _, c := range chunks {
		if c < 0 || int64(c) >= l.info.chunks {
			return fmt.Errorf("%w: chunk %d of layer %s, which has %d", accel.ErrInvalid, c, l.digest, l.info.chunks)
		}
	}
	var err error
	lost := l.account(func() {
		if err = l.usable(); err == nil {
			l.mark(chunks)
			s.dirtyLayers[l] = struct{}{}
		}
	})
	if lost != nil {
		lost = fmt.Errorf("%w: layer %s: %w", ErrDamaged, l.digest, lost)
		s.lose(&l.item, lost)
		return lost
	}
	if err != nil {
		return err
	}
	if err := s.commit(); noSpace(err) {
		return fmt.Errorf("%w: marks of layer %s: %w", ErrNoSpace, l.digest, err)
	} else if err != nil {
		return err
	}
	return nil
}

// account asks what the files take, and notes that together with what note does under s.mu. An error says
// that the files are gone; note was called all the same.
func (l *Layer) account(note func()) error {
	l.accounting.Lock()
	defer l.accounting.Unlock()
	n, err := allocatedIn(l.Files())
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	switch {
	case l.gone != nil:
		err = nil // known
	case err == nil:
		l.s.allocate(&l.item, n)
	}
	note()
	return err
}

// usable says why nothing can be done with it any more. s.mu is held.
func (l *Layer) usable() error {
	if l.s.closed {
		return ErrClosed
	}
	if l.gone != nil {
		return fmt.Errorf("%w: layer %s: %w", accel.ErrNotFound, l.digest, l.gone)
	}
	return nil
}

// busy: somebody writes or checks it. s.mu is held.
func (l *Layer) busy() bool { return l.writers > 0 || l.checks > 0 }

// mark marks chunks that were checked to exist. s.mu is held.
func (l *Layer) mark(chunks []int) {
	for _, c := range chunks {
		if c := int64(c); !l.complete && !l.marks.has(c) {
			l.marks.set(c)
			l.change(c / segmentChunks)
			l.missing--
			if l.missing == 0 {
				l.complete, l.marks = true, nil
			}
		}
	}
}

// unmark takes marks away and returns how many there were. s.mu is held, where the store knows l.
func (l *Layer) unmark(chunks []int) (n int) {
	for _, c := range chunks {
		c := int64(c)
		if c < 0 || c >= l.info.chunks || (!l.complete && !l.marks.has(c)) {
			continue
		}
		if l.complete { // the index has no marks of it
			l.complete, l.marks = false, fullBitmap(l.info.chunks)
			for segment := range segmentsOf(l.info.chunks) {
				l.change(segment)
			}
		}
		l.marks.unset(c)
		l.change(c / segmentChunks)
		l.missing++
		n++
	}
	return n
}

// change has the next commit of l write a segment.
func (l *Layer) change(segment int64) {
	if l.changed == nil {
		l.changed = map[int64]struct{}{}
	}
	l.changed[segment] = struct{}{}
}

// lookAtFiles drops the layer when one of its files is gone or of another size.
func (l *Layer) lookAtFiles() error {
	err := l.info.sizesIn(l.s.layerDir(l.digest))
	if err == nil {
		err = l.account(func() {})
	}
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%w: layer %s: %w", ErrDamaged, l.digest, err)
	l.s.lose(&l.item, err)
	return fmt.Errorf("%w: %w", accel.ErrNotFound, err)
}

func (l *Layer) entry() Entry {
	e := Entry{
		Form: FormLayer, Digest: l.digest, SizeBytes: l.info.sizeBytes(), AllocatedBytes: l.allocated,
		Chunks: int(l.info.chunks), PresentChunks: int(l.info.chunks - l.missing),
		Complete: l.complete, Pinned: l.pins > 0, Filling: l.writers > 0, UsedAt: time.Unix(0, l.usedAt).UTC(),
	}
	e.PresentBytes = min(e.AllocatedBytes, e.SizeBytes) // how long each chunk is, the table says
	if l.complete {
		e.PresentBytes = e.SizeBytes
	}
	return e
}

// allocatedIn is what the files of a layer take on disk.
func allocatedIn(f LayerFiles) (int64, error) {
	total := int64(0)
	for _, path := range []string{f.Meta, f.Table, f.TOC, f.Data, infoPath(filepath.Dir(f.Data))} {
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return 0, &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		total += st.Blocks * 512
	}
	return total, nil
}

// noDescriptors reports errors that say nothing of a file but that it could not be opened just now.
func noDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM)
}
