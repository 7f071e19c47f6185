package prefetch

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"accel"
	"accel/internal/deflate"
)

// batch is a run of members that lie behind each other in the blob, none of which is there, on their way
// from the network to one goroutine that inflates them.
type batch struct {
	first, end  int // members
	at          int // the one being inflated; guarded by Filler.mu
	base, bytes int64
	buf         []byte // of that many bytes; set when it is their turn

	mu     sync.Mutex
	more   *sync.Cond // on mu; the network's side always adds all, or fails
	filled int
	err    error // why no more come
}

// decoderBytes is what a deflate.Reader takes.
const decoderBytes = 400 << 10

// memoryBytes is what the batch takes until it is inflated.
func (b *batch) memoryBytes(l *layer) int64 {
	most := int64(0)
	for m := b.first; m < b.end; m++ {
		for p, to := l.places(m); p < to; p++ {
			most = max(most, l.Content.Chunk(l.at(p)).Bytes)
		}
	}
	return b.bytes + most + decoderBytes
}

// nextBatch takes fl's next missing members before to; gap is how many bytes come before them. nil: there are
// none.
func (f *Filler) nextBatch(fl *flight, to int) (b *batch, gap int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := fl.l
	to = min(to, fl.end)
	for fl.next < to && l.present(fl.next) {
		fl.next++
	}
	if fl.next >= to {
		return nil, 0
	}
	b = &batch{first: fl.next, at: fl.next}
	b.more = sync.NewCond(&b.mu)
	base, reached := l.span(fl.next)
	m := fl.next + 1
	for ; m < to && !l.present(m); m++ {
		offset, end := l.span(m)
		if offset != reached || end-base > batchBytes {
			break
		}
		reached = end
	}
	b.end, b.base, b.bytes = m, base, reached-base
	fl.next = m
	fl.batches = append(fl.batches, b)
	return b, base - fl.position
}

// finish ends fl's claim to what is left of b.
func (f *Filler) finish(fl *flight, b *batch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b.at = b.end
	for i, other := range fl.batches {
		if other == b {
			fl.batches = append(fl.batches[:i], fl.batches[i+1:]...)
			break
		}
	}
}

// add says that n more bytes are there.
func (b *batch) add(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.filled += n
	b.more.Broadcast()
}

// fail says that no more bytes come, where err is one.
func (b *batch) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
	b.more.Broadcast()
}

// landed waits until the network's side writes into buf no more.
func (b *batch) landed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.filled < len(b.buf) && b.err == nil {
		b.more.Wait()
	}
}

// torn is why bytes before end never came; nil where they did.
func (b *batch) torn(end int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if int64(b.filled) < end {
		return b.err
	}
	return nil
}

// section reads a part of b, and waits for what is not there yet.
type section struct {
	b       *batch
	at, end int64
}

func (s *section) Read(p []byte) (int, error) {
	if s.at == s.end {
		return 0, io.EOF
	}
	b := s.b
	b.mu.Lock()
	for int64(b.filled) <= s.at && b.err == nil {
		b.more.Wait()
	}
	filled, err := int64(b.filled), b.err
	b.mu.Unlock()
	if filled <= s.at {
		return 0, err
	}
	n := copy(p, b.buf[s.at:min(filled, s.end)])
	s.at += int64(n)
	return n, nil
}

var (
	decoders = sync.Pool{New: func() any { return deflate.NewReader(nil) }}
	buffers  = sync.Pool{New: func() any { return new([]byte) }}
)

// grab returns n bytes of whatever content, to be given back by drop.
func grab(n int) []byte {
	b := *buffers.Get().(*[]byte)
	if cap(b) < n {
		b = make([]byte, n, max(n, pieceBytes))
	}
	return b[:n]
}

func drop(b []byte) {
	if c := cap(b); c > 0 && c <= maxPooledBytes {
		buffers.Put(&b)
	}
}

// maxPooledBytes: what few layers need is not kept.
const maxPooledBytes = 8 << 20

// decode puts the chunks of b.
func (f *Filler) decode(fl *flight, b *batch) {
	z := decoders.Get().(*deflate.Reader)
	var data []byte // the chunk's, used again
	defer func() {
		z.Reset(nil)
		decoders.Put(z)
		drop(data)
		f.finish(fl, b)
		// What ended us may have ended us early, and the rest of the members is still being read into buf.
		b.landed()
		drop(b.buf)
	}()
	for m := b.first; m < b.end; m++ {
		bad, err := f.inflate(fl.l, b, m, z, &data)
		if err != nil {
			f.fallShort(fl, m, err)
			return
		}
		f.settle(fl, b, m, bad)
	}
}

