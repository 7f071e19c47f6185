package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"accel"
)

// heldBytes at the end of a blob are given to a Reader of the whole only when the
// digest was checked. Any number would do: a client that lacks the end has an error.
const heldBytes = 64 << 10

// Reader gives a range of one blob to one client. It is not for concurrent use, but
// Close may come at any time.
type Reader struct {
	s       *Store
	ctx     context.Context
	cancel  context.CancelFunc
	desc    accel.BlobDescriptor
	fetcher Fetcher
	low     bool
	ensure  bool // there is no client: nothing is read
	whole   bool // from 0 to the end
	end     int64

	b       *blob    // nil where the store does not keep this one
	file    *os.File // for this Reader alone: sendfile moves its position
	had     bitmap   // parts that were there at the beginning
	hadAll  bool
	mine    []*fill  // begun for this Reader
	passErr error    // why the cache is passed by
	passing *passing // nil while it is not

	// streaming is held while passing is used: Close waits for it.
	streaming sync.Mutex

	// Guarded by Store.mu:
	pos    int64
	tally  accel.Tally
	closed bool
}

// OpenBlob returns a Reader of bytes [offset, offset+length) of b, to the end where
// length is negative or goes beyond it. What is not there is fetched by f, once for all who wait for it; f may
// be nil: accel.ErrNotFound then, here or from Read. b.SizeBytes may be negative where
// the store knows the blob (accel.ErrNotFound otherwise). accel.ErrInvalid for an offset outside of the blob, a
// malformed digest, or a size that is not that of the checked content. ctx bounds the Reader's life: waits end with it.
func (s *Store) OpenBlob(ctx context.Context, b accel.BlobDescriptor, offset, length int64, f Fetcher) (*Reader, error) {
	return (&Reader{s: s, desc: b, fetcher: f}).open(ctx, offset, length)
}

