package lazyfs

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"accel"
)

// maxJSONDepth bounds what is nested in fields that we skip.
const maxJSONDepth = 32

// scanner reads JSON in place. Its bytes are valid UTF-8.
type scanner struct {
	b  []byte
	at int
}

func (s *scanner) invalid(what string) error {
	return fmt.Errorf("%w: TOC at byte %d: %s", accel.ErrInvalid, s.at, what)
}

func (s *scanner) space() {
	for s.at < len(s.b) {
		switch s.b[s.at] {
		case ' ', '\t', '\n', '\r':
			s.at++
		default:
			return
		}
	}
}

// next is where the next token begins.
func (s *scanner) next() int {
	s.space()
	return s.at
}

// peek is the next token's first byte, 0 at the end.
func (s *scanner) peek() byte {
	if s.space(); s.at < len(s.b) {
		return s.b[s.at]
	}
	return 0
}

func (s *scanner) accept(c byte) bool {
	if s.peek() != c {
		return false
	}
	s.at++
	return true
}

func (s *scanner) literal(word string) bool {
	if !bytes.HasPrefix(s.b[s.at:], []byte(word)) {
		return false
	}
	s.at += len(word)
	return true
}

// null takes a null, which is a zero value wherever it stands, as encoding/json has it.
func (s *scanner) null() bool { return s.peek() == 'n' && s.literal("null") }

// object calls value after each key, to read what belongs to it.
func (s *scanner) object(value func(key []byte) error) error {
	if s.null() {
		return nil
	}
	if !s.accept('{') {
		return s.invalid("want an object")
	}
	if s.accept('}') {
		return nil
	}
	for {
		if s.peek() != '"' {
			return s.invalid("want a key")
		}
		key, err := s.text()
		if err != nil {
			return err
		}
		if !s.accept(':') {
			return s.invalid("want a colon")
		}
		if err := value(key); err != nil {
			return err
		}
		if s.accept('}') {
			return nil
		}
		if !s.accept(',') {
			return s.invalid("want a comma or the object's end")
		}
	}
}

// array calls element to read each.
func (s *scanner) array(element func() error) error {
	if s.null() {
		return nil
	}
	if !s.accept('[') {
		return s.invalid("want an array")
	}
	if s.accept(']') {
		return nil
	}
	for {
		if err := element(); err != nil {
			return err
		}
		if s.accept(']') {
			return nil
		}
		if !s.accept(',') {
			return s.invalid("want a comma or the array's end")
		}
	}
}

// text reads a string. Without escapes it is a part of the JSON itself.
func (s *scanner) text() ([]byte, error) {
	if s.null() {
		return nil, nil
	}
	if !s.accept('"') {
		return nil, s.invalid("want a string")
	}
	from := s.at
	for ; s.at < len(s.b); s.at++ {
		switch c := s.b[s.at]; {
		case c == '"':
			s.at++
			return s.b[from : s.at-1 : s.at-1], nil
		case c == '\\':
			return s.escaped(from)
		case c < ' ':
			return nil, s.invalid("a control character")
		}
	}
	return nil, s.invalid("a string without an end")
}

// escaped reads the rest of a string that has an escape, into memory of its own.
func (s *scanner) escaped(from int) ([]byte, error) {
	out := append([]byte(nil), s.b[from:s.at]...)
	for s.at < len(s.b) {
		c := s.b[s.at]
		s.at++
		switch {
		case c == '"':
			return out, nil
		case c < ' ':
			return nil, s.invalid("a control character")
		case c != '\\':
			out = append(out, c)
			continue
		}
		if s.at == len(s.b) {
			break
		}
		c = s.b[s.at]
		s.at++
		switch c {
		case '"', '\\', '/':
			out = append(out, c)
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r, ok := s.unicode()
			if !ok {
				return nil, s.invalid("a wrong escape")
			}
			out = utf8.AppendRune(out, r)
		default:
			return nil, s.invalid("a wrong escape")
		}
	}
	return nil, s.invalid("a string without an end")
}

// unicode reads what follows \u, with the second half of a pair. A half alone is
// U+FFFD, as encoding/json has it.
func (s *scanner) unicode() (rune, bool) {
	r, ok := s.hex4(s.at)
	if !ok {
		return 0, false
	}
	s.at += 4
	if !utf16.IsSurrogate(r) {
		return r, true
	}
	if bytes.HasPrefix(s.b[s.at:], []byte(`\u`)) {
		if second, ok := s.hex4(s.at + 2); ok {
			if both := utf16.DecodeRune(r, second); both != utf8.RuneError {
				s.at += 6
				return both, true
			}
		}
	}
	return utf8.RuneError, true
}

func (s *scanner) hex4(at int) (r rune, ok bool) {
	if at+4 > len(s.b) {
		return 0, false
	}
	for _, c := range s.b[at : at+4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// integer reads a whole number of 18 digits at most: more than any size or
// offset has.
func (s *scanner) integer() (int64, error) {
	if s.null() {
		return 0, nil
	}
	negative := s.accept('-')
	from, n := s.at, int64(0)
	digits := s.digits()
	if digits > 18 {
		return 0, s.invalid("a number that is too large")
	}
	for _, c := range s.b[from:s.at] {
		n = n*10 + int64(c-'0')
	}
	if digits == 0 || (digits > 1 && s.b[from] == '0') {
		return 0, s.invalid("want a whole number")
	}
	if s.at < len(s.b) && (s.b[s.at] == '.' || s.b[s.at]|0x20 == 'e') {
		return 0, s.invalid("want a whole number")
	}
	if negative {
		n = -n
	}
	return n, nil
}

// skip reads a value of any kind that nobody wants.
func (s *scanner) skip(depth int) error {
	if depth > maxJSONDepth {
		return s.invalid("nested too deep")
	}
	switch c := s.peek(); {
	case c == '{':
		return s.object(func([]byte) error { return s.skip(depth + 1) })
	case c == '[':
		return s.array(func() error { return s.skip(depth + 1) })
	case c == '"':
		_, err := s.text()
		return err
	case c == 't' && s.literal("true"), c == 'f' && s.literal("false"), c == 'n' && s.literal("null"):
		return nil
	case c == '-' || ('0' <= c && c <= '9'):
		return s.number()
	}
	return s.invalid("want a value")
}

// number reads one of any form.
func (s *scanner) number() error {
	s.one("-")
	if !s.one("0") && s.digits() == 0 {
		return s.invalid("want a number")
	}
	if s.one(".") && s.digits() == 0 {
		return s.invalid("want a fraction")
	}
	if s.one("eE") {
		s.one("+-")
		if s.digits() == 0 {
			return s.invalid("want an exponent")
		}
	}
	return nil
}

// one takes the next byte if it is one of these.
func (s *scanner) one(of string) bool {
	if s.at == len(s.b) || strings.IndexByte(of, s.b[s.at]) < 0 {
		return false
	}
	s.at++
	return true
}

func (s *scanner) digits() (n int) {
	for ; s.at < len(s.b) && '0' <= s.b[s.at] && s.b[s.at] <= '9'; s.at++ {
		n++
	}
	return n
}
