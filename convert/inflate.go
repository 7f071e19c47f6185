package convert

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"accel/internal/deflate"

	"github.com/klauspost/compress/zstd"
)

const (
	// sourceBufferBytes is read from the source at once, and what isCandidate may
	// look at.
	sourceBufferBytes = 256 << 10
	// maxZstdWindowBytes is what zstd itself accepts without --long=31.
	maxZstdWindowBytes = 128 << 20
)

var (
	gzipMagic = []byte{0x1f, 0x8b, 0x08}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
	// zstdSkippable is a skippable frame's magic after its first byte, 0x50-0x5f.
	zstdSkippable = []byte{0x2a, 0x4d, 0x18}
)

// formatError marks an error of the bytes themselves, which reading them again
// would not mend; an error of the reader below is never one.
type formatError struct{ error }

func (e formatError) Unwrap() error { return e.error }

func malformed(format string, args ...any) error {
	return formatError{fmt.Errorf(format, args...)}
}

// source is a layer's blob as it is read. It remembers the error of the reader
// below, so that this can be told from one of the decoder above, and counts.
type source struct {
	*bufio.Reader
	r     io.Reader
	n     int64
	err   error
	count func(total int64) // may be nil
}

func newSource(r io.Reader, count func(total int64)) *source {
	s := &source{r: r, count: count}
	s.Reader = bufio.NewReaderSize(below{s}, sourceBufferBytes)
	return s
}

// below is the part of a source under its buffer.
type below struct{ s *source }

func (b below) Read(p []byte) (int, error) {
	n, err := b.s.r.Read(p)
	b.s.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		b.s.err = err
	}
	if b.s.count != nil && n > 0 {
		b.s.count(b.s.n)
	}
	return n, err
}

// explain turns an error of the decoder into the one that caused it.
func (s *source) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case s.err != nil:
		return s.err
	default:
		return formatError{err}
	}
}

// drain reads on to the end, where the blob's digest is checked.
func (s *source) drain() error {
	_, err := io.Copy(io.Discard, s.Reader)
	return err
}

// tarStream is what s inflates to. Its end is s's end too.
func (s *source) tarStream() (*inflated, error) {
	zr, err := newInflater(s.Reader)
	if err != nil {
		return nil, s.explain(err)
	}
	return &inflated{s: s, zr: zr}, nil
}

type inflated struct {
	s  *source
	zr io.ReadCloser
}

func (i *inflated) Read(p []byte) (int, error) {
	n, err := i.zr.Read(p)
	return n, i.ended(err)
}

// Close gives the decoder back. Nothing can be lost by it.
func (i *inflated) Close() { _ = i.zr.Close() }

// ended looks behind the end of the stream.
func (i *inflated) ended(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF):
		if derr := i.s.drain(); derr != nil {
			return derr
		}
		return err
	default:
		return i.s.explain(err)
	}
}

// next fills b, with matches where the stream's form tells them. It and Read do
// not mix.
func (i *inflated) next(b *aheadBlock) error {
	b.matches = b.matches[:0]
	if z, ok := i.zr.(*gunzipper); ok {
		data, matches, err := z.Next()
		b.n = copy(b.data, data)
		b.matches = append(b.matches, matches...)
		return i.ended(err)
	}
	b.n = 0
	for b.n < len(b.data) { // not io.ReadFull: its io.ErrUnexpectedEOF is what a decoder says of a truncated stream
		n, err := i.Read(b.data[b.n:])
		b.n += n
		if err != nil {
			return err
		}
	}
	return nil
}

// gunzipper is a deflate.Reader that has nothing to close.
type gunzipper struct{ *deflate.Reader }

func (gunzipper) Close() error { return nil }

// newInflater gives the tar stream of a layer in any of the compressions that
// image layers come in, told by its first bytes and never by its media type
// (registries are full of wrong ones).
func newInflater(br *bufio.Reader) (io.ReadCloser, error) {
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		return &gunzipper{deflate.NewReader(br)}, nil
	case bytes.Equal(head, zstdMagic), len(head) == 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:], zstdSkippable):
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindowBytes))
		if err != nil {
			return nil, err
		}
		return zr.IOReadCloser(), nil
	default:
		return io.NopCloser(br), nil
	}
}

// Read-ahead between the inflating goroutine and the parsing one.
const aheadBlocks = 6

// aheadBlock is a piece of the tar stream.
type aheadBlock struct {
	data    []byte
	n       int             // of data
	matches []deflate.Match // that data[:n] is made of; none: not known
}

// ahead is a bounded queue of blocks. The goroutine that calls fill is ahead of
// the one that calls Read.
type ahead struct {
	ctx        context.Context
	full, free chan *aheadBlock
	block      *aheadBlock // being read
	rest       []byte      // of block
	trace      deflate.Trace
	err        error // set before full is closed

	// matches, if not nil, gets what the bytes that are read from now on are made of.
	matches *[]deflate.Match
}

func newAhead(ctx context.Context) *ahead {
	a := &ahead{ctx: ctx, full: make(chan *aheadBlock, aheadBlocks), free: make(chan *aheadBlock, aheadBlocks)}
	for range aheadBlocks {
		a.free <- nil
	}
	return a
}

// fill inflates src to its end. Its error, or each's, is what Read returns then.
func (a *ahead) fill(src *source, each func(n int64) error) (err error) {
	defer func() {
		a.err = err
		if err == nil {
			a.err = io.EOF
		}
		close(a.full)
	}()
	r, err := src.tarStream()
	if err != nil {
		return err
	}
	defer r.Close()
	for {
		var b *aheadBlock
		select {
		case b = <-a.free:
		case <-a.ctx.Done():
			return context.Cause(a.ctx)
		}
		if b == nil {
			b = &aheadBlock{data: make([]byte, deflate.MaxPieceBytes)}
		}
		rerr := r.next(b)
		if b.n > 0 {
			if err := each(int64(b.n)); err != nil {
				return err
			}
			select {
			case a.full <- b:
			case <-a.ctx.Done():
				return context.Cause(a.ctx)
			}
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.block != nil {
			a.free <- a.block // never blocks: there are no more blocks than places
			a.block = nil
		}
		select {
		case b, ok := <-a.full:
			if !ok {
				return 0, a.err
			}
			a.block, a.rest, a.trace = b, b.data[:b.n], deflate.NewTrace(b.matches)
		case <-a.ctx.Done():
			return 0, context.Cause(a.ctx)
		}
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	if a.matches != nil {
		*a.matches = a.trace.Take(*a.matches, n)
	} else {
		a.trace.Skip(n)
	}
	return n, nil
}
