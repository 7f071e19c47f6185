package bundle

import (
	"encoding/binary"
	"fmt"

	"accel"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

const (
	// A frame is packed, sent and checked as one: the larger, the less it takes on the network (of 89 MB that a Python
	// application reads 31.2, 29.6 and 28.0 MB in frames of 256 KiB, 1 and 4 MiB), and the longer waits who
	// needs its first chunk. The first frames are small and each is twice as large as the one before.
	firstFrameBytes = 64 << 10
	mostFrameBytes  = 1 << 20
	// windowBytes is what the encoder looks back over: no frame is larger, but for a chunk that is.
	windowBytes = 8 << 20
)

// ErrTooLarge: not even the tables of contents fit. It wraps accel.ErrInvalid.
var ErrTooLarge = fmt.Errorf("%w: the boot bundle would be too large", accel.ErrInvalid)

// write makes a bundle of at most mostBytes: chunks that do not fit are left out from the first such one on. Equal input
// gives equal bytes.
func write(tocs [][]byte, chunks []Chunk, read func(Chunk) ([]byte, error), mostBytes int64) (b []byte, h *head, err error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(windowBytes), zstd.WithEncoderCRC(false), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, nil, err
	}
	defer enc.Close() //nolint:errcheck // nothing was streamed
	h = &head{}
	var text, sums []byte
	for _, t := range tocs {
		h.layers = append(h.layers, Layer{TOCDigest: digest.FromBytes(t), TOCBytes: int64(len(t))})
		if text, sums, err = splitDigests(t, text, sums); err != nil {
			return nil, nil, err
		}
	}
	body := enc.EncodeAll(text, sums)
	h.sumsBytes, h.packedText, h.textBytes = int64(len(sums)), int64(len(body)-len(sums)), int64(len(text))
	text = nil //nolint:ineffassign,wastedassign // it may be large, and packing takes long

	var frame Frame
	var data []byte
	// end packs the frame. It reports whether that still fits.
	end := func() bool {
		was := len(body)
		body = enc.EncodeAll(data, body)
		frame.PackedBytes = int64(len(body) - was)
		h.frames = append(h.frames, frame)
		frame, data = Frame{}, data[:0]
		if int64(len(body)) <= mostBytes-prefixBytes-headRoom(h) {
			return true
		}
		body, h.frames = body[:was], h.frames[:len(h.frames)-1]
		return false
	}
	if int64(len(body)) > mostBytes-prefixBytes-headRoom(h) {
		return nil, nil, fmt.Errorf("%w: its tables of contents have %d bytes", ErrTooLarge, len(body))
	}
	limit, fits := int64(firstFrameBytes), true
	for _, c := range chunks {
		if frame.Bytes > 0 && frame.Bytes+c.Bytes > limit {
			if fits = end(); !fits {
				break
			}
			limit = min(2*limit, mostFrameBytes)
		}
		content, err := read(c)
		if err != nil {
			return nil, nil, err
		}
		data = append(data, content...)
		frame.Chunks, frame.Bytes = append(frame.Chunks, c), frame.Bytes+c.Bytes
	}
	if fits && frame.Bytes > 0 {
		end()
	}
	plain, err := h.encode()
	if err != nil {
		return nil, nil, err
	}
	packed := enc.EncodeAll(plain, nil)
	if len(plain) > maxHeadBytes || len(packed) > maxHeadBytes {
		return nil, nil, fmt.Errorf("%w: its head has %d bytes", ErrTooLarge, len(plain))
	}
	out := make([]byte, 0, int(prefixBytes)+len(packed)+len(body))
	out = append(out, magic...)
	out = binary.BigEndian.AppendUint32(out, uint32(len(packed)))
	out = binary.BigEndian.AppendUint32(out, uint32(len(plain)))
	return append(append(out, packed...), body...), h, nil
}

// headRoom is more than the head takes.
func headRoom(h *head) int64 {
	n := int64(64 + 48*len(h.layers) + 16*len(h.frames))
	for _, f := range h.frames {
		n += 24 * int64(len(f.Chunks))
	}
	return n
}
