package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"accel"
	"accel/internal/durable"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// tickEvery is how often Run commits, looks at idle fills and at the free floor.
	tickEvery = time.Second
	// commitBytes written since the last commit bring the next one at once.
	commitBytes = 64 << 20
	// Folders of Options.Dir: what is in the first two is named by its digest; layers are written in the
	// third, and what is left there is removed.
	blobsDir, layersDir, stagingDir = "blobs", "layers", "staging"
)

// Options of a Store. Dir is required.
type Options struct {
	// Dir is the store's own folder; made (mode 0700) where it is not there.
	Dir string
	// BudgetBytes bounds what the store takes on disk, in allocated blocks; 0: only
	// FreeFloorBytes and the file system do.
	BudgetBytes int64
	// FreeFloorBytes of the file system are left free; content is evicted where others
	// take the space. 0: none.
	FreeFloorBytes int64
	// VerifyLayer reads a layer for Check, and for taking back one that the index does not know: wrong are those
	// of the chunks for which has is true whose bytes in f.Data are not what f.Table says, and progress is told of bytes
	// as they are read. Calls for several layers may run at a time. Before it returns it has taken the wrong ones from whoever serves the layer. An error that is not the
	// context's or for want of file descriptors says that Meta, Table or TOC are damaged. nil: the chunks of
	// layers are not checked, and what the index does not know of them is removed.
	VerifyLayer func(ctx context.Context, d digest.Digest, f LayerFiles, has func(chunk int) bool, progress func(bytes int64)) (wrong []int, err error)
	Registerer  prometheus.Registerer // nil: no metrics
	Log         *slog.Logger          // nil: slog.Default
	Now         func() time.Time      // nil: time.Now. Only for what people read: recency is counted, not timed.
}

// Store is a node's content. It is safe for concurrent use.
type Store struct {
	o            Options
	lock         *os.File
	index        *index
	m            *metrics
	slots        chan struct{} // one token for each fill that fetches for clients
	lowSlots     chan struct{} // and at low priority
	manifestsMax int64
	idleGrace    time.Duration // how long a fill that nobody waits for is given
	kick         chan struct{} // asks Run for a commit

	committing sync.Mutex // one commit at a time
	sweeping   sync.Mutex // one sweep at a time

	mu          sync.Mutex
	blobs       map[digest.Digest]*blob
	layers      map[digest.Digest]*Layer
	creating    map[digest.Digest]*creation // layers that are being made or taken back
	staged      map[string]struct{}         // paths where these are written
	order       order
	tombs       map[itemKey]*tomb
	dirty       map[*blob]struct{}
	dirtyLayers map[*Layer]struct{}
	unsynced    int64 // bytes written since the last commit
	used        int64 // allocated by blobs and layers
	reserved    int64 // to be allocated by fills that run, and where layers are written
	strays      int64 // allocated by files that nobody has looked at yet
	seq         uint64
	pins        map[string][]digest.Digest
	pinned      map[digest.Digest]int
	manifests   map[digest.Digest]manifestUse
	manifestB   int64         // bytes of all manifests
	demand      int           // fills that fetch for clients now
	calm        chan struct{} // closed when demand ends or a fill is promoted
	run         context.Context
	fills       sync.WaitGroup
	early       []*fill // asked for before Run
	ended       bool    // no more fills
	closed      bool
}

// Open opens the store in o.Dir. ErrLocked when another process has it, named by its
// pid. A damaged index is set aside (index.db.damaged) and a new one begun; the
// files are taken into it by Run, Check, or when they are asked for.
func Open(o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.BudgetBytes < 0 || o.FreeFloorBytes < 0 {
		return nil, fmt.Errorf("%w: a cache of %d bytes, %d left free", accel.ErrInvalid, o.BudgetBytes, o.FreeFloorBytes)
	}
	for _, dir := range []string{blobsDir, layersDir, stagingDir} {
		if err := os.MkdirAll(filepath.Join(o.Dir, dir), 0o700); err != nil {
			return nil, fmt.Errorf("make the cache directory: %w", err)
		}
	}
	lock, err := lockDir(filepath.Join(o.Dir, "lock"))
	if err != nil {
		return nil, err
	}
	s := &Store{
		o: o, lock: lock,
		slots: make(chan struct{}, maxFills), lowSlots: make(chan struct{}, maxLowFills), idleGrace: idleGrace, manifestsMax: manifestsBytes,
		kick: make(chan struct{}, 1), tombs: map[itemKey]*tomb{}, dirty: map[*blob]struct{}{},
		dirtyLayers: map[*Layer]struct{}{}, creating: map[digest.Digest]*creation{}, staged: map[string]struct{}{},
	}
	if s.index, err = openIndex(filepath.Join(o.Dir, "index.db"), o.Log, s.reset, s.load); err != nil {
		lock.Close()
		return nil, err
	}
	if err = durable.SyncFolder(o.Dir); err == nil {
		s.arrange()
		s.m, err = newMetrics(o.Registerer, s)
	}
	if err != nil {
		return nil, errors.Join(err, s.index.close(), lock.Close())
	}
	return s, nil
}