func (r *Reader) open(ctx context.Context, offset, length int64) (*Reader, error) {
	desc := r.desc
	if _, err := keyOf(desc.Digest); err != nil {
		return nil, err
	}
	if desc.SizeBytes > maxBlobBytes {
		return nil, fmt.Errorf("%w: blob %s of %d bytes, more than %d", accel.ErrInvalid, desc.Digest, desc.SizeBytes, int64(maxBlobBytes))
	}
	if isEmpty(desc) {
		r.desc.SizeBytes = 0
	} else if desc.SizeBytes == 0 {
		return nil, fmt.Errorf("%w: blob %s is not empty", ErrDigest, desc.Digest)
	} else if err := r.attach(); err != nil {
		return nil, err
	}
	size := r.desc.SizeBytes
	r.pos, r.end = offset, size
	if length >= 0 && length < size-offset {
		r.end = offset + length
	}
	r.whole = offset == 0 && r.end == size
	r.ctx, r.cancel = context.WithCancel(ctx)
	var err error
	switch {
	case offset < 0 || offset > size:
		err = fmt.Errorf("%w: bytes from %d of blob %s, which has %d", accel.ErrInvalid, offset, desc.Digest, size)
	case r.b == nil && size > 0 && r.ensure:
		err = fmt.Errorf("%w: blob %s is being brought as one of another size", accel.ErrConflict, desc.Digest)
	case r.b == nil && size > 0:
		err = r.startPass()
	case r.fetcher == nil && !r.allThere():
		err = r.missing()
	case r.file != nil:
		_, err = r.file.Seek(offset, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// isEmpty reports whether d is the digest of nothing, which needs no place.
func isEmpty(d accel.BlobDescriptor) bool {
	return d.SizeBytes <= 0 && d.Digest == d.Digest.Algorithm().FromBytes(nil)
}

func (r *Reader) missing() error {
	return fmt.Errorf("%w: blob %s is not here, or not all that was asked for", accel.ErrNotFound, r.desc.Digest)
}

// allThere reports whether the range is in the file.
func (r *Reader) allThere() bool {
	if r.b == nil {
		return true
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.b.gone == nil && r.b.available(r.pos, r.end) == r.end-r.pos
}

// attach finds or makes the blob, counts r as its reader and opens the file where there is one.
func (r *Reader) attach() error {
	s := r.s
	for {
		b, err := r.find()
		if err != nil || b == nil {
			return err
		}
		if !r.hadAll && r.had.count() == 0 {
			return nil // the file will be made
		}
		file, err := openSized(s.path(b.digest), os.O_RDONLY, b.size)
		if err == nil {
			r.file = file
			return nil
		}
		tooMany := errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
		if !tooMany {
			s.lose(&b.item, fmt.Errorf("%w: blob %s: %w", ErrDamaged, b.digest, err))
		}
		s.mu.Lock()
		r.leave()
		s.mu.Unlock()
		r.b, r.had, r.hadAll = nil, nil, false
		if tooMany {
			return fmt.Errorf("open blob %s: %w", b.digest, err)
		}
	}
}

// find is attach without the file. Nil: the store does not keep this one for r.
func (r *Reader) find() (*blob, error) {
	s, desc := r.s, &r.desc
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	b := s.blobs[desc.Digest]
	if b != nil && desc.SizeBytes >= 0 && b.size != desc.SizeBytes {
		switch {
		case b.complete:
			return nil, fmt.Errorf("%w: blob %s has %d bytes, not %d", accel.ErrInvalid, b.digest, b.size, desc.SizeBytes)
		case b.busy() || r.fetcher == nil:
			return nil, nil // one of the two sizes is a lie; which, the digest will tell
		default:
			s.dropNow(&b.item, fmt.Errorf("%w: its size is disputed", ErrDamaged))
			b = nil
		}
	}
	if b == nil {
		if desc.SizeBytes < 0 || r.fetcher == nil {
			return nil, r.missing()
		}
		b = newBlob(desc.Digest, desc.SizeBytes, s.nextSeq())
		s.addBlob(b)
	}
	desc.SizeBytes = b.size
	b.usedAt, b.touched = s.o.Now().UnixNano(), true
	if b.complete && !r.ensure {
		b.visited = true
	}
	b.alive().readers++
	r.b, r.hadAll, r.had = b, b.complete, slices.Clone(b.parts)
	return b, nil
}

// leave takes r away from its blob. Fills that nobody waits for any more give way to
// others. s.mu is held.
func (r *Reader) leave() {
	b := r.b
	if b == nil {
		return
	}
	l := b.live
	if l.readers--; l.readers == 0 {
		l.idleSince = time.Now()
		for _, f := range l.fills {
			r.s.setLow(f, true)
		}
	}
	b.wake() // a Read that waits
	r.s.release(b)
}

// SizeBytes is the size of the whole blob.
func (r *Reader) SizeBytes() int64 { return r.desc.SizeBytes }

// Read implements io.Reader. Errors are those of the Fetcher, ErrDigest, ErrDamaged, ErrClosed.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.passing == nil {
		n, err := r.await()
		if err == nil {
			k, err := r.file.Read(p[:min(int64(len(p)), n)])
			r.given(int64(k))
			if err != nil {
				err = r.fileError(err)
			}
			return k, err
		}
		if !errors.Is(err, errPass) {
			return 0, err
		}
	}
	return r.readPassing(p)
}

// WriteTo implements io.WriterTo: what is there goes from the file to a socket by sendfile, where w
// (as an http.ResponseWriter with its Content-Length set does) implements io.ReaderFrom.
func (r *Reader) WriteTo(w io.Writer) (total int64, err error) {
	var buf []byte
	if _, ok := w.(io.ReaderFrom); !ok {
		b := buffers.Get().(*[]byte)
		defer buffers.Put(b)
		buf = *b
	}
	for r.passing == nil {
		n, err := r.await()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if errors.Is(err, errPass) {
			break
		}
		if err != nil {
			return total, err
		}
		k, err := io.CopyBuffer(w, &io.LimitedReader{R: r.file, N: n}, buf)
		r.given(k)
		total += k
		if err != nil {
			return total, err
		}
		if k < n {
			return total, r.fileError(io.ErrUnexpectedEOF)
		}
	}
	n, err := r.writePassing(w)
	return total + n, err
}

// fileError drops the blob, whose file cannot be read.
func (r *Reader) fileError(err error) error {
	err = fmt.Errorf("%w: blob %s: %w", ErrDamaged, r.desc.Digest, err)
	if !r.isClosed() {
		r.s.lose(&r.b.item, err)
	}
	return err
}

func (r *Reader) isClosed() bool {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.closed
}

// given counts n bytes that the client got from the file.
func (r *Reader) given(n int64) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.hadAll {
		r.tally.CacheBytes += n
		r.pos += n
		return
	}
	for n > 0 {
		part := r.pos / partBytes
		k := min(n, r.b.partEnd(part)-r.pos)
		switch f := r.began(part); {
		case r.had.has(part):
			r.tally.CacheBytes += k
		case f == nil:
			r.tally.SharedBytes += k
		case f.peer:
			r.tally.PeerBytes += k
		default:
			r.tally.RegistryBytes += k
		}
		r.pos += k
		n -= k
	}
}

// began returns the fill that was begun for r and brought the part.
func (r *Reader) began(part int64) *fill {
	for _, f := range r.mine {
		if part >= f.first && (part < f.next || (part == f.next && f.shown > part*partBytes)) {
			return f
		}
	}
	return nil
}

// Close ends the reading. A fill goes on by its rule.
func (r *Reader) Close() error {
	r.s.mu.Lock()
	if r.closed {
		r.s.mu.Unlock()
		return nil
	}
	r.closed = true
	r.leave()
	file := r.file
	r.s.mu.Unlock()
	r.cancel()
	r.streaming.Lock() // ends with the context
	r.endStream()
	r.streaming.Unlock()
	r.s.m.read(r.Tally())
	if file != nil {
		return file.Close()
	}
	return nil
}

// Tally is what was given so far, by where it came from; also after Close.
func (r *Reader) Tally() accel.Tally {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.tally
}
