package prefetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"syscall"
	"time"
)

// batchBytes of members are read, compressed, for one goroutine to inflate.
const batchBytes = 512 << 10

// nextRequest is the next run of members that is worth a request; from equals to where there is none.
func (f *Filler) nextRequest(fl *flight) (from, to int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := fl.l
	if l.unranged && !fl.whole {
		return 0, 0, errReplaced
	}
	if fl.whole {
		for m := fl.next; m < fl.end; m++ {
			if !l.present(m) {
				return fl.next, fl.end, nil
			}
		}
		fl.next = fl.end
		return 0, 0, nil
	}
	for fl.next < fl.end && l.present(fl.next) {
		fl.next++
	}
	if fl.next == fl.end {
		return 0, 0, nil
	}
	bridge := l.link.bridge()
	_, reached := l.span(fl.next)
	to = fl.next + 1
	for m := to; m < fl.end; m++ {
		offset, after := l.span(m)
		if offset-reached > bridge {
			break
		}
		if !l.present(m) {
			reached, to = after, m+1
		}
	}
	return fl.next, to, nil
}

// request brings [from, to) by one request.
func (f *Filler) request(ctx context.Context, fl *flight, from, to int) error {
	l := fl.l
	offset, _ := l.span(from)
	_, end := l.span(to - 1)
	length := end - offset
	if fl.whole {
		offset, length = 0, -1
	}
	f.mu.Lock()
	fl.requested, fl.begun, fl.position, fl.received, fl.paced = time.Now(), time.Time{}, offset, 0, false
	patience := l.link.patience(f.o.StallPatience)
	f.mu.Unlock()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := newResponse(ctx, f, fl, patience, cancel)
	defer s.end()
	body, err := s.open(offset, length)
	if err == nil {
		defer body.Close()
		err = f.drain(ctx, fl, s, to)
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	if errors.Is(err, ErrUnranged) && !fl.whole {
		if err := f.loseRanges(fl); err != nil {
			return err
		}
		return f.makeRoom(fl)
	}
	if err != nil {
		return fmt.Errorf("layer %s, bytes from %d: %w", l.digest, offset, err)
	}
	return nil
}

// loseRanges turns fl into the one flight that brings all of its layer, unless there is one.
func (f *Filler) loseRanges(fl *flight) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := fl.l
	l.unranged = true
	for _, other := range l.flights {
		if other.whole {
			fl.end = fl.next
			return errReplaced
		}
	}
	f.log.Info("the registry knows no ranges, so the layer is fetched as a whole", "layer", l.digest)
	fl.whole, fl.must, fl.first, fl.next, fl.end, fl.until = true, 0, 0, 0, l.members, l.members
	return nil
}

// drain reads the members before to from the stream, batch by batch.
func (f *Filler) drain(ctx context.Context, fl *flight, s *response, to int) error {
	depth := make(chan struct{}, min(runtime.GOMAXPROCS(0), 8)+1)
	for {
		b, gap := f.nextBatch(fl, to)
		if b == nil {
			return nil
		}
		if err := s.skip(gap); err != nil {
			f.finish(fl, b)
			return err
		}
		if err := f.fill(ctx, fl, s, b, depth); err != nil {
			return err
		}
	}
}

// fill reads one batch and has it inflated: as it comes where somebody waits for it, else when it
// is there, so that goroutines that hold a core do not wait for the network.
func (f *Filler) fill(ctx context.Context, fl *flight, s *response, b *batch, depth chan struct{}) error {
	buffers := fl.l.link.buffers[fl.kind]
	weight := min(b.memoryBytes(fl.l), backgroundBufferBytes)
	select {
	case depth <- struct{}{}:
	case <-ctx.Done():
		f.finish(fl, b)
		return context.Cause(ctx)
	}
	if err := buffers.Acquire(ctx, weight); err != nil {
		<-depth
		f.finish(fl, b)
		return err
	}
	b.buf = grab(int(b.bytes))
	f.mu.Lock()
	urgent := fl.needed
	f.mu.Unlock()
	inflate := func() {
		fl.inflight.Go(func() {
			defer func() { <-depth }()
			defer buffers.Release(weight)
			if !urgent {
				select {
				case f.cores <- struct{}{}:
					defer func() { <-f.cores }()
				case <-fl.hurry:
				}
			}
			f.decode(fl, b)
		})
	}
	if urgent {
		inflate()
		err := s.readInto(b)
		b.fail(err)
		return err
	}
	if err := s.readInto(b); err != nil {
		drop(b.buf)
		buffers.Release(weight)
		<-depth
		f.finish(fl, b)
		return err
	}
	inflate()
	return nil
}

// noSpace reports whether err says that the disk is full.
func noSpace(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// unexpected turns the end of a stream into an error.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
