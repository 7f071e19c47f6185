package deflate

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"math/bits"

	"github.com/klauspost/compress/flate"
)

const (
	// leastReuse is what matches must be known for, behind the window that is
	// compressed, to be worth blocks of their own.
	leastReuse = 8 << 10
	// leastCopied is the part of it, one in so many, that copies must make up. With
	// fewer of them it is noise, which costs little to compress, or the source did not
	// look for any.
	leastCopied = 4
	// blockSymbols is how many literals and matches share codes, as in zlib.
	blockSymbols = 16 << 10
)

// Writer makes gzip members. Equal members become equal bytes, whatever it made
// before.
type Writer struct {
	z *flate.Writer
	e encoder
}

// NewWriter compresses at klauspost/compress' level, 1 to 9, what it has no
// matches for.
func NewWriter(level int) (*Writer, error) {
	z, err := flate.NewWriter(io.Discard, level)
	return &Writer{z: z}, err
}

// Member appends data as one gzip member. matches say what its first bytes are
// made of, up to 32 KiB of what lies in front of data included; nil: nothing is
// known of them. From byte 32 Ki on they reach bytes of the member itself, and are
// used.
func (w *Writer) Member(to *bytes.Buffer, data []byte, matches []Match) error {
	to.Write([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff})
	err := w.deflate(to, data, matches)
	var end [8]byte
	binary.LittleEndian.PutUint32(end[:], crc32.ChecksumIEEE(data))
	binary.LittleEndian.PutUint32(end[4:], uint32(len(data)))
	to.Write(end[:])
	return err
}

func (w *Writer) deflate(to *bytes.Buffer, data []byte, matches []Match) error {
	known, copied := 0, 0
	for _, m := range matches {
		if m.raw() != 0 {
			known = 0
			break
		}
		literals, length, _ := m.parts()
		known += literals + length
		copied += length
	}
	if known < windowBytes+leastReuse || known > len(data) || copied < known/leastCopied {
		return w.compress(to, data, true)
	}
	if err := w.compress(to, data[:windowBytes], false); err != nil {
		return err
	}
	t := NewTrace(matches)
	t.Skip(windowBytes)
	w.e.blocks(to, data[windowBytes:known], t, known == len(data))
	if known == len(data) {
		return nil
	}
	return w.compress(to, data[known:], true)
}

// compress ends with the last block, or else with a whole byte.
func (w *Writer) compress(to *bytes.Buffer, data []byte, last bool) error {
	w.z.Reset(to)
	if _, err := w.z.Write(data); err != nil {
		return err
	}
	if last {
		return w.z.Close()
	}
	return w.z.Flush()
}

// encoder writes blocks with codes of their own.
type encoder struct {
	matches      []Match // of the block
	litLen, dist code
	lengths      [286 + 30]uint8

	out  []byte
	bits uint64
	nb   uint
}

// blocks writes data, of which t knows all; whole bytes in the end.
func (e *encoder) blocks(to *bytes.Buffer, data []byte, t Trace, last bool) {
	e.bits, e.nb = 0, 0
	for len(data) > 0 {
		n := e.gather(&t, len(data))
		end := n == len(data)
		to.Grow(e.codes(data[:n]))
		e.out = to.AvailableBuffer()
		e.header(last && end)
		e.body(data[:n])
		if end {
			e.align(last)
		}
		to.Write(e.out)
		data = data[n:]
	}
}

// gather takes the next block's matches from t, and returns how many bytes they
// are.
func (e *encoder) gather(t *Trace, limit int) (n int) {
	e.matches = e.matches[:0]
	for symbols := 0; n < limit && symbols < blockSymbols; {
		literals, length, _ := t.rest[0].parts()
		k := literals + length - t.used
		if literals-t.used > blockSymbols {
			k = blockSymbols
		}
		e.matches = t.Take(e.matches, k)
		n += k
		symbols += max(0, literals-t.used) + 1
	}
	return n
}

// align fills the last byte, where an empty stored block is what keeps others
// from following at once.
func (e *encoder) align(last bool) {
	if !last {
		e.put(0, 3)
	}
	for e.nb > 0 {
		e.out = append(e.out, byte(e.bits))
		e.bits >>= 8
		e.nb -= min(e.nb, 8)
	}
	e.bits = 0
	if !last {
		e.out = append(e.out, 0, 0, 0xff, 0xff)
	}
}

// put writes n bits, at most 32.
func (e *encoder) put(v uint32, n uint) {
	e.bits |= uint64(v) << e.nb
	e.nb += n
	for e.nb >= 8 {
		e.out = append(e.out, byte(e.bits))
		e.bits >>= 8
		e.nb -= 8
	}
}

// A length's or distance's symbol, RFC 1951 section 3.2.5. Its extra bits are what
// is left of it without the base.
var (
	lengthSymbol [256]uint16 // by length-3
	lengthExtra  [286]uint8
	lengthBase   [286]uint8 // less 3
	distExtra    [30]uint8
	distBase     [30]uint16 // less 1
)

func init() {
	for symbol := 257; symbol < 285; symbol++ {
		base := int(litLenMeaning[symbol]>>16) - minCopyBytes
		extra := litLenMeaning[symbol] >> 8 & 31
		lengthBase[symbol], lengthExtra[symbol] = uint8(base), uint8(extra)
		for i := range 1 << extra {
			if base+i < 255 {
				lengthSymbol[base+i] = uint16(symbol)
			}
		}
	}
	lengthSymbol[255], lengthBase[285] = 285, 255
	for symbol := range distBase {
		distBase[symbol] = uint16(distMeaning[symbol]>>16 - 1)
		distExtra[symbol] = uint8(distMeaning[symbol] >> 8 & 31)
	}
}

