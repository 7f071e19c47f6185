package prefetch

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
)

// Stream is one request for a blob that brings chunks of several layers, such as a boot bundle: in order of first use, and
// packed in another way than the layers have them. The caller reads it, and puts what is in it. Meanwhile
// it counts as a flight of the hot set: who misses what it has promised waits for that, where a request of
// its own would not be earlier, and nobody else fetches it. Read and Close are called by one goroutine.
type Stream struct {
	f      *Filler
	fl     *flight // stands for it where flights are timed, counted and slowed down; it is no layer's
	res    *response
	body   io.ReadCloser
	cancel context.CancelCauseFunc
	size   int64

	// The reader's: bytes that were read, where the first request ends, and how fast it goes.
	position, end int64
	pace          pace
	wide          wide

	// Guarded by Filler.mu:
	layers []*layer // that it has promised something of
	closed bool
}

// Promised is a chunk that a Stream will bring.
type Promised struct {
	Digest digest.Digest // of the layer
	Chunk  int
	// At is how many bytes of the stream are read when it is there.
	At int64
}

// promise is what a layer knows of a promised chunk.
type promise struct {
	s  *Stream
	at int64
}

// Stream asks source for the first bytes of a blob, all of which are read. The caller closes it, also after an error of Read. The
// error is source's, ctx's cause or ErrClosed.
func (f *Filler) Stream(ctx context.Context, host string, source Source, bytes int64) (*Stream, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		cancel(nil)
		return nil, ErrClosed
	}
	k := f.linkOf(host)
	fl := &flight{l: &layer{Layer: Layer{Source: source}, link: k}, kind: hot, hurry: make(chan struct{}), requested: time.Now(), hotBytes: bytes}
	k.flying[hot]++
	k.hotBytes += bytes
	patience := k.patience(f.o.StallPatience)
	f.mu.Unlock()
	s := &Stream{f: f, fl: fl, res: newResponse(ctx, f, fl, patience, cancel), cancel: cancel, size: bytes, end: bytes, wide: wide{most: 1}}
	body, err := s.res.open(0, bytes)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		s.Close()
		return nil, err
	}
	s.body = body
	return s, nil
}

// Read implements io.Reader. It waits where others go first.
func (s *Stream) Read(p []byte) (n int, err error) {
	if s.position < s.end {
		n, err = s.res.read(p[:min(int64(len(p)), s.end-s.position)], false)
		if s.position+int64(n) == s.end && err != nil {
			err = nil // the pieces tell, or the next Read
		}
		if cause := context.Cause(s.res.ctx); err != nil && cause != nil {
			err = cause
		}
	} else if n, err = s.readPieces(p); n > 0 {
		s.f.mu.Lock()
		s.fl.position += int64(n)
		s.fl.received += int64(n)
		s.f.mu.Unlock()
	}
	if s.position += int64(n); n > 0 {
		s.consider(n, time.Now())
	}
	if s.position == s.end && s.body != nil { // its connection is of use to others
		s.body.Close() //nolint:errcheck // read, or given up
		s.body = nil
	}
	return n, err
}

