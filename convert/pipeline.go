package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"

	"accel/internal/deflate"

	"golang.org/x/sync/errgroup"
)

const (
	// batchBytes of the tar stream go to a compressing goroutine together: enough
	// to make the handing over of small files cost nothing, small enough for many
	// cores to share one layer. It has no part in the output's bytes.
	batchBytes = 256 << 10
	// headersBytes bounds what a member holds after its chunk, which is padding
	// and the headers of entries without content.
	headersBytes = 256 << 10
	// maxBatches bounds a layer's batches, and so its memory, on machines with
	// more cores than one inflating goroutine can feed.
	maxBatches = 24
)

// chunk is one run of a file's bytes in the blob.
type chunk struct {
	offset int64 // of its gzip member
	digest sum
}

// batch is a part of the tar stream, cut into gzip members. A chunk always
// begins a member, which lets a reader inflate it alone; what follows it up to
// the next chunk (padding, headers) lies in the same member, as in the stock
// library's output.
type batch struct {
	in      []byte
	matches []deflate.Match
	members []member
	out     bytes.Buffer
	done    chan error // one value when compressed
}

type member struct {
	start int    // in batch.in
	chunk int    // bytes of the chunk that it begins with; 0: it has headers only
	known [2]int // from where to where batch.matches are the chunk's, none: not known
	sum   sum    // of the chunk
	out   int    // place in batch.out
}

// compress makes the gzip members. One compressor gives the same bytes for the
// same member whatever it did before.
func (b *batch) compress(w *deflate.Writer) error {
	b.out.Reset()
	for i := range b.members {
		m := &b.members[i]
		data := b.in[m.start:]
		if i+1 < len(b.members) {
			data = b.in[m.start:b.members[i+1].start]
		}
		if m.chunk > 0 {
			m.sum = sha256.Sum256(data[:m.chunk])
		}
		m.out = b.out.Len()
		if err := w.Member(&b.out, data, b.matches[m.known[0]:m.known[1]]); err != nil {
			return err
		}
	}
	return nil
}

// layout is the middle of a layer's pipeline. The parsing goroutine writes the
// tar stream to it and says where chunks begin; batches are compressed on all
// cores; Run lays them out in order.
type layout struct {
	ctx   context.Context
	group *errgroup.Group
	conv  *Converter

	cur    *batch
	free   chan *batch // empty ones; nil: one that is still to be made
	order  chan *batch
	diffID hash.Cloner // of all that was written
	n      int64       // bytes written
	chunks int         // begun

	blob *blob
}

func newLayout(ctx context.Context, group *errgroup.Group, c *Converter, b *blob) *layout {
	n := min(2*c.Workers+2, maxBatches)
	l := &layout{
		ctx: ctx, group: group, conv: c, blob: b,
		free: make(chan *batch, n), order: make(chan *batch, n),
		diffID: newHash(),
	}
	for range n {
		l.free <- nil
	}
	return l
}

// newHash is a SHA-256 that can be cloned, as the standard library's can.
func newHash() hash.Cloner { return sha256.New().(hash.Cloner) }

// cloneHash goes on from where h is.
func cloneHash(h hash.Cloner) hash.Cloner {
	c, err := h.Clone()
	if err != nil {
		panic(err) // documented: only where the hash wraps one that cannot be cloned
	}
	return c
}

// begin starts a gzip member with a chunk of n bytes, or with headers (0).
func (l *layout) begin(n int) error {
	if l.cur != nil && len(l.cur.in) >= batchBytes {
		if err := l.flush(); err != nil {
			return err
		}
	}
	if l.cur == nil {
		var b *batch
		select {
		case b = <-l.free:
		case <-l.ctx.Done():
			return context.Cause(l.ctx)
		}
		if b == nil {
			b = &batch{done: make(chan error, 1), in: make([]byte, 0, batchBytes+headersBytes)}
		}
		b.in, b.matches, b.members = b.in[:0], b.matches[:0], b.members[:0]
		l.cur = b
	}
	if n > 0 {
		l.chunks++
	}
	l.cur.members = append(l.cur.members, member{start: len(l.cur.in), chunk: n})
	return nil
}

