package prefetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"runtime"
	"sync"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// Errors beside accel.ErrNotFound (no such layer, or it was removed), accel.ErrInvalid (chunks that are
// not the layer's, a layer whose chunks make no sense) and accel.ErrConflict (added twice, run twice).
var (
	// ErrUnranged is what a Source answers that knows no ranges. The layer is
	// then asked for once as a whole: Range with offset 0 and length -1.
	ErrUnranged = errors.New("the registry knows no ranges")
	// ErrCorrupt: what came does not have the chunk's digest, twice. Not remembered for longer than a second.
	ErrCorrupt = errors.New("content does not match its digest")
	// ErrClosed: Run has ended.
	ErrClosed = errors.New("filling has ended")
	// ErrImpatient: the bytes did not come within Options.Patience. The last attempt's error is wrapped too.
	ErrImpatient = errors.New("waited too long for missing content")
)

// Content is one layer's content as the mounts have it. It is used by many goroutines at once.
type Content interface {
	Digest() digest.Digest
	Len() int
	Chunk(i int) accel.Chunk
	Has(i int) bool
	// Put checks the digest of b and keeps it; putting a chunk that is there is no error.
	Put(i int, b []byte) error
	// Read reads a chunk that is there.
	Read(i int, p []byte) error
	// Sync makes durable what was put. Where it fails, chunks that were put since the last one may be missing again.
	Sync() error
	// Left is how many chunks are missing.
	Left() int
}

// Source brings ranges of the compressed blob. Range, and reading what it returned, must end with ctx;
// fewer bytes than asked for are an error that is mended by asking again. ErrUnranged says that only
// the whole can be had, which Range(ctx, 0, -1) asks for then.
type Source interface {
	Range(ctx context.Context, offset, length int64) (io.ReadCloser, error)
}

// Layer is what a Filler is to fill. Content and Source are required. None of its functions is called
// after Remove has returned, but for a Completed that has begun.
type Layer struct {
	Content Content
	Source  Source
	// Host names the link to the Source: layers of one host share its connections and what is measured.
	Host string
	// Persisted tells which of the chunks that Content has at Add have their mark in the durable index;
	// the others are given to Persist. nil: all have.
	Persisted func(i int) bool
	// Held: the background leaves it alone until Release, lest it takes along, in large requests, what is about to be told
	// to Hot.
	Held bool
	// Reserve makes room for bytes that are about to be written; release gives back what is not counted
	// otherwise, once they are (or were not) written and persisted. nil: there is always room.
	Reserve func(bytes int64) (release func(), err error)
	// Persist marks chunks in the durable index; Content.Sync has returned since they were put. nil: nothing does.
	// accel.ErrNotFound: the index does not know the layer any more, so that it is not tried again.
	Persist func(chunks []int) error
	// Completed is called when all chunks are there and persisted, at once where they are when the layer is
	// added, and again where Content has lost some since. It may call Remove.
	Completed func()
	// OnDemand is told of each Fill that found something missing when it ends, and how, by the goroutine that called Fill.
	OnDemand func(err error)
}

// Options of a Filler; zero fields mean the defaults.
type Options struct {
	// Patience is how long a Fill tries to bring what is missing, over all attempts; default 1 min.
	Patience time.Duration
	// StallPatience is how long a request may bring nothing until the first measurements of its host; default 10 s.
	// Afterwards the measured latency and rate make it shorter, down to a second.
	StallPatience time.Duration
	// BackgroundBytesPerSecond bounds completion in the background, over all layers. 0: not at all; negative: there is none.
	BackgroundBytesPerSecond int64
	// DemandConnections and BackgroundConnections bound the requests at a time to one host; default 8 for misses,
	// 4 for the background. The hot set has 4, and up to 16 where its ranges are short and the host is far.
	DemandConnections, BackgroundConnections int
	Registerer                               prometheus.Registerer // nil: no metrics
	Log                                      *slog.Logger          // nil: slog.Default
}

// Stats of one layer since it was added. The metrics tell more, of all layers together.
type Stats struct {
	Chunks int
	// HotLeft counts gzip members of the hot set that are not there yet.
	HotLeft int
	// Misses are Fills that had to wait; MissBytes of content were missing, Waited is the time that readers spent.
	Misses, MissBytes int64
	Waited            time.Duration
	// FetchedBytes came from the registry, compressed; of these, DemandBytes for misses.
	FetchedBytes, DemandBytes int64
	// CopiedBytes of content were copied from layers that had them.
	CopiedBytes int64
}