func (s *Store) reset() {
	s.blobs = map[digest.Digest]*blob{}
	s.layers = map[digest.Digest]*Layer{}
	s.pins = map[string][]digest.Digest{}
	s.pinned = map[digest.Digest]int{}
	s.manifests = map[digest.Digest]manifestUse{}
	s.used, s.manifestB, s.seq = 0, 0, 0
}

// load takes in one row of the index.
func (s *Store) load(table, key string, content []byte) error {
	switch table {
	case tableBlobs:
		return s.loadBlob(key, content)
	case tableLayers:
		return s.loadLayer(key, content)
	case tableMarks:
		return s.loadMarks(key, content)
	case tableManifests:
		d, err := digestOf(key)
		if err != nil {
			return err
		}
		r, err := decodeManifest(content)
		if err != nil {
			return err
		}
		s.seq = max(s.seq, r.seq)
		s.noteManifest(d, int64(len(r.raw)), r.seq)
	case tablePins:
		digests, err := decodePins(content)
		if err != nil {
			return err
		}
		s.pins[key] = digests
		for _, d := range digests {
			s.pinned[d]++
		}
	case tableTags, tableLinks, tableGrants, tableReferrers:
		r, err := decodeDated(content)
		if err != nil {
			return err
		}
		s.seq = max(s.seq, r.seq)
	default:
		return fmt.Errorf("%w: a row of table %.20q", ErrDamaged, table)
	}
	return nil
}

func (s *Store) loadBlob(key string, content []byte) error {
	d, err := digestOf(key)
	if err != nil {
		return err
	}
	r, err := decodeBlob(content)
	if err != nil {
		return err
	}
	b := newBlob(d, r.size, r.seq)
	b.allocated, b.usedAt, b.visited = r.allocated, r.usedAt, r.visited
	b.complete, b.parts, b.missing = r.complete, r.parts, 0
	if !b.complete {
		b.missing = partsOf(b.size) - b.parts.count()
	}
	s.blobs[d] = b
	s.used += b.allocated
	s.seq = max(s.seq, r.seq)
	return nil
}

// arrange puts what was loaded into the order of its coming.
func (s *Store) arrange() {
	all := make([]*item, 0, len(s.blobs)+len(s.layers))
	for _, b := range s.blobs {
		all = append(all, &b.item)
	}
	for _, l := range s.layers {
		all = append(all, &l.item)
	}
	s.order.fill(all)
	for d, n := range s.pinned {
		for _, i := range s.forms(d) {
			i.pins = n
		}
	}
}

// nextSeq counts what happens; s.mu is held.
func (s *Store) nextSeq() uint64 {
	s.seq++
	return s.seq
}

// Run keeps the store until ctx ends: fills run only under it (those asked for before wait for
// it), and so do index commits once a second, eviction down to the free floor, and taking
// back files that the index does not know. It returns when every fill has ended and
// the index is written. An error means that the index was given up: start again.
// It may be called once.
func (s *Store) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.mu.Lock()
	if s.run != nil || s.closed {
		s.mu.Unlock()
		return fmt.Errorf("%w: it ran before", ErrClosed)
	}
	s.run = ctx
	for _, f := range s.early {
		go s.fill(f)
	}
	s.early = nil
	s.mu.Unlock()

	swept := make(chan struct{})
	go func() {
		defer close(swept)
		var r Report
		if err := s.sweep(ctx, &r); err != nil && ctx.Err() == nil {
			s.o.Log.Error("files of the cache could not be looked at", "err", err)
		}
		if r.AdoptedBlobs+r.AdoptedLayers+r.RemovedFiles+len(r.Damaged) > 0 {
			s.o.Log.Info("files of the cache were compared with its index", "adopted_blobs", r.AdoptedBlobs, "adopted_layers", r.AdoptedLayers, "removed_files", r.RemovedFiles, "lost", len(r.Damaged))
		}
	}()
	err := s.keep(ctx)
	cancel()
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.fills.Wait()
	<-swept
	if err == nil {
		err = s.commit()
	}
	return err
}

// keep does what is to be done each second.
func (s *Store) keep(ctx context.Context) error {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.kick:
		case <-tick.C:
			s.endIdle()
			if err := s.makeRoom(0); err != nil {
				s.o.Log.Warn("the cache takes more than it may and nothing in it may be evicted", "err", err)
			}
		}
		if err := s.commit(); err != nil {
			if failed := s.index.failure(); failed != nil {
				return failed
			}
			s.o.Log.Warn("the cache's index could not be written; tried again", "err", err)
		}
		if err := s.index.failure(); err != nil {
			return err
		}
	}
}

// Close writes the index and gives the directory back. Readers that are open may
// read on what is there. A second Close is no error.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed, s.ended = true, true
	early := s.early
	s.early = nil
	for _, f := range early {
		s.dropFill(f, ErrClosed)
	}
	s.mu.Unlock()
	s.fills.Wait() // none where Run has ended
	s.noteVisits()
	err := s.commit()
	if err := errors.Join(err, s.index.close(), s.lock.Close()); err != nil {
		return fmt.Errorf("close the cache: %w", err)
	}
	s.m.unregister()
	return nil
}
