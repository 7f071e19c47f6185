package deflate

import (
	"io"
	"math/bits"
)

// A decoding table is indexed by the next bits of input. An entry is
//
//	literal   flagLiteral | byte<<16                 | length of its code
//	length    base<<16    | extra bits<<8            | length of its code
//	distance  base<<16    | extra bits<<8            | length of its code
//	link      flagOther   | flagLink | start of subtable<<16 | bits that index it<<8
//	end       flagOther   | flagEnd                  | length of its code
//	nothing   flagOther   (no code has these bits, or its symbol no meaning)
//
// A link leads to a subtable for codes that are longer than the primary table's
// bits; entries there count the bits behind the primary ones.
const (
	flagLiteral = 1 << 31
	flagOther   = 1 << 15
	flagEnd     = 1 << 14
	flagLink    = 1 << 13

	litLenBits = 11
	distBits   = 9
	maxCode    = 15 // longest code, RFC 1951 section 3.2.7

	// Sizes of a table with all its subtables, from zlib's enough.c: 286 symbols
	// with 11 bits need 2,342, 30 with 9 bits 594.
	litLenEntries = 2400
	distEntries   = 640
)

type (
	literals  [litLenEntries]uint32
	distances [distEntries]uint32
)

// Bases and extra bits, RFC 1951 section 3.2.5.
var (
	litLenMeaning [288]uint32
	distMeaning   [32]uint32
)

func init() {
	for i := range 256 {
		litLenMeaning[i] = flagLiteral | uint32(i)<<16
	}
	litLenMeaning[256] = flagOther | flagEnd
	base := uint32(3)
	for i := range uint32(28) {
		extra := uint32(0)
		if i >= 8 {
			extra = i/4 - 1
		}
		litLenMeaning[257+i] = base<<16 | extra<<8
		base += 1 << extra
	}
	litLenMeaning[285] = 258 << 16
	litLenMeaning[286], litLenMeaning[287] = flagOther, flagOther
	base = 1
	for i := range uint32(30) {
		extra := uint32(0)
		if i >= 2 {
			extra = i/2 - 1
		}
		distMeaning[i] = base<<16 | extra<<8
		base += 1 << extra
	}
	distMeaning[30], distMeaning[31] = flagOther, flagOther
}

// build fills table for codes of the given lengths. It reports whether they make
// a code: complete, or with a single symbol or none at all, as encoders write
// distances that are not used.
func build(table []uint32, primary uint, lengths []uint8, meaning []uint32) bool {
	var count [maxCode + 1]int
	for _, n := range lengths {
		count[n]++
	}
	used := len(lengths) - count[0]
	count[0] = 0
	left := 1
	var next [maxCode + 2]int
	for n := 1; n <= maxCode; n++ {
		left = left<<1 - count[n]
		if left < 0 {
			return false // over-subscribed
		}
		next[n+1] = next[n] + count[n]
	}
	if left > 0 && (used > 1 || used == 1 && count[1] != 1) {
		return false // incomplete
	}
	var sorted [288]uint16
	for symbol, n := range lengths {
		if n > 0 {
			sorted[next[n]] = uint16(symbol)
			next[n]++
		}
	}
	for i := range 1 << primary {
		table[i] = flagOther
	}
	code, free, i := 0, 1<<primary, 0
	link, linkBits := -1, uint(0)
	for n := uint(1); n <= maxCode; n++ {
		for ; count[n] > 0; count[n]-- { // what is left of each length says how large a subtable is
			e := meaning[sorted[i]] | uint32(n)
			i++
			reversed := int(bits.Reverse16(uint16(code)) >> (16 - n))
			code++
			if n <= primary {
				for at := reversed; at < 1<<primary; at += 1 << n {
					table[at] = e
				}
				continue
			}
			e -= uint32(primary)
			if prefix := reversed & (1<<primary - 1); prefix != link {
				link, linkBits = prefix, n-primary
				for room := 1<<linkBits - count[n]; room > 0 && primary+linkBits < maxCode; {
					linkBits++
					room = room<<1 - count[primary+linkBits]
				}
				if free+1<<linkBits > len(table) {
					return false
				}
				table[link] = flagOther | flagLink | uint32(free)<<16 | uint32(linkBits)<<8
				for at := range 1 << linkBits {
					table[free+at] = flagOther
				}
				free += 1 << linkBits
			}
			sub := table[free-1<<linkBits : free]
			for at := reversed >> primary; at < len(sub); at += 1 << (n - primary) {
				sub[at] = e
			}
		}
		code <<= 1
	}
	return true
}

var fixedLengths = func() (l [288 + 32]uint8) {
	for i := range l {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		case i < 288:
			l[i] = 8
		default:
			l[i] = 5
		}
	}
	return l
}()

func (z *Reader) fixed() error {
	build(z.litLen[:], litLenBits, fixedLengths[:288], litLenMeaning[:])
	build(z.dist[:], distBits, fixedLengths[288:], distMeaning[:])
	return nil
}

// codeOrder is the order of the code lengths' code lengths, RFC 1951 section 3.2.7.
var codeOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// codeMeaning gives the code lengths' symbols as they are, as if they were bases.
var codeMeaning = func() (m [19]uint32) {
	for i := range m {
		m[i] = uint32(i) << 16
	}
	return m
}()

// dynamic reads the codes of a block.
func (z *Reader) dynamic() error {
	if err := z.need(14); err != nil {
		return err
	}
	nlit, ndist, ncode := int(z.take(5))+257, int(z.take(5))+1, int(z.take(4))+4
	if nlit > 286 || ndist > 30 {
		return malformed("too many codes in a block")
	}
	var codeLengths [19]uint8
	for _, symbol := range codeOrder[:ncode] {
		if err := z.need(3); err != nil {
			return err
		}
		codeLengths[symbol] = uint8(z.take(3))
	}
	var table [1 << 7]uint32
	if !build(table[:], 7, codeLengths[:], codeMeaning[:]) {
		return malformed("the code lengths' code is not one")
	}
	var lengths [286 + 30]uint8
	for i := 0; i < nlit+ndist; {
		// The code has at most 7 bits, its extra bits are 7: at the input's end there
		// may be fewer, which matters only if they are used.
		if err := z.peek(14); err != nil {
			return err
		}
		e := table[z.bits&(1<<7-1)]
		n := uint(e & 0xff)
		if e&flagOther != 0 {
			return malformed("no such code length")
		}
		extra, repeated, value := uint(0), 1, uint8(0)
		switch symbol := e >> 16; symbol {
		case 16:
			if i == 0 {
				return malformed("a repeated code length without one before it")
			}
			extra, repeated, value = 2, 3, lengths[i-1]
		case 17:
			extra, repeated = 3, 3
		case 18:
			extra, repeated = 7, 11
		default:
			value = uint8(symbol)
		}
		if z.nb < n+extra {
			return io.ErrUnexpectedEOF
		}
		z.take(n)
		repeated += int(z.take(extra))
		if i+repeated > nlit+ndist {
			return malformed("too many code lengths")
		}
		for range repeated {
			lengths[i] = value
			i++
		}
	}
	if lengths[256] == 0 {
		return malformed("a block without an end")
	}
	if !build(z.litLen[:], litLenBits, lengths[:nlit], litLenMeaning[:]) {
		return malformed("the literals' code is not one")
	}
	if !build(z.dist[:], distBits, lengths[nlit:nlit+ndist], distMeaning[:]) {
		return malformed("the distances' code is not one")
	}
	return nil
}
