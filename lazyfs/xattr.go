package lazyfs

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"slices"
	"strings"
)

// Bounds of extended attributes: Linux's own, and EROFS's, which has 16 bits for a value's
// size.
const (
	maxXattrNameBytes  = 255
	maxXattrValueBytes = 1<<16 - 1
	maxXattrListBytes  = 1 << 16 // of one inode, names and values
	maxXattrs          = 2 << 20 // of a layer, in sets that differ; bounds memory
)

// xattr is one extended attribute as EROFS keeps it: a number for the name's
// beginning, then the rest.
type xattr struct {
	prefix uint8
	name   string
	value  string
}

// What EROFS has for the names' beginnings.
const (
	userPrefix       = 1
	aclAccessPrefix  = 2
	aclDefaultPrefix = 3
	trustedPrefix    = 4
	securityPrefix   = 6
)

// xattrPrefixes are those that a layer may have. One of another namespace is left
// out, as containerd does with what the file system refuses. So are trusted ones,
// which containerd takes from no image: overlayfs believes them, and a layer could
// make it show other files than it has.
var xattrPrefixes = []struct {
	text  string
	index uint8
	whole bool // the name ends with it
}{
	{"user.", userPrefix, false},
	{"system.posix_acl_access", aclAccessPrefix, true},
	{"system.posix_acl_default", aclDefaultPrefix, true},
	{"security.", securityPrefix, false},
}

func splitXattrName(name string) (prefix uint8, rest string, known bool) {
	for _, p := range xattrPrefixes {
		if rest, ok := strings.CutPrefix(name, p.text); ok && p.whole == (rest == "") {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

// xattrSets keeps each distinct set of attributes once: in a layer that has any,
// most files have the same. Set 0 is the empty one.
type xattrSets struct {
	sets   [][]xattr         // sorted
	byJSON map[string]uint32 // as TOCs write them; "s" before those of special files
	joined map[[2]uint32]uint32
	total  int // attributes in all sets
}

func newXattrSets() xattrSets {
	return xattrSets{sets: make([][]xattr, 1), byJSON: map[string]uint32{}, joined: map[[2]uint32]uint32{}}
}

func (x *xattrSets) add(e *tocEntry, set []xattr) (uint32, error) {
	if len(set) == 0 {
		return 0, nil
	}
	if x.total += len(set); x.total > maxXattrs {
		return 0, e.unsupported("is more than %d different extended attributes", maxXattrs)
	}
	x.sets = append(x.sets, set)
	return uint32(len(x.sets) - 1), nil
}

func compareXattrs(a, b xattr) int {
	return cmp.Or(cmp.Compare(a.prefix, b.prefix), strings.Compare(a.name, b.name))
}

// parse is the set that an entry names. Only regular files and directories can
// have attributes of the user namespace: Linux refuses those of others, and
// overlayfs fails to copy a file up that has them.
func (x *xattrSets) parse(e *tocEntry, special bool) (uint32, error) {
	if len(e.xattrs) == 0 {
		return 0, nil
	}
	key := e.xattrs
	if special {
		key = append([]byte("s"), key...)
	}
	if known, ok := x.byJSON[string(key)]; ok {
		return known, nil
	}
	values := map[string]string{}
	total := 0
	s := &scanner{b: e.xattrs}
	err := s.object(func(name []byte) error {
		text, err := s.text()
		if err != nil {
			return err
		}
		value, err := base64.StdEncoding.AppendDecode(nil, text)
		switch {
		case err != nil:
			return e.invalid("has an extended attribute %.100q that is not base64", name)
		case len(name) > maxXattrNameBytes || bytes.IndexByte(name, 0) >= 0:
			return e.invalid("has an extended attribute of the name %.300q", name)
		case len(value) > maxXattrValueBytes:
			return e.unsupported("has an extended attribute of %d bytes", len(value))
		}
		total += len(name) + len(value)
		values[string(name)] = string(value)
		return nil
	})
	if err != nil {
		return 0, err
	}
	if total > maxXattrListBytes {
		return 0, e.unsupported("has %d bytes of extended attributes", total)
	}
	var set []xattr
	for name, value := range values {
		if prefix, rest, known := splitXattrName(name); known && (!special || prefix != userPrefix) {
			set = append(set, xattr{prefix, rest, value})
		}
	}
	slices.SortFunc(set, compareXattrs)
	number, err := x.add(e, set)
	if err != nil {
		return 0, err
	}
	x.byJSON[string(key)] = number
	return number, nil
}

// join is the set that has all of both; where they differ, the second one's.
func (x *xattrSets) join(e *tocEntry, first, second uint32) (uint32, error) {
	switch {
	case first == second || second == 0:
		return first, nil
	case first == 0:
		return second, nil
	}
	key := [2]uint32{first, second}
	if known, ok := x.joined[key]; ok {
		return known, nil
	}
	a, b := x.sets[first], x.sets[second]
	set := make([]xattr, 0, len(a)+len(b))
	total := 0
	for len(a) > 0 || len(b) > 0 {
		order := 1
		if len(b) == 0 {
			order = -1
		} else if len(a) > 0 {
			order = compareXattrs(a[0], b[0])
		}
		if order < 0 {
			set, a = append(set, a[0]), a[1:]
		} else {
			if order == 0 {
				a = a[1:]
			}
			set, b = append(set, b[0]), b[1:]
		}
		last := set[len(set)-1]
		total += len(last.name) + len(last.value)
	}
	if total > maxXattrListBytes {
		return 0, e.unsupported("has %d bytes of extended attributes", total)
	}
	number, err := x.add(e, set)
	if err != nil {
		return 0, err
	}
	x.joined[key] = number
	return number, nil
}

// opaque is the set that tells overlayfs that a directory is opaque.
func (x *xattrSets) opaque(e *tocEntry) (uint32, error) {
	const key = "opaque" // no JSON, so nothing that a TOC could write
	if known, ok := x.byJSON[key]; ok {
		return known, nil
	}
	number, err := x.add(e, []xattr{{trustedPrefix, "overlay.opaque", "y"}})
	x.byJSON[key] = number
	return number, err
}
