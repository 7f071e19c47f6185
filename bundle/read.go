package bundle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Limits are how much a bundle may make of itself; what says that it has more is ErrFormat. 0 allows nothing.
type Limits struct {
	TOCBytes     int64 // JSON of all layers
	ContentBytes int64 // chunks of all frames
}

// Reader reads a bundle from its beginning to its end. Unpack may be called by many at once, all else by one.
type Reader struct {
	r    io.Reader
	head *head
	next int // frame
	zstd *zstd.Decoder
}

// NewReader reads the head of a bundle of sizeBytes, and no further. The error wraps ErrFormat, or is r's. Close the
// Reader.
func NewReader(r io.Reader, sizeBytes int64, limits Limits) (_ *Reader, err error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, err
	}
	b := &Reader{r: r, zstd: z}
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	var prefix [prefixBytes]byte
	if _, err := io.ReadFull(r, prefix[:]); err != nil {
		return nil, short(err)
	}
	if string(prefix[:len(magic)]) != magic {
		return nil, formatError("it begins with %q", prefix[:len(magic)])
	}
	packedBytes, plainBytes := int64(binary.BigEndian.Uint32(prefix[len(magic):])), int64(binary.BigEndian.Uint32(prefix[len(magic)+4:]))
	if packedBytes > maxHeadBytes || plainBytes > maxHeadBytes || packedBytes > sizeBytes-prefixBytes {
		return nil, formatError("a head of %d bytes, packed as %d", plainBytes, packedBytes)
	}
	plain, err := b.inflate(packedBytes, plainBytes)
	if err != nil {
		return nil, err
	}
	if b.head, err = decodeHead(plain); err != nil {
		return nil, err
	}
	return b, b.head.check(sizeBytes-prefixBytes-packedBytes, limits)
}

// check compares the head with what is known otherwise.
func (h *head) check(bodyBytes int64, limits Limits) error {
	if n := h.sizeBytes(); n != bodyBytes {
		return formatError("%d bytes follow its head, which says %d", bodyBytes, n)
	}
	var tocs, content int64
	for _, l := range h.layers {
		if tocs += l.TOCBytes; l.TOCBytes > limits.TOCBytes || tocs > limits.TOCBytes {
			return formatError("TOCs of more than %d bytes", limits.TOCBytes)
		}
	}
	if h.textBytes > tocs || h.sumsBytes > tocs {
		return formatError("TOCs of %d bytes in %d and %d", tocs, h.textBytes, h.sumsBytes)
	}
	for _, f := range h.frames {
		if content += f.Bytes; content > limits.ContentBytes {
			return formatError("content of more than %d bytes", limits.ContentBytes)
		}
	}
	return nil
}

// Layers are those whose TOCs are in the bundle, in the order that chunks number them by.
func (b *Reader) Layers() []Layer { return b.head.layers }

// Frames are all frames, in their order.
func (b *Reader) Frames() []Frame { return b.head.frames }

// TOCs reads the tables of contents, which come first. The caller checks their digests.
func (b *Reader) TOCs() ([][]byte, error) {
	sums := make([]byte, b.head.sumsBytes)
	if _, err := io.ReadFull(b.r, sums); err != nil {
		return nil, short(err)
	}
	text, err := b.inflate(b.head.packedText, b.head.textBytes)
	if err != nil {
		return nil, err
	}
	tocs := make([][]byte, len(b.head.layers))
	for i, l := range b.head.layers {
		if tocs[i], text, sums, err = joinDigests(text, sums, l.TOCBytes); err != nil {
			return nil, err
		}
	}
	if len(text) > 0 || len(sums) > 0 {
		return nil, formatError("something behind the TOCs")
	}
	return tocs, nil
}

// Next reads the next frame as it is packed. The error is io.EOF behind the last one, ErrFormat where the stream ends
// early, or the stream's own.
func (b *Reader) Next() (Frame, []byte, error) {
	if b.next == len(b.head.frames) {
		return Frame{}, nil, io.EOF
	}
	f := b.head.frames[b.next]
	packed := make([]byte, f.PackedBytes)
	if _, err := io.ReadFull(b.r, packed); err != nil {
		return f, nil, short(err)
	}
	b.next++
	return f, packed, nil
}

// Unpack gives the bytes of a frame's chunks, one after the other. Whether they are what they should be the caller
// checks. buf is used where it is large enough.
func (b *Reader) Unpack(f Frame, packed, buf []byte) ([]byte, error) {
	if int64(cap(buf)) < f.Bytes {
		buf = make([]byte, f.Bytes)
	}
	out, err := b.zstd.DecodeAll(packed, buf[:0:f.Bytes])
	if err != nil {
		return nil, formatError("a frame: %v", err)
	}
	if int64(len(out)) != f.Bytes {
		return nil, formatError("a frame of %d bytes, not %d", len(out), f.Bytes)
	}
	return out, nil
}

// Close ends what unpacks.
func (b *Reader) Close() { b.zstd.Close() }

// inflate reads packed bytes of the stream, which make so many.
func (b *Reader) inflate(packedBytes, plainBytes int64) ([]byte, error) {
	packed := make([]byte, packedBytes)
	if _, err := io.ReadFull(b.r, packed); err != nil {
		return nil, short(err)
	}
	return b.Unpack(Frame{Bytes: plainBytes}, packed, nil)
}

// short turns the end of the stream into ErrFormat.
func short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends early", ErrFormat)
	}
	return err
}
