// Package deflate reads gzip files (RFC 1952, RFC 1951) and writes parts of them
// anew as members of their own.
//
// Reader inflates faster than the libraries do, by looking at the input eight
// bytes at a time, which readers that must not read past the end of a stream
// cannot. Package convert inflates every layer with it: a layer's inflating cannot
// be shared among cores, and bounds a conversion's time. It also tells what matches
// the stream is made of. Finding those is nearly all the work of compressing, and
// Writer takes them over wherever they do not reach out of the new member: that
// leaves the codes to be made, and a member's first 32 KiB to be compressed.
package deflate

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// ErrFormat is wrapped by all errors of malformed input. A stream that ends early
// is an io.ErrUnexpectedEOF.
var ErrFormat = errors.New("gzip: malformed")

func malformed(what string) error { return fmt.Errorf("%w: %s", ErrFormat, what) }

const (
	windowBytes = 32 << 10 // RFC 1951: the farthest that a match reaches back
	outBytes    = 256 << 10
	inBytes     = 64 << 10
	// slackBytes lie behind the buffers' ends, so that eight bytes can be read or
	// written where fewer are meant: a match's 258 and two times eight.
	slackBytes = 288
	// maxMatches in a piece: copies of three bytes, literals or bytes of a stored
	// block between them at the blocks' ends and where there are more than maxLiterals.
	maxMatches = MaxPieceBytes
)

// Reader inflates all members of a gzip file, one after the other. It stops at
// whatever follows the last one, as gzip(1) does with padding and garbage.
type Reader struct {
	src  io.Reader
	in   [inBytes + slackBytes]byte
	pos  int // next byte of in
	end  int // of the input in in
	eof  bool
	bits uint64 // read from in, not used yet; the next one lowest
	nb   uint   // how many

	out    [windowBytes + outBytes + slackBytes]byte
	start  int // the current member's first byte that a match may reach
	wpos   int // where the next byte is written
	rpos   int // where the next one is given away
	summed int // to here the checksum goes

	matches []Match // of the output since the last Next, which makes room for maxMatches; nil without it
	found   int     // how many
	matched int     // to here they go

	crc   uint32
	size  uint32
	err   error
	state state
	final bool // the block is the member's last one
	fast  bool // the current member was compressed in a hurry
	left  int  // of a stored block

	litLen literals
	dist   distances
}

// state is what comes next in the input.
type state int

const (
	header state = iota
	blockHeader
	stored
	compressed
	trailer
)

// NewReader starts to read r. A first member is demanded, and found out about at
// the first Read.
func NewReader(r io.Reader) *Reader {
	z := &Reader{}
	z.Reset(r)
	return z
}

// Reset starts to read r as NewReader does, wherever z is and whatever its error. What
// Next returned is not valid any more. r is kept until the next Reset.
func (z *Reader) Reset(r io.Reader) {
	z.src = r
	z.pos, z.end, z.eof, z.bits, z.nb = 0, 0, false, 0, 0
	z.start, z.wpos, z.rpos, z.summed, z.matched = windowBytes, windowBytes, windowBytes, windowBytes, windowBytes
	z.found, z.crc, z.size, z.err = 0, 0, 0, nil
	z.state, z.final, z.fast, z.left = header, false, false, 0
}

// Read implements io.Reader. Bytes of a member are given away before its checksum
// is seen.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := z.more(); err != nil {
		return 0, err
	}
	n := copy(p, z.out[z.rpos:z.wpos])
	z.rpos += n
	return n, nil
}

// MaxPieceBytes bounds what Next returns.
const MaxPieceBytes = outBytes + slackBytes