// Write adds headers and padding to the member.
func (l *layout) Write(p []byte) (int, error) {
	if l.cur == nil || l.memberLen() >= headersBytes {
		if err := l.begin(0); err != nil {
			return 0, err
		}
	}
	l.cur.in = append(l.cur.in, p...)
	l.wrote(p)
	return len(p), nil
}

// memberLen is the length of the open member without its chunk.
func (l *layout) memberLen() int {
	m := l.cur.members[len(l.cur.members)-1]
	return len(l.cur.in) - m.start - m.chunk
}

// readChunk begins a member with a chunk of n bytes and reads those from r. They
// come straight from stream, if that is not nil, which tells what matches they are
// made of.
func (l *layout) readChunk(r io.Reader, n int, stream *ahead) ([]byte, error) {
	if err := l.begin(n); err != nil {
		return nil, err
	}
	b := l.cur
	at := len(b.in)
	b.in = append(b.in, make([]byte, n)...)
	p := b.in[at:]
	if stream != nil {
		stream.matches = &b.matches
		defer func() { stream.matches = nil }()
	}
	m := &b.members[len(b.members)-1]
	m.known[0] = len(b.matches)
	if _, err := io.ReadFull(r, p); err != nil {
		return nil, err
	}
	m.known[1] = len(b.matches)
	l.wrote(p)
	return p, nil
}

func (l *layout) wrote(p []byte) {
	l.diffID.Write(p)
	l.n += int64(len(p))
}

// flush hands the batch to the compressors.
func (l *layout) flush() error {
	b := l.cur
	l.cur = nil
	if b == nil {
		return nil
	}
	select {
	case l.order <- b: // never blocks: there are no more batches than places
	case <-l.ctx.Done():
		return context.Cause(l.ctx)
	}
	l.group.Go(func() error {
		err := l.conv.compress(l.ctx, b)
		b.done <- err
		return err
	})
	return nil
}

// compress compresses b with one of the converter's compressors, of which there are
// as many as Workers.
func (c *Converter) compress(ctx context.Context, b *batch) error {
	var w *deflate.Writer
	select {
	case w = <-c.slots:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { c.slots <- w }()
	if w == nil {
		var err error
		if w, err = deflate.NewWriter(c.Params.Level); err != nil {
			return err
		}
	}
	return b.compress(w)
}

// close says that the tar stream is over.
func (l *layout) close() error {
	err := l.flush()
	close(l.order)
	return err
}

// Run writes the batches in order until close, and returns the chunks.
func (l *layout) Run() ([]chunk, error) {
	var chunks []chunk
	for {
		var b *batch
		select {
		case b = <-l.order:
		case <-l.ctx.Done():
			return nil, context.Cause(l.ctx)
		}
		if b == nil {
			return chunks, nil
		}
		if err := <-b.done; err != nil {
			return nil, err
		}
		for _, m := range b.members {
			if m.chunk > 0 {
				chunks = append(chunks, chunk{offset: l.blob.n + int64(m.out), digest: m.sum})
			}
		}
		if _, err := l.blob.Write(b.out.Bytes()); err != nil {
			return nil, err
		}
		l.free <- b // never blocks
	}
}

// blob is a layer on its way into a temporary file.
type blob struct {
	f      *os.File
	n      int64
	digest hash.Hash
}

func newBlob(f *os.File) *blob { return &blob{f: f, digest: sha256.New()} }

func (b *blob) Write(p []byte) (int, error) {
	b.digest.Write(p)
	n, err := b.f.Write(p)
	b.n += int64(n)
	if err != nil {
		return n, fmt.Errorf("spill a converted layer: %w", err)
	}
	return n, nil
}