// Filler schedules. It is safe for concurrent use.
type Filler struct {
	o       Options
	log     *slog.Logger
	metrics *metrics
	limit   *rate.Limiter // of the background; nil: none
	cores   chan struct{} // for inflating what nobody waits for, so that a core is left for who does

	dispatching chan struct{} // has one where there may be something to start
	persisting  chan struct{} // has one where there is much to persist
	begun       chan struct{} // closed when Run has begun
	ended       chan struct{} // closed when Run is about to end

	mu      sync.Mutex
	running context.Context // Run's; nil before
	closed  bool
	layers  map[digest.Digest]*layer
	list    []*layer // in the order of Add
	links   map[string]*link
	touches uint64         // counts misses
	flights sync.WaitGroup // Add under mu while not closed
}

// New checks o. accel.ErrInvalid for values that make no sense; what Registerer says where it has such metrics already.
func New(o Options) (*Filler, error) {
	if min(o.Patience, o.StallPatience) < 0 || min(o.DemandConnections, o.BackgroundConnections) < 0 {
		return nil, fmt.Errorf("%w: neither patience nor numbers of connections are negative", accel.ErrInvalid)
	}
	if o.Patience == 0 {
		o.Patience = time.Minute
	}
	if o.StallPatience == 0 {
		o.StallPatience = 10 * time.Second
	}
	if o.DemandConnections == 0 {
		o.DemandConnections = 8
	}
	if o.BackgroundConnections == 0 {
		o.BackgroundConnections = 4
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	f := &Filler{
		o: o, log: o.Log, metrics: m,
		cores:       make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1)),
		dispatching: make(chan struct{}, 1),
		persisting:  make(chan struct{}, 1),
		begun:       make(chan struct{}),
		ended:       make(chan struct{}),
		layers:      map[digest.Digest]*layer{},
		links:       map[string]*link{},
	}
	if o.BackgroundBytesPerSecond > 0 {
		f.limit = rate.NewLimiter(rate.Limit(o.BackgroundBytesPerSecond), pieceBytes)
	}
	return f, nil
}

// Run fills until ctx ends, and then waits for its goroutines and persists what was put. It runs once.
func (f *Filler) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f.mu.Lock()
	if f.running != nil {
		f.mu.Unlock()
		return fmt.Errorf("%w: a filler runs once", accel.ErrConflict)
	}
	f.running = ctx
	close(f.begun)
	f.mu.Unlock()

	var own sync.WaitGroup
	own.Go(func() { f.dispatch(ctx) })
	own.Go(func() { f.persistAll(ctx) })
	<-ctx.Done()
	f.mu.Lock()
	f.closed = true
	close(f.ended)
	f.mu.Unlock()
	own.Wait()
	f.flights.Wait()
	f.persistRound(true)
	return nil
}

// Add begins to fill a layer. accel.ErrInvalid where its chunks make no sense, accel.ErrConflict where it is
// there already.
func (f *Filler) Add(given Layer) error {
	l, err := newLayer(given)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	if f.layers[l.digest] != nil {
		return fmt.Errorf("%w: layer %s is being filled", accel.ErrConflict, l.digest)
	}
	l.idle = sync.NewCond(&f.mu)
	l.link = f.linkOf(given.Host)
	l.link.layers++
	l.link.starting = time.Now().Add(startTime)
	f.layers[l.digest] = l
	f.list = append(f.list, l)
	kick(f.dispatching)
	kick(f.persisting)
	return nil
}

// linkOf is the link to a host, which is remembered a while longer than its layers. f.mu is held.
func (f *Filler) linkOf(host string) *link {
	if k := f.links[host]; k != nil {
		return k
	}
	if len(f.links) >= maxIdleLinks {
		maps.DeleteFunc(f.links, func(_ string, k *link) bool { return k.idle() })
	}
	k := newLink(f.o)
	f.links[host] = k
	return k
}

// Remove ends all that is done for a layer, waits for it, and persists what was put; then nothing uses the
// Content any more. Who waits for missing chunks gets accel.ErrNotFound. A layer that is not there is no error.
func (f *Filler) Remove(d digest.Digest) {
	f.mu.Lock()
	l := f.layers[d]
	if l == nil {
		f.mu.Unlock()
		return
	}
	delete(f.layers, d)
	for i, other := range f.list {
		if other == l {
			f.list = append(f.list[:i:i], f.list[i+1:]...)
			break
		}
	}
	l.link.layers--
	l.removed = true
	l.link.hot.drop(l)
	for _, fl := range l.flights {
		fl.cancel(errRemoved)
	}
	for w := range l.waiters {
		w.finish(fmt.Errorf("%w: layer %s was removed", accel.ErrNotFound, d))
	}
	for l.users > 0 || len(l.flights) > 0 {
		l.idle.Wait()
	}
	f.mu.Unlock()
	f.persist(l, true)
}

// Stats of a layer; zero where it is not there.
func (f *Filler) Stats(d digest.Digest) Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.layers[d]
	if l == nil {
		return Stats{}
	}
	s := l.stats
	s.Chunks, s.HotLeft = l.n, l.hotLeft()
	return s
}

// kick wakes the one goroutine that waits on c, or the next that does.
func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
