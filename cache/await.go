package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"accel"
)

// errPass tells a Reader to go on without the cache.
var errPass = errors.New("served without caching")

// await returns how many bytes from r.pos on are in the file for r, when there are any. It
// begins a fill where nobody brings them. io.EOF at the end; errPass when r has to go on
// without the cache.
func (r *Reader) await() (int64, error) {
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		n, f, err := r.next()
		if n > 0 && r.file == nil && !r.ensure {
			err = r.openFile()
		}
		if err != nil {
			return 0, err
		}
		if n > 0 {
			return n, nil
		}
		if err := r.wait(); err != nil {
			return 0, err
		}
		if f != nil && f.done && f.err != nil {
			if err := r.failed(f); err != nil {
				return 0, err
			}
		}
	}
}

// next is one look at what there is for r: so many bytes, or a fill to wait for, or neither, then
// some other change has to come. s.mu is held.
func (r *Reader) next() (int64, *fill, error) {
	b := r.b
	switch {
	case r.pos >= r.end && !r.closed:
		return 0, nil, io.EOF // also when the client has all and has gone
	case r.closed || r.ctx.Err() != nil:
		return 0, nil, r.closedError()
	case b.gone != nil:
		return 0, nil, r.lost(b.gone)
	}
	limit := r.end
	if r.whole && !b.complete {
		limit = max(b.size-heldBytes, 0)
	}
	if n := b.available(r.pos, limit); n > 0 {
		return n, nil, nil
	}
	part := r.pos / partBytes
	if r.pos >= limit { // only the check is lacking, and what it needs
		part = b.firstMissing(0)
	}
	f, err := r.bringer(part)
	return 0, f, err
}

// bringer is the fill that r has to wait for, begun where there is none.
func (r *Reader) bringer(part int64) (*fill, error) {
	s, b, l := r.s, r.b, r.b.live
	last := partsOf(b.size)
	if part == last {
		if l.verifying || len(l.fills) > 0 {
			return nil, nil
		}
		return s.startFill(r, last, last)
	}
	f := b.owner(part)
	may := r.fetcher != nil && len(l.fills) < maxBlobFills
	if f != nil && may && !r.low && !l.unranged && part-f.next > jumpBytes/partBytes {
		f.end = part // too far ahead to wait for it: the rest is whoever's who wants it next
		f = nil
	}
	if f != nil {
		if !r.low {
			s.setLow(f, false)
		}
		return f, nil
	}
	switch {
	case r.fetcher == nil:
		return nil, r.missing()
	case !may:
		return nil, nil
	}
	f, err := s.startFill(r, part, (r.end+partBytes-1)/partBytes)
	if err == nil {
		r.mine = append(r.mine, f)
	}
	return f, err
}

// wait waits for a change of the blob; s.mu is let go meanwhile.
func (r *Reader) wait() error {
	changed := r.b.change()
	r.s.mu.Unlock()
	defer r.s.mu.Lock()
	select {
	case <-changed:
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

// failed says what the failure of the fill that r waited for means to r: nil, another try.
func (r *Reader) failed(f *fill) error {
	if f.b.gone != nil {
		return r.lost(f.b.gone)
	}
	var local localError
	switch {
	case errors.As(f.err, &local):
		return r.orPass(local.error)
	case errors.Is(f.err, ErrClosed):
		return f.err
	case f.idled:
		return nil // it was dropped for want of a reader just before r came
	case f.by != r && (errors.Is(f.err, accel.ErrUnauthenticated) || errors.Is(f.err, accel.ErrForbidden)):
		return nil // another's credential
	default:
		return f.err
	}
}

// lost says what it means to r that its blob was dropped.
func (r *Reader) lost(why error) error {
	if errors.Is(why, ErrDigest) {
		return why
	}
	return r.orPass(why)
}

// orPass returns errPass where r can do without the cache.
func (r *Reader) orPass(why error) error {
	if r.fetcher == nil || r.ensure {
		return why
	}
	r.passErr = why
	return errPass
}

// openFile opens the file that a fill made; s.mu is let go meanwhile.
func (r *Reader) openFile() error {
	at := r.pos
	r.s.mu.Unlock()
	file, err := openSized(r.s.path(r.desc.Digest), os.O_RDONLY, r.desc.SizeBytes)
	if err == nil {
		_, err = file.Seek(at, io.SeekStart)
	}
	r.s.mu.Lock()
	switch {
	case err == nil && !r.closed:
		r.file = file
		return nil
	case file != nil:
		file.Close()
	}
	if r.closed {
		return r.closedError()
	}
	return r.orPass(fmt.Errorf("open blob %s: %w", r.desc.Digest, err))
}

// closedError is what a Reader says that nobody wants any more. s.mu is held.
func (r *Reader) closedError() error {
	if r.closed {
		return fmt.Errorf("%w: read of blob %s after Close", os.ErrClosed, r.desc.Digest)
	}
	return context.Cause(r.ctx)
}