// distSymbol is the symbol of a distance less 1: its highest bits say which.
func distSymbol(d uint32) uint32 {
	if d < 4 {
		return d
	}
	n := uint32(bits.Len32(d))
	return 2*(n-1) + d>>(n-2)&1
}

// codes makes the codes for a block of e.matches, and says how many bytes its
// writing wants room for.
func (e *encoder) codes(data []byte) int {
	var often [286]uint32
	var oftenDist [30]uint32
	for _, m := range e.matches {
		literals, length, distance := m.parts()
		for _, b := range data[:literals] {
			often[b]++
		}
		data = data[literals+length:]
		if length > 0 {
			often[lengthSymbol[length-minCopyBytes]]++
			oftenDist[distSymbol(uint32(distance-1))]++
		}
	}
	often[256] = 1
	e.litLen.make(often[:], maxCode, e.lengths[:286])
	e.dist.make(oftenDist[:], maxCode, e.lengths[286:])
	bits := 0
	for symbol, times := range often {
		bits += int(times) * int(e.lengths[symbol]+lengthExtra[symbol])
	}
	for symbol, times := range oftenDist {
		bits += int(times) * int(e.lengths[286+symbol]+distExtra[symbol])
	}
	const header = (286 + 30 + 19) * 14 / 8 // of at most 7+7 bits each
	return bits/8 + header + 64
}

// body writes the literals and matches, and the end.
func (e *encoder) body(data []byte) {
	acc, nb := e.bits, e.nb // fewer than 8 bits
	out := e.out
	for _, m := range e.matches {
		literals, length, distance := m.parts()
		for _, b := range data[:literals] {
			if nb >= 48 {
				out = binary.LittleEndian.AppendUint64(out, acc)[:len(out)+6]
				acc >>= 48
				nb -= 48
			}
			c := e.litLen[b]
			acc |= uint64(c>>8) << (nb & 63)
			nb += uint(c & 0xff)
		}
		data = data[literals+length:]
		if length == 0 {
			continue
		}
		k := nb / 8
		out = binary.LittleEndian.AppendUint64(out, acc)[:len(out)+int(k)]
		acc >>= k * 8 & 63
		nb &= 7
		// At most 7 + 15+5+15+13 bits.
		symbol := lengthSymbol[length-minCopyBytes]
		c := e.litLen[symbol]
		acc |= uint64(c>>8) << (nb & 63)
		nb += uint(c & 0xff)
		acc |= uint64(length-minCopyBytes-int(lengthBase[symbol])) << (nb & 63)
		nb += uint(lengthExtra[symbol])
		d := uint32(distance - 1)
		symbolD := distSymbol(d)
		c = e.dist[symbolD]
		acc |= uint64(c>>8) << (nb & 63)
		nb += uint(c & 0xff)
		acc |= uint64(d-uint32(distBase[symbolD])) << (nb & 63)
		nb += uint(distExtra[symbolD])
	}
	e.out, e.bits, e.nb = out, acc, nb
	e.put(0, 0)
	c := e.litLen[256]
	e.put(c>>8, uint(c&0xff))
}

// header writes a block's type and its codes, RFC 1951 section 3.2.7.
func (e *encoder) header(last bool) {
	nlit, ndist := 286, 30
	for nlit > 257 && e.lengths[nlit-1] == 0 {
		nlit--
	}
	for ndist > 1 && e.lengths[286+ndist-1] == 0 {
		ndist--
	}
	all := append(append(make([]uint8, 0, 286+30), e.lengths[:nlit]...), e.lengths[286:286+ndist]...)

	// The lengths' symbols, each with its extra bits.
	type step struct{ symbol, extra uint8 }
	steps := make([]step, 0, 286+30)
	for len(all) > 0 {
		n := 1
		for n < len(all) && n < 138 && all[n] == all[0] {
			n++
		}
		switch zero := all[0] == 0; {
		case zero && n >= 11:
			steps = append(steps, step{18, uint8(n - 11)})
		case zero && n >= 3:
			steps = append(steps, step{17, uint8(n - 3)})
		case !zero && n >= 4:
			n = min(n, 7)
			steps = append(steps, step{all[0], 0}, step{16, uint8(n - 4)})
		default:
			n = 1
			steps = append(steps, step{all[0], 0})
		}
		all = all[n:]
	}
	var often [19]uint32
	for _, s := range steps {
		often[s.symbol]++
	}
	var c code
	var lengths [19]uint8
	c.make(often[:], 7, lengths[:])
	ncode := len(codeOrder)
	for ncode > 4 && lengths[codeOrder[ncode-1]] == 0 {
		ncode--
	}
	final := uint32(0)
	if last {
		final = 1
	}
	e.put(final|2<<1, 3)
	e.put(uint32(nlit-257)|uint32(ndist-1)<<5|uint32(ncode-4)<<10, 14)
	for _, symbol := range codeOrder[:ncode] {
		e.put(uint32(lengths[symbol]), 3)
	}
	for _, s := range steps {
		e.put(c[s.symbol]>>8, uint(c[s.symbol]&0xff))
		switch s.symbol {
		case 16:
			e.put(uint32(s.extra), 2)
		case 17:
			e.put(uint32(s.extra), 3)
		case 18:
			e.put(uint32(s.extra), 7)
		}
	}
}