// Next returns the next bytes of the stream, and the matches that they are made
// of, both valid until the next call. It and Read do not mix. There are no matches
// where the file says that it was compressed in a hurry, and others can be found.
func (z *Reader) Next() ([]byte, []Match, error) {
	if z.matches == nil {
		z.matches = make([]Match, maxMatches)
	}
	if err := z.more(); err != nil {
		return nil, nil, err
	}
	data := z.out[z.rpos:z.wpos]
	z.rpos = z.wpos
	if z.fast {
		return data, nil, nil
	}
	return data, z.matches[:z.found], nil
}

// more has output to give away, or the error.
func (z *Reader) more() error {
	for z.rpos == z.wpos {
		if z.err != nil {
			return z.err
		}
		z.slide()
		z.err = z.inflate()
		z.literals()
		z.sum()
	}
	return nil
}

// slide makes room for output, of which the last 32 KiB stay.
func (z *Reader) slide() {
	z.found, z.matched = 0, z.wpos
	if z.wpos < windowBytes+outBytes {
		return
	}
	copy(z.out[:windowBytes], z.out[z.wpos-windowBytes:z.wpos])
	z.start = max(0, z.start-(z.wpos-windowBytes))
	z.wpos, z.rpos, z.summed, z.matched = windowBytes, windowBytes, windowBytes, windowBytes
}

// literals says that what was written since the last match are literals.
func (z *Reader) literals() {
	if n := z.wpos - z.matched; n > 0 {
		z.note(flagAlone | Match(n))
	}
}

// note adds a match that ends where the output does.
func (z *Reader) note(m Match) {
	if z.matches == nil {
		return
	}
	z.matches[z.found] = m
	z.found++
	z.matched = z.wpos
}

func (z *Reader) sum() {
	z.crc = crc32.Update(z.crc, crc32.IEEETable, z.out[z.summed:z.wpos])
	z.size += uint32(z.wpos - z.summed)
	z.summed = z.wpos
}

