package convert

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"accel/internal/gunzip"

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
func (s *source) tarStream() (io.ReadCloser, error) {
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
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		if derr := i.s.drain(); derr != nil {
			err = derr
		}
	default:
		err = i.s.explain(err)
	}
	return n, err
}

func (i *inflated) Close() error { return i.zr.Close() }

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
		return io.NopCloser(gunzip.NewReader(br)), nil
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
const (
	aheadBlockBytes = 512 << 10
	aheadBlocks     = 4
)

// ahead is a bounded queue of blocks. The goroutine that calls fill is ahead of
// the one that calls Read.
type ahead struct {
	ctx        context.Context
	full, free chan []byte
	block      []byte // being read
	rest       []byte // of block
	err        error  // set before full is closed
}

func newAhead(ctx context.Context) *ahead {
	a := &ahead{ctx: ctx, full: make(chan []byte, aheadBlocks), free: make(chan []byte, aheadBlocks)}
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
		var b []byte
		select {
		case b = <-a.free:
		case <-a.ctx.Done():
			return context.Cause(a.ctx)
		}
		if b == nil {
			b = make([]byte, aheadBlockBytes)
		}
		n, rerr := readBlock(r, b[:aheadBlockBytes])
		if n > 0 {
			if err := each(int64(n)); err != nil {
				return err
			}
			select {
			case a.full <- b[:n]:
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

// readBlock is io.ReadFull without its own io.ErrUnexpectedEOF, which is what a
// decoder says of a truncated stream.
func readBlock(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
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
			a.block, a.rest = b, b
		case <-a.ctx.Done():
			return 0, context.Cause(a.ctx)
		}
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}
