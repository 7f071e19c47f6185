package bundle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"accel"

	"github.com/opencontainers/go-digest"
)

// ErrFormat: it is no bundle, or one out of bounds. It wraps accel.ErrInvalid.
var ErrFormat = fmt.Errorf("%w: malformed boot bundle", accel.ErrInvalid)

// magic has the version of the form at its end.
const magic = "accelbb1"

// prefixBytes are the magic and the head's two lengths.
const prefixBytes = int64(len(magic)) + 8

// Bounds of what a bundle may demand in memory.
const (
	maxHeadBytes = 8 << 20 // packed or not
	maxLayers    = 512
	maxChunks    = 1 << 18
	// maxChunkBytes is the largest chunk that package convert makes; a frame has several or one.
	maxChunkBytes = 16 << 20
	maxFrameBytes = 32 << 20
	// maxBytes bounds any sum, so that it does not overflow.
	maxBytes = 1 << 40
)

// Layer is a layer's table of contents in a bundle.
type Layer struct {
	TOCDigest digest.Digest // of the JSON
	TOCBytes  int64
}

// Chunk is one chunk in a bundle. Where it begins in the layer's blob, and in what the gzip member there
// inflates to, tells it from all others of the layer.
type Chunk struct {
	Layer                   int
	BlobOffset, InnerOffset int64
	Bytes                   int64
}

// Frame is some chunks that are packed together.
type Frame struct {
	PackedBytes, Bytes int64
	Chunks             []Chunk
}

// head is all that stands before the TOCs.
type head struct {
	layers []Layer
	// Of the TOCs: sumsBytes of digests, then textBytes that packedText inflates to.
	sumsBytes, packedText, textBytes int64
	frames                           []Frame
}

func formatError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// encode gives the head as it is before it is packed. Chunks are told by the distance from the one before of their
// layer.
func (h *head) encode() ([]byte, error) {
	b := binary.AppendUvarint(nil, uint64(len(h.layers)))
	for _, l := range h.layers {
		sum, err := rawDigest(l.TOCDigest)
		if err != nil {
			return nil, err
		}
		b = binary.AppendUvarint(append(b, sum...), uint64(l.TOCBytes))
	}
	for _, n := range []int64{h.sumsBytes, h.packedText, h.textBytes, int64(len(h.frames))} {
		b = binary.AppendUvarint(b, uint64(n))
	}
	last := make([]int64, len(h.layers))
	for _, f := range h.frames {
		b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(f.PackedBytes)), uint64(len(f.Chunks)))
		for _, c := range f.Chunks {
			b = binary.AppendUvarint(b, uint64(c.Layer))
			b = binary.AppendVarint(b, c.BlobOffset-last[c.Layer])
			b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(c.InnerOffset)), uint64(c.Bytes))
			last[c.Layer] = c.BlobOffset
		}
	}
	return b, nil
}

// decodeHead is the inverse of encode, within the bounds.
func decodeHead(b []byte) (*head, error) {
	s := &scanner{b: b}
	h := &head{}
	for range s.uint("layers", maxLayers) {
		sum := s.bytes(32)
		h.layers = append(h.layers, Layer{TOCDigest: digest.NewDigestFromBytes(digest.SHA256, sum), TOCBytes: s.uint("bytes of a TOC", maxBytes)})
	}
	h.sumsBytes = s.uint("bytes of digests", maxBytes)
	h.packedText, h.textBytes = s.uint("bytes of TOCs", maxBytes), s.uint("bytes of TOCs", maxBytes)
	last := make([]int64, len(h.layers))
	left := int64(maxChunks)
	for range s.uint("frames", maxChunks) {
		f := Frame{PackedBytes: s.uint("bytes of a frame", 2*maxFrameBytes)}
		n := s.uint("chunks", left)
		left -= n
		for range n {
			c := Chunk{Layer: int(s.uint("layer", int64(len(last))-1))}
			step := s.int()
			c.InnerOffset, c.Bytes = s.uint("inner offset", maxBytes), s.uint("bytes of a chunk", maxChunkBytes)
			if s.err != nil {
				return nil, s.err
			}
			if c.BlobOffset = last[c.Layer] + step; step > maxBytes || step < -maxBytes || c.BlobOffset < 0 || c.BlobOffset > maxBytes || c.Bytes == 0 {
				return nil, formatError("a chunk of %d bytes at %d", c.Bytes, c.BlobOffset)
			}
			last[c.Layer] = c.BlobOffset
			f.Bytes += c.Bytes
			f.Chunks = append(f.Chunks, c)
		}
		if s.err != nil {
			return nil, s.err
		}
		if n == 0 || f.PackedBytes == 0 || f.Bytes > maxFrameBytes {
			return nil, formatError("a frame of %d bytes and %d chunks", f.Bytes, n)
		}
		h.frames = append(h.frames, f)
	}
	if s.err == nil && len(s.b) > 0 {
		s.fail("%d bytes behind the head", len(s.b))
	}
	return h, s.err
}

// sizeBytes is what follows the head.
func (h *head) sizeBytes() int64 {
	n := h.sumsBytes + h.packedText
	for _, f := range h.frames {
		n += f.PackedBytes
	}
	return n
}

// scanner reads numbers until the first error.
type scanner struct {
	b   []byte
	err error
}

func (s *scanner) fail(format string, args ...any) {
	if s.err == nil {
		s.err = formatError(format, args...)
		s.b = nil
	}
}

// uint is a number up to most; 0 after an error.
func (s *scanner) uint(what string, most int64) int64 {
	v, n := binary.Uvarint(s.b)
	if n <= 0 || v > math.MaxInt64 || int64(v) > most {
		s.fail("%s: %d, at most %d", what, v, most)
		return 0
	}
	s.b = s.b[n:]
	return int64(v)
}

func (s *scanner) int() int64 {
	v, n := binary.Varint(s.b)
	if n <= 0 {
		s.fail("a number that ends early")
		return 0
	}
	s.b = s.b[n:]
	return v
}

func (s *scanner) bytes(n int) []byte {
	if len(s.b) < n {
		s.fail("it ends early")
		return make([]byte, n)
	}
	b := s.b[:n]
	s.b = s.b[n:]
	return b
}

var errDigest = errors.New("not a SHA-256 digest")
