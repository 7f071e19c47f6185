package lazyfs

import (
	"encoding/hex"
	"fmt"
	"unicode/utf8"

	"accel"
)

// tocEntry is one entry of an eStargz TOC: the fields that matter here, named as
// there. Texts point into the JSON, or are copies of their own where it has
// escapes. It is filled by hand: encoding/json reads 90 MB/s, a fifth of what this does, and a
// container waits for it.
type tocEntry struct {
	index                         int // in the TOC, for messages
	name, kind, linkName, modTime []byte
	digest, chunkDigest           []byte
	xattrs                        []byte // the JSON object as it stands
	size, mode, uid, gid          int64
	devMajor, devMinor            int64
	offset, innerOffset           int64
	chunkOffset, chunkSize        int64
}

// invalid is the error of an entry that no converter writes.
func (e *tocEntry) invalid(format string, args ...any) error {
	return fmt.Errorf("%w: TOC entry %d, %.100q, %s", accel.ErrInvalid, e.index, e.name, fmt.Sprintf(format, args...))
}

// unsupported is the error of an entry that is right, but not for us.
func (e *tocEntry) unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: TOC entry %d, %.100q, %s", ErrUnsupported, e.index, e.name, fmt.Sprintf(format, args...))
}

// decodeTOC calls each for every entry, in order. The entry is used again for the
// next one.
func decodeTOC(toc []byte, each func(*tocEntry) error) error {
	if len(toc) > accel.MaxTOCBytes {
		return fmt.Errorf("%w: a TOC of %d bytes", ErrUnsupported, len(toc))
	}
	if !utf8.Valid(toc) {
		return fmt.Errorf("%w: the TOC is not UTF-8", accel.ErrInvalid)
	}
	s := &scanner{b: toc}
	var entries bool
	err := s.object(func(key []byte) error {
		switch string(key) {
		case "version":
			v, err := s.integer()
			if err == nil && v != 1 {
				return fmt.Errorf("%w: TOC version %d", ErrUnsupported, v)
			}
			return err
		case "entries":
			if entries {
				return s.invalid("a second list of entries")
			}
			entries = true
			return s.entries(each)
		}
		return s.skip(0)
	})
	if err != nil {
		return err
	}
	if s.space(); s.at < len(s.b) {
		return s.invalid("something after the TOC")
	}
	return nil
}

func (s *scanner) entries(each func(*tocEntry) error) error {
	var e tocEntry
	index := 0
	return s.array(func() error {
		e = tocEntry{index: index}
		index++
		if err := s.object(func(key []byte) error { return s.field(&e, key) }); err != nil {
			return err
		}
		return each(&e)
	})
}

func (s *scanner) field(e *tocEntry, key []byte) (err error) {
	switch string(key) {
	case "name":
		e.name, err = s.text()
	case "type":
		e.kind, err = s.text()
	case "linkName":
		e.linkName, err = s.text()
	case "modtime":
		e.modTime, err = s.text()
	case "digest":
		e.digest, err = s.text()
	case "chunkDigest":
		e.chunkDigest, err = s.text()
	case "xattrs":
		from := s.next()
		if err = s.skip(0); err == nil {
			e.xattrs = s.b[from:s.at]
		}
	case "size":
		e.size, err = s.integer()
	case "mode":
		e.mode, err = s.integer()
	case "uid":
		e.uid, err = s.integer()
	case "gid":
		e.gid, err = s.integer()
	case "devMajor":
		e.devMajor, err = s.integer()
	case "devMinor":
		e.devMinor, err = s.integer()
	case "offset":
		e.offset, err = s.integer()
	case "innerOffset":
		e.innerOffset, err = s.integer()
	case "chunkOffset":
		e.chunkOffset, err = s.integer()
	case "chunkSize":
		e.chunkSize, err = s.integer()
	default:
		err = s.skip(0)
	}
	return err
}

// parseDigest reads "sha256:" and 64 hex digits, the one form that TOCs use.
func parseDigest(text []byte) (sum [32]byte, ok bool) {
	const prefix = "sha256:"
	if len(text) != len(prefix)+64 || string(text[:len(prefix)]) != prefix {
		return sum, false
	}
	_, err := hex.Decode(sum[:], text[len(prefix):])
	return sum, err == nil
}
