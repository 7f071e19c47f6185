package meter

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
)

// total is an exact sum of 128 bits: bytes times nanoseconds do not fit in 64, and a sum
// of floats would depend on the order in which pulls are reported. With the bounds of
// Validate it holds 2^28 of the largest products.
type total struct{ hi, lo uint64 }

func (t *total) add(o total) {
	var carry uint64
	t.lo, carry = bits.Add64(t.lo, o.lo, 0)
	t.hi, _ = bits.Add64(t.hi, o.hi, carry)
}

func (t *total) addNumber(n int64) { t.add(total{lo: uint64(n)}) }

func (t *total) addProduct(a, b int64) {
	hi, lo := bits.Mul64(uint64(a), uint64(b))
	t.add(total{hi, lo})
}

// times is t n times, n at least 0.
func (t total) times(n int64) total {
	hi, lo := bits.Mul64(t.lo, uint64(n))
	return total{hi + t.hi*uint64(n), lo}
}

// totalOf is f without its fraction; f is at least 0, and cut at 2^127.
func totalOf(f float64) total {
	f = min(f, 1<<127)
	hi := math.Floor(f / (1 << 64))
	return total{uint64(hi), uint64(f - hi*(1<<64))}
}

func (t total) float() float64 { return float64(t.hi)*(1<<64) + float64(t.lo) }

// number is t, or the largest int64 where it is more than that.
func (t total) number() int64 {
	if t.hi > 0 || t.lo > math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(t.lo)
}

// encode is t without leading zeros; empty for zero.
func (t total) encode() []byte {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], t.hi)
	binary.BigEndian.PutUint64(b[8:], t.lo)
	skip := (bits.LeadingZeros64(t.hi)) / 8
	if t.hi == 0 {
		skip = 8 + bits.LeadingZeros64(t.lo)/8
	}
	return b[skip:]
}

func decodeTotal(raw []byte) (total, error) {
	var b [16]byte
	if len(raw) > len(b) {
		return total{}, fmt.Errorf("%w: a sum of %d bytes", ErrDamaged, len(raw))
	}
	copy(b[len(b)-len(raw):], raw)
	return total{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}, nil
}
