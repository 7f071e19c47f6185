package prefetch

import (
	"context"
	"io"
	"time"
)

const (
	// pieceBytes are read at most before it is asked whether to hold back.
	pieceBytes = 128 << 10
	// pieceTime: what comes in this time, on a slow link, is a piece too; it is what a miss may have
	// to wait for.
	pieceTime       = 20 * time.Millisecond
	leastPieceBytes = 8 << 10
	// longestPause of a flight that holds back: registries end connections that are not read from.
	longestPause = 500 * time.Millisecond
)

// leastBytesPerSecond is what a request must bring on average of its patience, so that one which trickles is
// given up as well as one that brings nothing.
const leastBytesPerSecond = 1 << 10

// response is the network's side of one request: it is timed, measured, slowed down and given up here.
type response struct {
	ctx      context.Context
	f        *Filler
	fl       *flight
	body     io.Reader
	watch    *time.Timer // ends the request
	patience time.Duration
	giveUp   context.CancelCauseFunc
	// of the current stretch of reading, which is judged when it has lasted for patience
	reading time.Duration
	got     int64

	delivering bool // counted in link.delivering
}

func newResponse(ctx context.Context, f *Filler, fl *flight, patience time.Duration, cancel context.CancelCauseFunc) *response {
	return &response{
		ctx: ctx, f: f, fl: fl, patience: patience, giveUp: cancel,
		watch: time.AfterFunc(patience, func() { cancel(errStalled) }),
	}
}

// open asks. The caller closes what it returns, before end.
func (s *response) open(offset, length int64) (io.ReadCloser, error) {
	s.watch.Reset(s.patience)
	body, err := s.fl.l.Source.Range(s.ctx, offset, length)
	s.watch.Stop()
	if err != nil {
		return nil, err
	}
	s.body = body
	return body, nil
}

// end takes the measurements.
func (s *response) end() {
	s.watch.Stop()
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	fl, link := s.fl, s.fl.l.link
	if s.delivering {
		link.deliver(fl.kind, -1)
	}
	if !fl.begun.IsZero() && !fl.paced {
		link.sample(fl.received, time.Since(fl.begun))
	}
}

// readInto reads what b has no bytes of yet.
func (s *response) readInto(b *batch) error {
	for at := 0; at < len(b.buf); {
		n, err := s.read(b.buf[at:], false)
		at += n
		b.add(n)
		if err != nil && at < len(b.buf) {
			return unexpected(err)
		}
	}
	return nil
}

// skip reads over n bytes.
func (s *response) skip(n int64) error {
	if n == 0 {
		return nil
	}
	buf := grab(int(min(n, pieceBytes)))
	defer drop(buf)
	for n > 0 {
		got, err := s.read(buf[:min(n, int64(len(buf)))], true)
		n -= int64(got)
		if err != nil && n > 0 {
			return unexpected(err)
		}
	}
	return nil
}

// read reads a piece.
func (s *response) read(p []byte, skipped bool) (int, error) {
	piece, err := s.holdBack(len(p))
	if err != nil {
		return 0, err
	}
	began := time.Now()
	s.watch.Reset(s.patience)
	n, err := s.body.Read(p[:piece])
	s.watch.Stop()
	now := time.Now()
	s.note(n, skipped, now)
	s.reading += now.Sub(began)
	s.got += int64(n)
	if s.reading > s.patience {
		if float64(s.got) < leastBytesPerSecond*s.reading.Seconds() && err == nil {
			s.giveUp(errStalled)
		}
		s.reading, s.got = 0, 0
	}
	return n, err
}

// note counts n bytes.
func (s *response) note(n int, skipped bool, now time.Time) {
	if n == 0 {
		return
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	fl, l := s.fl, s.fl.l
	fl.position += int64(n)
	if fl.begun.IsZero() {
		fl.begun = now
		l.link.answered(now.Sub(fl.requested))
		if fl.kind != background {
			s.delivering = true
			l.link.deliver(fl.kind, 1)
		}
	} else {
		fl.received += int64(n)
	}
	l.link.count(int64(n), now)
	l.stats.FetchedBytes += int64(n)
	if skipped {
		s.f.metrics.skipped[fl.kind].Add(float64(n))
		return
	}
	s.f.metrics.fetched[fl.kind].Add(float64(n))
	if fl.kind == demand {
		l.stats.DemandBytes += int64(n)
	}
}

// holdBack waits until up to n bytes may be read, and returns how many. A flight that somebody waits for goes
// on at once; another leaves the link to its betters, and the background keeps its limit.
func (s *response) holdBack(n int) (int, error) {
	fl, link := s.fl, s.fl.l.link
	s.f.mu.Lock()
	outranked, calm := link.outranked(fl.kind, time.Now())
	needed, capacity, peers := fl.needed, link.capacity, link.flying[fl.kind]
	s.f.mu.Unlock()
	limited := fl.kind == background && s.f.limit != nil
	if needed || !outranked && !limited {
		return n, nil
	}
	n = min(n, pieceBytes)
	var pause time.Duration
	if outranked {
		if capacity > 0 {
			n = min(n, max(leastPieceBytes, int(capacity*pieceTime.Seconds())))
			pause = time.Duration(float64(n*othersShare*peers) / capacity * float64(time.Second))
		}
		pause = min(max(pause, pieceTime), longestPause)
	}
	if limited {
		r := s.f.limit.ReserveN(time.Now(), n)
		if d := r.Delay(); d > pause {
			pause, calm = d, nil
		}
	}
	if pause == 0 {
		return n, nil
	}
	s.f.mu.Lock()
	fl.paced = true
	s.f.mu.Unlock()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-calm:
	case <-fl.hurry:
	case <-s.ctx.Done():
		return 0, context.Cause(s.ctx)
	}
	return n, nil
}
