package prefetch

import (
	"context"
	"io"
	"sync"
	"time"
)

// A Stream is one request: what comes first is needed first, and one connection that fills the link loses nothing to others. But
// where packets are lost on a long way it falls far behind what the link has shown that it can do. Then the rest is asked for in pieces,
// over more connections, as long as these bring more; the reader gets them in their order.
const (
	// widenTime: how often it is looked whether more connections bring more, and so what a stream takes at least before
	// it has a second one. Connections are given widenTrips, in latencies, to come up to their speed.
	widenTime  = 500 * time.Millisecond
	widenTrips = 8
	// widenShare of the link's best rate is what one connection should bring. That rate is of a moment, and may be three times what
	// the link does, when a process that had to wait for a processor finds much in its buffers.
	widenShare = 0.25
	// widenLeft: a stream that has less to go, at its rate, stays as it is.
	widenLeft = time.Second
	// widenGain is what twice the connections must have brought for there to be twice as many again.
	widenGain          = 1.2
	mostStreamRequests = 8
	// A piece is what a connection brings in pieceOfTime, within these bounds: several round trips, lest they are mostly waited for,
	// and not so much that what is read next comes long after what is read later.
	pieceOfTime      = 250 * time.Millisecond
	leastStreamPiece = 128 << 10
	mostStreamPiece  = 1 << 20
)

// wide is the part of a Stream that comes in pieces. Its lock is never held together with Filler.mu.
type wide struct {
	requests sync.WaitGroup

	mu     sync.Mutex
	most   int   // requests at a time; 1: the stream is one request still
	bytes  int64 // of the next pieces
	asked  int64 // to here the stream is asked for in pieces
	flying int
	queue  []*piece // in order; the first one is being read
}

// piece is a range of a stream on its way.
type piece struct {
	buf    []byte
	read   int           // by the reader alone
	more   chan struct{} // has one where filled or err has changed
	mu     sync.Mutex
	filled int
	err    error
}

// pace is what a Stream's reader knows of its rate. It alone uses it.
type pace struct {
	since  time.Time // of the current stretch, which may be to come; zero: nothing has come
	bytes  int64     // since then
	before float64   // bytes a second before the last widening; 0: there was none
}

// consider looks, after n more bytes, whether the rest should come over more connections.
func (s *Stream) consider(n int, now time.Time) {
	p := &s.pace
	if p.since.IsZero() {
		s.f.mu.Lock()
		latency, _ := s.fl.l.link.estimate()
		s.f.mu.Unlock()
		p.since = now.Add(widenTrips * latency)
	}
	took := now.Sub(p.since)
	if took <= 0 {
		return
	}
	p.bytes += int64(n)
	if took < widenTime {
		return
	}
	rate := float64(p.bytes) / took.Seconds()
	p.since, p.bytes = now, 0
	if seconds(float64(s.size-s.position)/rate) < widenLeft || rate < widenGain*p.before {
		return
	}
	s.f.mu.Lock()
	latency, _ := s.fl.l.link.estimate()
	enough := p.before == 0 && rate > widenShare*s.fl.l.link.capacity
	s.f.mu.Unlock()
	if !enough && s.widen(rate, latency) {
		p.before, p.since = rate, now.Add(widenTrips*latency)
	}
}

// widen doubles the requests, and reports whether it could. What one request brings now is left to it for as long as another takes
// to be answered.
func (s *Stream) widen(rate float64, latency time.Duration) bool {
	w := &s.wide
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.most >= mostStreamRequests {
		return false
	}
	if w.most == 1 {
		s.end = min(s.position+int64(rate*2*latency.Seconds())+leastStreamPiece, s.size)
		w.asked = s.end
	}
	w.bytes = min(max(int64(rate/float64(w.most)*pieceOfTime.Seconds()), leastStreamPiece), mostStreamPiece)
	w.most = min(2*w.most, mostStreamRequests)
	s.ask()
	return true
}

// ask begins as many requests as there may be. wide.mu is held.
func (s *Stream) ask() {
	w := &s.wide
	for w.flying < w.most && len(w.queue) < 2*w.most && w.asked < s.size && s.res.ctx.Err() == nil {
		from := w.asked
		p := &piece{buf: make([]byte, min(w.bytes, s.size-from)), more: make(chan struct{}, 1)}
		w.asked += int64(len(p.buf))
		w.queue = append(w.queue, p)
		w.flying++
		w.requests.Go(func() {
			p.end(s.fetch(p, from))
			w.mu.Lock()
			defer w.mu.Unlock()
			w.flying--
			s.ask()
		})
	}
}

// fetch brings one piece.
func (s *Stream) fetch(p *piece, from int64) error {
	ctx, cancel := context.WithCancelCause(s.res.ctx)
	defer cancel(nil)
	f := s.f
	f.mu.Lock()
	fl := &flight{l: s.fl.l, kind: hot, hurry: make(chan struct{}), requested: time.Now()}
	patience := fl.l.link.patience(f.o.StallPatience)
	f.mu.Unlock()
	r := newResponse(ctx, f, fl, patience, cancel)
	defer r.end()
	body, err := r.open(from, int64(len(p.buf)))
	if err == nil {
		for at := 0; at < len(p.buf) && err == nil; {
			var n int
			n, err = r.read(p.buf[at:], false)
			at += n
			if p.add(n); at == len(p.buf) {
				err = nil
			}
		}
		body.Close() //nolint:errcheck // read, or given up
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return unexpected(err)
}

// readPieces reads on in the first piece.
func (s *Stream) readPieces(b []byte) (int, error) {
	w := &s.wide
	w.mu.Lock()
	if len(w.queue) == 0 {
		w.mu.Unlock()
		return 0, io.EOF
	}
	p := w.queue[0]
	w.mu.Unlock()
	for {
		p.mu.Lock()
		filled, err := p.filled, p.err
		p.mu.Unlock()
		if n := copy(b, p.buf[p.read:filled]); n > 0 {
			if p.read += n; p.read == len(p.buf) {
				w.mu.Lock()
				w.queue = w.queue[1:]
				s.ask()
				w.mu.Unlock()
			}
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		select {
		case <-p.more:
		case <-s.res.ctx.Done():
			return 0, context.Cause(s.res.ctx)
		}
	}
}

func (p *piece) add(n int) {
	p.mu.Lock()
	p.filled += n
	p.mu.Unlock()
	kick(p.more)
}

func (p *piece) end(err error) {
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
	kick(p.more)
}
