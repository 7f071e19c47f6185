package deflate

// Match is one step of how a stream is put together: literal bytes, and after
// them a copy of bytes that lie a distance back. As bits:
//
//	literals and a copy  literals<<23 | (length-3)<<15 | distance-1
//	literals alone       flagAlone | literals
//	bytes of a stored block, of which nothing was found out   flagAlone | flagRaw | bytes
type Match uint32

const (
	flagAlone    Match = 1 << 31
	flagRaw      Match = 1 << 30
	maxLiterals        = 1<<8 - 1 // in front of a copy
	minCopyBytes       = 3        // RFC 1951 section 3.2.5
)

// literals, length and distance of m; the latter two are 0 without a copy.
func (m Match) parts() (literals, length, distance int) {
	if m&flagAlone != 0 {
		return int(m &^ (flagAlone | flagRaw)), 0, 0
	}
	return int(m >> 23), int(m>>15&0xff) + minCopyBytes, int(m&0x7fff) + 1
}

// raw is flagRaw where m has it.
func (m Match) raw() Match {
	if m&flagAlone == 0 {
		return 0
	}
	return m & flagRaw
}

func copied(literals, length, distance int) Match {
	return Match(literals<<23 | (length-minCopyBytes)<<15 | (distance - 1))
}

// Trace walks along matches by bytes. The zero Trace knows nothing, and calls
// everything raw.
type Trace struct {
	rest []Match
	used int // bytes of rest[0] that are behind
}

// NewTrace walks along ms.
func NewTrace(ms []Match) Trace { return Trace{rest: ms} }

// Raw is n bytes of which nothing is known.
func Raw(n int) Match { return flagAlone | flagRaw | Match(n) }

// Skip passes over n bytes.
func (t *Trace) Skip(n int) {
	for n > 0 && len(t.rest) > 0 {
		literals, length, _ := t.rest[0].parts()
		left := literals + length - t.used
		if n < left {
			t.used += n
			return
		}
		n -= left
		t.rest, t.used = t.rest[1:], 0
	}
}

// Take appends what the next n bytes are made of, matches at either end cut, and
// passes over them.
func (t *Trace) Take(to []Match, n int) []Match {
	for n > 0 {
		if len(t.rest) == 0 {
			return append(to, Raw(n))
		}
		m := t.rest[0]
		literals, length, distance := m.parts()
		left := literals + length - t.used
		if t.used == 0 && left <= n {
			to = append(to, m)
		} else {
			k := min(left, n)
			if l := min(literals-t.used, k); l > 0 {
				to = append(to, flagAlone|m.raw()|Match(l))
				to = appendCopy(to, k-l, distance)
			} else {
				to = appendCopy(to, k, distance)
			}
		}
		k := min(left, n)
		n -= k
		if t.used += k; k == left {
			t.rest, t.used = t.rest[1:], 0
		}
	}
	return to
}

func appendCopy(to []Match, length, distance int) []Match {
	switch {
	case length >= minCopyBytes:
		return append(to, copied(0, length, distance))
	case length > 0:
		return append(to, flagAlone|Match(length))
	default:
		return to
	}
}
