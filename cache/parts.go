package cache

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

const (
	// partBytes is what the index marks: small enough that a crash or a range costs
	// little, large enough that 100 GB are 100,000 bits.
	partBytes = 1 << 20
	// maxBlobBytes bounds the bitmap that a descriptor from outside can ask for (128 KiB).
	maxBlobBytes = 1 << 40
)

func partsOf(sizeBytes int64) int64 { return (sizeBytes + partBytes - 1) / partBytes }

// bitmap marks parts of a blob.
type bitmap []uint64

func newBitmap(parts int64) bitmap { return make(bitmap, (parts+63)/64) }

func (m bitmap) has(part int64) bool { return m[part/64]&(1<<(part%64)) != 0 }
func (m bitmap) set(part int64)      { m[part/64] |= 1 << (part % 64) }

func (m bitmap) count() (n int64) {
	for _, w := range m {
		n += int64(bits.OnesCount64(w))
	}
	return n
}

func (m bitmap) bytes(parts int64) []byte {
	b := make([]byte, 0, len(m)*8)
	for _, w := range m {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b[:(parts+7)/8]
}

func bitmapOf(b []byte, parts int64) (bitmap, error) {
	if int64(len(b)) != (parts+7)/8 {
		return nil, fmt.Errorf("%w: %d bytes mark %d parts", ErrDamaged, len(b), parts)
	}
	m := newBitmap(parts)
	var word [8]byte
	for i := range m {
		clear(word[:])
		copy(word[:], b[i*8:])
		m[i] = binary.LittleEndian.Uint64(word[:])
	}
	if over := parts % 64; over != 0 && m[len(m)-1]>>over != 0 {
		return nil, fmt.Errorf("%w: a part behind the blob's end is marked", ErrDamaged)
	}
	return m, nil
}

func (m bitmap) unset(part int64) { m[part/64] &^= 1 << (part % 64) }

func fullBitmap(parts int64) bitmap {
	m := newBitmap(parts)
	for part := range parts {
		m.set(part)
	}
	return m
}