// inflate puts the chunks of one member. bad is what is wrong with one that came, err what keeps the rest from
// coming.
func (f *Filler) inflate(l *layer, b *batch, m int, z *deflate.Reader, data *[]byte) (bad, err error) {
	offset, end := l.span(m)
	offset, end = offset-b.base, end-b.base
	z.Reset(&section{b: b, at: offset, end: end})
	var last accel.Chunk // whose bytes data has
	held := false
	for p, to := l.places(m); p < to; p++ {
		i := l.at(p)
		if l.Content.Has(i) {
			continue
		}
		c := l.Content.Chunk(i)
		if !held || !sameInside(c, last) {
			skip := c.InnerOffset
			if held {
				skip -= last.InnerOffset + last.Bytes
			}
			if err := read(z, skip, c.Bytes, data); err != nil {
				if torn := b.torn(end); torn != nil {
					return nil, torn
				}
				f.metrics.corrupt.Inc()
				return fmt.Errorf("chunk %d: %w", i, err), nil
			}
			last, held = c, true
		}
		switch err := f.put(l, i, c, *data); {
		case errors.Is(err, ErrCorrupt):
			f.metrics.corrupt.Inc()
			bad = err
		case err != nil:
			return nil, err
		default:
			f.arrived(l, i, c.Bytes)
		}
	}
	return bad, nil
}

// read makes data the n bytes of r that come after skip others.
func read(r io.Reader, skip, n int64, data *[]byte) error {
	if int64(cap(*data)) < n {
		drop(*data)
		*data = grab(int(n))
	}
	*data = (*data)[:n]
	if _, err := io.CopyN(io.Discard, r, skip); err != nil {
		return unexpected(err)
	}
	_, err := io.ReadFull(r, *data)
	return unexpected(err)
}

// fallShort deals with what ended a batch at member m. Where the network did, the flight says so to who waits; a
// failure of ours ends the flight, and the wait for m.
func (f *Filler) fallShort(fl *flight, m int, err error) {
	var local localError
	if !errors.As(err, &local) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failMember(fl.l, m, err)
	fl.cancel(err)
}

// put gives a chunk to Content, after room was made once more where there was none. ErrCorrupt where it is not what its digest says.
func (f *Filler) put(l *layer, i int, c accel.Chunk, data []byte) error {
	err := l.Content.Put(i, data)
	if err == nil {
		return nil
	}
	if sha256.Sum256(data) != c.Digest {
		return fmt.Errorf("%w: layer %s, chunk %d", ErrCorrupt, l.digest, i)
	}
	if noSpace(err) && l.Reserve != nil {
		if release, again := l.Reserve(c.Bytes); again == nil {
			err = l.Content.Put(i, data)
			if release != nil {
				release()
			}
		}
	}
	if err != nil {
		return localError{fmt.Errorf("layer %s, chunk %d: %w", l.digest, i, err)}
	}
	return nil
}

// settle ends the work at member m. The first time that it came wrong it is fetched again where somebody waits for it, the
// second time he gets an error.
func (f *Filler) settle(fl *flight, b *batch, m int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b.at = m + 1
	l := fl.l
	if err == nil {
		delete(l.bad, m)
		return
	}
	if !errors.Is(err, ErrCorrupt) {
		err = fmt.Errorf("%w: layer %s, %w", ErrCorrupt, l.digest, err)
	}
	if l.bad == nil {
		l.bad = map[int]badMember{}
	}
	bad, known := l.bad[m]
	if !known && len(l.bad) >= maxBad {
		for other := range l.bad {
			delete(l.bad, other)
			break
		}
	}
	if bad.tries++; bad.tries == 1 {
		f.log.Warn("corrupt content came and will be fetched again", "layer", l.digest, "err", err)
		l.bad[m] = bad
		for w := range l.waiters {
			w.lookAgain(nil)
		}
		return
	}
	f.log.Error("corrupt content came again", "layer", l.digest, "err", err)
	now := time.Now()
	l.bad[m] = badMember{until: now.Add(badTTL), quiet: now.Add(badQuiet)}
	f.failMember(l, m, err)
}
