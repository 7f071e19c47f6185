package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
)

const tarBlock = 512

var zeroes [tarBlock]byte

// padding is what a tar has after n bytes to fill the block.
func padding(n int64) int { return int(-n & (tarBlock - 1)) }

// recorder is what archive/tar reads from. It keeps the bytes of headers, so
// that they can be laid out as they were, whatever dialect they are in.
type recorder struct {
	r       io.Reader
	n       int64
	err     error  // of r
	holding bool   // between entries
	hold    []byte // what was read while holding
	// source is the source's DiffID from where the output begins to differ; nil
	// before that, where the output's is both.
	source hash.Cloner
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	if r.holding {
		r.hold = append(r.hold, p[:n]...)
	}
	if r.source != nil {
		r.source.Write(p[:n])
	}
	return n, err
}

// scan turns a layer's tar stream into the output's, in one pass and byte by
// byte the same but for these: a sparse file becomes one whose holes are written
// out, as a chunk must lie in the stream as a reader wants it; whatever follows
// the last entry (the end marker, garbage) goes; the landmark comes there, and
// the TOC after it.
type scan struct {
	rec        recorder
	tr         *tar.Reader
	stream     *ahead // that rec reads from; nil: entries come in another order than the source's
	out        *layout
	tree       *tree
	chunkBytes int64
	holes      func(n int64) error // counts the bytes that sparse files' holes become
	entries    int
	// landmark is one that the stream brings along, after the prioritized entries;
	// empty where finish makes the one that says that there are none.
	landmark string
}

func newScan(stream *ahead, out *layout, chunkBytes int64, holes func(int64) error) *scan {
	s := &scan{rec: recorder{r: stream}, stream: stream, out: out, tree: newTree(), chunkBytes: chunkBytes, holes: holes}
	s.tr = tar.NewReader(&s.rec)
	return s
}

// Run reads to the end of the stream. It returns the source's DiffID.
func (s *scan) Run() (sum, error) {
	afterSparse := false
	last := "" // name, for errors
	for {
		s.rec.hold, s.rec.holding = s.rec.hold[:0], true
		pad := padding(s.rec.n)
		h, err := s.tr.Next()
		s.rec.holding = false
		raw := s.rec.hold
		pad = min(pad, len(raw))
		if afterSparse {
			raw, pad = raw[pad:], 0 // the output has its own padding there
		}
		if errors.Is(err, io.EOF) {
			if _, err := s.out.Write(raw[:pad]); err != nil {
				return sum{}, err
			}
			return s.finish(raw[pad:])
		}
		if err != nil {
			return sum{}, s.explain(err, "header after entry %q", last)
		}
		last = h.Name
		if afterSparse = isSparse(h); !afterSparse {
			_, err = s.out.Write(raw)
		} else if _, err = s.out.Write(raw[:pad]); err == nil {
			s.fork(raw[pad:])
			err = s.rewrite(h)
		}
		if err != nil {
			return sum{}, err
		}
		if err := s.entry(h); err != nil {
			return sum{}, err
		}
	}
}

// fork begins to hash the source apart from the output. rest was read from the
// source and is not in the output.
func (s *scan) fork(rest []byte) {
	if s.rec.source == nil {
		s.rec.source = cloneHash(s.out.diffID)
		s.rec.source.Write(rest)
	}
}

func (s *scan) rewrite(h *tar.Header) error {
	if err := tar.NewWriter(s.out).WriteHeader(whole(h)); err != nil {
		return malformed("sparse file %q cannot be written as a whole one: %w", h.Name, err)
	}
	return nil
}

// entry notes a header and lays out its content.
func (s *scan) entry(h *tar.Header) error {
	e, err := newEntry(h, s.entries)
	if e == nil || err != nil {
		return err
	}
	if s.entries++; s.entries > maxEntries {
		return &accel.Rejection{Rule: "format.max_entries", Detail: fmt.Sprintf("a layer has more than %d entries", maxEntries)}
	}
	if err := e.checkNames(); err != nil {
		return err
	}
	if e.kind == tar.TypeReg {
		stream := s.stream
		if isSparse(h) {
			stream = nil
		}
		if err := s.content(e, s.tr, stream); err != nil {
			return err
		}
		if isSparse(h) {
			if _, err := s.out.Write(zeroes[:padding(s.out.n)]); err != nil {
				return err
			}
		}
	}
	if name := clean(e.name); reserved[name] && name != s.landmark {
		return nil // left over from an earlier conversion; the TOC has its own
	}
	return s.tree.add(e)
}

// content lays out a file's chunks. It comes from r, and straight from stream if
// that is not nil.
func (s *scan) content(e *entry, r io.Reader, stream *ahead) error {
	e.firstChunk = s.out.chunks
	whole := sha256.New() // a file of one chunk has that chunk's digest
	for at := int64(0); at < e.size; {
		n := min(s.chunkBytes, e.size-at)
		before := s.rec.n
		p, err := s.out.readChunk(r, int(n), stream)
		if err != nil {
			return s.explain(err, "content of %q at byte %d of %d", e.name, at, e.size)
		}
		if e.size > s.chunkBytes {
			whole.Write(p)
		}
		at += n
		if holes := n - (s.rec.n - before); holes > 0 && r == io.Reader(s.tr) {
			if err := s.holes(holes); err != nil {
				return err
			}
		}
	}
	whole.Sum(e.content[:0])
	return nil
}

// finish ends the output, with a landmark where the stream had none.
func (s *scan) finish(rest []byte) (sum, error) {
	s.fork(rest)
	if _, err := io.Copy(io.Discard, &s.rec); err != nil {
		return sum{}, err
	}
	if _, err := s.out.Write(zeroes[:padding(s.out.n)]); err != nil { // a source may lack the last one
		return sum{}, err
	}
	if s.landmark == "" {
		if err := s.noPrefetch(); err != nil {
			return sum{}, err
		}
	}
	if err := s.tree.finish(); err != nil {
		return sum{}, err
	}
	var source sum
	s.rec.source.Sum(source[:0])
	return source, s.out.close()
}

// noPrefetch writes the landmark that says that nothing needs to be fetched
// ahead. The stock library has it in front; snapshotters look it up by name, and
// here it lets source and output share one pass of SHA-256.
func (s *scan) noPrefetch() error {
	mark := &tar.Header{Name: estargz.NoPrefetchLandmark, Typeflag: tar.TypeReg, Size: 1}
	if err := tar.NewWriter(s.out).WriteHeader(mark); err != nil {
		return err
	}
	e := &entry{name: mark.Name, kind: tar.TypeReg, size: 1, seq: s.entries}
	if err := s.content(e, bytes.NewReader([]byte{0xf}), nil); err != nil {
		return err
	}
	if _, err := s.out.Write(zeroes[:padding(s.out.n)]); err != nil {
		return err
	}
	return s.tree.add(e)
}

// explain tells an error of the stream below from one of the tar.
func (s *scan) explain(err error, format string, args ...any) error {
	switch {
	case s.rec.err != nil:
		return s.rec.err
	case s.out.ctx.Err() != nil:
		return context.Cause(s.out.ctx)
	default:
		return malformed("tar: %s: %w", fmt.Sprintf(format, args...), err)
	}
}