// Promise says what the rest of the stream brings. What is there, and what is of layers that are not, is left out. An
// error says that there is no room: nothing is promised then.
func (s *Stream) Promise(list []Promised) error {
	f := s.f
	f.mu.Lock()
	of := map[digest.Digest]*layer{}
	bytes := map[*layer]int64{}
	for _, p := range list {
		l := f.layers[p.Digest]
		if l == nil || p.Chunk < 0 || p.Chunk >= l.n || l.Content.Has(p.Chunk) {
			continue
		}
		of[p.Digest] = l
		bytes[l] += l.Content.Chunk(p.Chunk).Bytes
	}
	for l := range bytes {
		l.users++
	}
	f.mu.Unlock()

	var err error
	releases := map[*layer]func(){}
	for l, n := range bytes {
		if err == nil && l.Reserve != nil {
			var release func()
			if release, err = l.Reserve(n); err == nil && release != nil {
				releases[l] = release
			}
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for l := range bytes {
		if release := releases[l]; release != nil { // given back when what was put is persisted
			l.releases = append(l.releases, release)
		}
		l.leave()
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errNoRoom, err)
	}
	for l := range bytes {
		if !l.removed {
			s.layers = append(s.layers, l)
			l.link.foretold, l.link.arrived = true, time.Now()
		}
	}
	for _, p := range list {
		l := of[p.Digest]
		if l == nil || l.removed || p.Chunk < 0 || p.Chunk >= l.n || l.Content.Has(p.Chunk) || l.owner(l.memberOf(p.Chunk)) != nil {
			continue // whoever brings it has asked for it
		}
		if l.promised == nil {
			l.promised = map[int]promise{}
		}
		if _, twice := l.promised[p.Chunk]; !twice {
			l.promised[p.Chunk] = promise{s, p.At}
		}
	}
	return nil
}

// Put keeps a chunk, of which packedBytes came. ErrCorrupt where it is not what its digest says, or what Content.Put said;
// a chunk of no use is none. Many may call it at once, until Close.
func (s *Stream) Put(d digest.Digest, i int, data []byte, packedBytes int64) error {
	f := s.f
	f.mu.Lock()
	l := f.layers[d]
	if l == nil || s.closed || i < 0 || i >= l.n {
		f.mu.Unlock()
		return nil
	}
	l.users++
	l.putting++
	l.stats.FetchedBytes += packedBytes
	f.mu.Unlock()
	var err error
	if c := l.Content.Chunk(i); !l.Content.Has(i) {
		if err = f.put(l, i, c, data); err == nil {
			f.arrived(l, i, c.Bytes)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	l.putting--
	if l.promised[i].s == s {
		delete(l.promised, i)
	}
	l.leave()
	return err
}

// Close ends the request. What was promised and has not come is fetched by others. Closing twice is fine.
func (s *Stream) Close() {
	f := s.f
	f.mu.Lock()
	was := s.closed
	s.closed = true
	f.mu.Unlock()
	if was {
		return
	}
	s.cancel(nil)
	s.wide.requests.Wait()
	s.res.end()
	if s.body != nil {
		s.body.Close() //nolint:errcheck // read, or given up
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	k := s.fl.l.link
	k.flying[hot]--
	k.hotBytes -= s.fl.hotBytes
	k.arrived = time.Now()
	for _, l := range s.layers {
		for i, p := range l.promised {
			if p.s == s {
				delete(l.promised, i)
			}
		}
		if l.removed {
			continue
		}
		l.link.hot.want(l, 0, l.members)
		for w := range l.waiters {
			if w.forgotten() {
				w.lookAgain(nil)
			}
		}
	}
	kick(f.dispatching)
	kick(f.persisting)
}

// promises reports whether a stream has promised some of m. Filler.mu is held.
func (l *layer) promises(m int) bool {
	if len(l.promised) == 0 {
		return false
	}
	for p, to := l.places(m); p < to; p++ {
		if _, ok := l.promised[l.at(p)]; ok {
			return true
		}
	}
	return false
}

// withdraw has m fetched in spite of what was promised. Filler.mu is held.
func (l *layer) withdraw(m int) {
	if len(l.promised) == 0 {
		return
	}
	for p, to := l.places(m); p < to; p++ {
		delete(l.promised, l.at(p))
	}
}

// promisedTo reports whether streams bring all that w lacks of m, and not later than a request of its own
// would. f.mu is held.
func (f *Filler) promisedTo(w *waiter, m int) bool {
	l := w.l
	if len(l.promised) == 0 {
		return false
	}
	for p, to := l.places(m); p < to; p++ {
		i := l.at(p)
		if _, needed := w.need[i]; !needed || l.Content.Has(i) {
			continue
		}
		promised, ok := l.promised[i]
		if !ok || f.tooFar(l, m, promised) {
			return false
		}
	}
	return true
}

// overtakeTime: what a stream brings within it is waited for, whatever was measured. All of a stream is wanted soon, and a request
// of one's own takes its time from the same link, and brings what the stream brings once more.
const overtakeTime = time.Second

// tooFar reports whether what is promised comes much later than by a request of its own; compare join. f.mu is held.
func (f *Filler) tooFar(l *layer, m int, p promise) bool {
	distance := p.at - p.s.fl.position
	if distance < leastOvertakeBytes || l.link.flying[demand] >= f.o.DemandConnections {
		return false
	}
	offset, end := l.span(m)
	wait := p.s.fl.wait(distance)
	if wait < overtakeTime || !l.link.overtakes(wait, end-offset) {
		return false
	}
	f.metrics.overtakes.Inc()
	return true
}
