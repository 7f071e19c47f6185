package deflate

import (
	"encoding/binary"
	"io"
)

// peek has up to n bits ready, n at most 32: fewer at the input's end.
func (z *Reader) peek(n uint) error {
	for z.nb < n {
		if err := z.fill(1); err != nil {
			return err
		}
		if z.pos >= z.end {
			return nil
		}
		z.bits |= uint64(z.in[z.pos]) << z.nb
		z.pos++
		z.nb += 8
	}
	return nil
}

// compressed inflates until the block ends or the output is full.
//
// Input is taken eight bytes at a time, and may be looked at up to slackBytes
// beyond its end, where zeros are; whether more was used than is there is checked
// after every round.
func (z *Reader) compressed() error {
	for z.wpos < windowBytes+outBytes {
		if err := z.fill(slackBytes); err != nil {
			return err
		}
		before, found, matched := z.wpos, z.found, z.matched
		ended, err := z.round()
		over := z.pos - z.end // bytes from behind the input's end that are in bits
		if over > int(z.nb/8) {
			// Some of the round's output may be made of them.
			z.wpos, z.found, z.matched = before, found, matched
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		if ended {
			if over > 0 {
				z.nb -= uint(over * 8)
				z.bits &= 1<<z.nb - 1
				z.pos = z.end
			}
			z.state = blockHeader
			return nil
		}
	}
	return nil
}

// round inflates for as long as there is input and room for output.
func (z *Reader) round() (ended bool, err error) {
	in, out := &z.in, &z.out
	pos, wpos, start := z.pos, z.wpos, z.start
	buf, nb := z.bits, z.nb
	matches, found, matched := z.matches, z.found, z.matched
	lastIn, lastOut := z.end-16, windowBytes+outBytes
	if z.eof {
		lastIn = z.end + 8
	}
	for wpos < lastOut && pos <= lastIn {
		// 56 bits at the least: enough for two literals, or for a length with its
		// distance (15+5+15+13 bits).
		buf |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
		pos += int(63-nb) >> 3
		nb |= 56

		e := z.litLen[buf&(1<<litLenBits-1)]
		if e&flagLiteral != 0 {
			buf >>= e & 63
			nb -= uint(e & 0xff)
			out[wpos] = byte(e >> 16)
			wpos++
			if e = z.litLen[buf&(1<<litLenBits-1)]; e&flagLiteral != 0 {
				buf >>= e & 63
				nb -= uint(e & 0xff)
				out[wpos] = byte(e >> 16)
				wpos++
				if e = z.litLen[buf&(1<<litLenBits-1)]; e&flagLiteral != 0 {
					buf >>= e & 63
					nb -= uint(e & 0xff)
					out[wpos] = byte(e >> 16)
					wpos++
					continue
				}
			}
			buf |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
			pos += int(63-nb) >> 3
			nb |= 56
		}
		if e&flagOther != 0 {
			if e&flagLink != 0 {
				buf >>= litLenBits
				nb -= litLenBits
				e = z.litLen[e>>16+uint32(buf)&(1<<(e>>8&15)-1)]
				if e&flagLiteral != 0 {
					buf >>= e & 63
					nb -= uint(e & 0xff)
					out[wpos] = byte(e >> 16)
					wpos++
					continue
				}
			}
			if e&flagEnd != 0 {
				buf >>= e & 63
				nb -= uint(e & 0xff)
				ended = true
				break
			}
			if e&flagOther != 0 {
				err = malformed("no such literal or length")
				break
			}
		}
		buf >>= e & 63
		nb -= uint(e & 0xff)
		length := int(e>>16) + int(buf&(1<<(e>>8&31)-1))
		buf >>= e >> 8 & 31
		nb -= uint(e >> 8 & 31)

		e = z.dist[buf&(1<<distBits-1)]
		if e&flagOther != 0 {
			if e&flagLink != 0 {
				buf >>= distBits
				nb -= distBits
				e = z.dist[e>>16+uint32(buf)&(1<<(e>>8&15)-1)]
			}
			if e&flagOther != 0 {
				err = malformed("no such distance")
				break
			}
		}
		buf >>= e & 63
		nb -= uint(e & 0xff)
		dist := int(e>>16) + int(buf&(1<<(e>>8&31)-1))
		buf >>= e >> 8 & 31
		nb -= uint(e >> 8 & 31)

		from := wpos - dist
		if from < start {
			err = malformed("a match reaches back before the start")
			break
		}
		to := wpos + length
		if matches != nil {
			literals := wpos - matched
			if literals > maxLiterals {
				matches[found] = flagAlone | Match(literals)
				found++
				literals = 0
			}
			matches[found] = copied(literals, length, dist)
			found++
			matched = to
		}
		if dist >= 8 {
			// Eight bytes at a time; what is written too much is written over again.
			for {
				binary.LittleEndian.PutUint64(out[wpos:], binary.LittleEndian.Uint64(out[from:]))
				wpos += 8
				from += 8
				if wpos >= to {
					break
				}
			}
		} else {
			for wpos < to {
				out[wpos] = out[from]
				wpos++
				from++
			}
		}
		wpos = to
	}
	z.pos, z.wpos = pos, wpos
	z.bits, z.nb = buf&(1<<nb-1), nb
	z.found, z.matched = found, matched
	return ended, err
}