// inflate goes on until there is output to give away; io.EOF after the last member.
func (z *Reader) inflate() (err error) {
	for z.wpos < windowBytes+outBytes {
		switch z.state {
		case header:
			if err := z.header(); err != nil {
				return err
			}
			z.state, z.start, z.crc, z.size = blockHeader, z.wpos, 0, 0
		case blockHeader:
			err = z.blockHeader()
		case stored:
			err = z.stored()
		case compressed:
			err = z.compressed()
		case trailer:
			z.sum()
			if err := z.trailer(); err != nil {
				return err
			}
			z.state = header
			if more, err := z.another(); err != nil || !more {
				return cmp.Or(err, io.EOF)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fill brings more input, so that there are n bytes behind pos, or says that
// there are none by eof. n is far smaller than the buffer.
func (z *Reader) fill(n int) error {
	if z.end-z.pos >= n || z.eof {
		return nil
	}
	moved := max(0, z.pos-8) // align may give as many bytes back
	copy(z.in[:], z.in[moved:z.end])
	z.end -= moved
	z.pos -= moved
	for empty := 0; z.end-z.pos < n; {
		m, err := z.src.Read(z.in[z.end:inBytes])
		z.end += m
		if errors.Is(err, io.EOF) {
			z.eof = true
			clear(z.in[z.end : z.end+slackBytes])
			return nil
		}
		if err != nil {
			return err
		}
		if m > 0 {
			empty = 0
		} else if empty++; empty == 100 {
			return io.ErrNoProgress
		}
	}
	return nil
}

// need has n bits ready, n at most 32.
func (z *Reader) need(n uint) error {
	for z.nb < n {
		if err := z.fill(1); err != nil {
			return err
		}
		if z.pos >= z.end {
			return io.ErrUnexpectedEOF
		}
		z.bits |= uint64(z.in[z.pos]) << z.nb
		z.pos++
		z.nb += 8
	}
	return nil
}

// take uses n bits, which are there.
func (z *Reader) take(n uint) uint32 {
	v := uint32(z.bits & (1<<n - 1))
	z.bits >>= n
	z.nb -= n
	return v
}

// align drops bits to the next byte, and gives whole bytes back to the input.
func (z *Reader) align() {
	z.pos -= int(z.nb / 8)
	z.bits, z.nb = 0, 0
}

// bytes returns the next n bytes, n at most 64 KiB, valid until the next call.
func (z *Reader) bytes(n int) ([]byte, error) {
	if err := z.fill(n); err != nil {
		return nil, err
	}
	if z.end-z.pos < n {
		return nil, io.ErrUnexpectedEOF
	}
	z.pos += n
	return z.in[z.pos-n : z.pos], nil
}

// The header's flags, RFC 1952 section 2.3.1. The others are passed over, as the
// standard library does: a layer that containerd unpacks should be converted.
const (
	flagHeaderCRC = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4

	hurriedXFL = 4 // of the extra flags: the compressor's fastest algorithm
)

func (z *Reader) header() error {
	h, err := z.bytes(10)
	if err != nil {
		return err
	}
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 {
		return malformed("no gzip header")
	}
	flags := h[3]
	z.fast = h[8] == hurriedXFL
	crc := crc32.ChecksumIEEE(h)
	more := func(n int) ([]byte, error) {
		b, err := z.bytes(n)
		crc = crc32.Update(crc, crc32.IEEETable, b)
		return b, err
	}
	if flags&flagExtra != 0 {
		b, err := more(2)
		if err != nil {
			return err
		}
		for n := int(binary.LittleEndian.Uint16(b)); n > 0; {
			m := min(n, 1024)
			if _, err := more(m); err != nil {
				return err
			}
			n -= m
		}
	}
	for _, flag := range []byte{flagName, flagComment} {
		for ended := flags&flag == 0; !ended; {
			b, err := more(1)
			if err != nil {
				return err
			}
			ended = b[0] == 0
		}
	}
	if flags&flagHeaderCRC != 0 {
		want := uint16(crc)
		b, err := z.bytes(2)
		if err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(b) != want {
			return malformed("wrong checksum of the header")
		}
	}
	return nil
}

func (z *Reader) trailer() error {
	z.align()
	t, err := z.bytes(8)
	if err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(t) != z.crc || binary.LittleEndian.Uint32(t[4:]) != z.size {
		return malformed("wrong checksum")
	}
	return nil
}

// another reports whether a further member follows.
func (z *Reader) another() (bool, error) {
	err := z.fill(3)
	return z.end-z.pos >= 3 && z.in[z.pos] == 0x1f && z.in[z.pos+1] == 0x8b && z.in[z.pos+2] == 8, err
}

func (z *Reader) blockHeader() error {
	if z.final {
		z.final, z.state = false, trailer
		return nil
	}
	if err := z.need(3); err != nil {
		return err
	}
	z.final = z.take(1) == 1
	switch z.take(2) {
	case 0:
		z.align()
		b, err := z.bytes(4)
		if err != nil {
			return err
		}
		n := binary.LittleEndian.Uint16(b)
		if n != ^binary.LittleEndian.Uint16(b[2:]) {
			return malformed("a stored block's lengths differ")
		}
		z.left, z.state = int(n), stored
		return nil
	case 1:
		z.state = compressed
		return z.fixed()
	case 2:
		z.state = compressed
		return z.dynamic()
	default:
		return malformed("unknown type of block")
	}
}

func (z *Reader) stored() error {
	z.literals()
	for z.left > 0 {
		room := windowBytes + outBytes - z.wpos
		if room <= 0 {
			return nil
		}
		n := min(z.left, room, 32<<10)
		b, err := z.bytes(n)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			n = z.end - z.pos // what is there is content
			copy(z.out[z.wpos:], z.in[z.pos:z.end])
			z.pos = z.end
			z.wpos += n
			z.note(Raw(n))
		}
		if err != nil {
			return err
		}
		z.wpos += copy(z.out[z.wpos:], b)
		z.note(Raw(n))
		z.left -= n
	}
	z.state = blockHeader
	return nil
}
