package convert

import (
	"archive/tar"
	"crypto/sha256"
	"fmt"
	"maps"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// Names that the format keeps for itself, at the root of a layer.
var reserved = map[string]bool{
	estargz.TOCTarName:         true,
	estargz.PrefetchLandmark:   true,
	estargz.NoPrefetchLandmark: true,
}

// The PAX records that matter here.
const (
	paxXattr     = "SCHILY.xattr."
	paxGNUSparse = "GNU.sparse."
)

// maxEntries bounds a layer's entries, each of which takes about 400 bytes of
// memory until the layer is done. Large layers have 300,000.
const maxEntries = 1 << 20

// sum is a SHA-256.
type sum = [sha256.Size]byte

// meta is what a name has besides its content, in the precision that eStargz
// keeps.
type meta struct {
	mode         int64 // as in the tar; only 07777 matters
	uid, gid     int
	uname, gname string
	mtime        int64             // Unix seconds
	xattrs       map[string]string // nil where there are none
}

// entry is one header of a tar, and what was found after it.
type entry struct {
	meta
	name       string // as in the tar
	link       string // target of a symlink or hard link, as in the tar
	kind       byte   // tar.TypeReg, TypeDir, TypeSymlink, TypeLink, TypeChar, TypeBlock or TypeFifo
	size       int64  // of a regular file, holes included
	major      int64
	minor      int64
	content    sum // of a regular file
	firstChunk int // the layer's chunks before this entry's
	seq        int // position in the layer
}

// newEntry reads a header. It is nil for what has no place in a file tree.
func newEntry(h *tar.Header, seq int) (*entry, error) {
	e := &entry{
		name: h.Name,
		kind: h.Typeflag,
		seq:  seq,
		meta: meta{mode: h.Mode, uid: h.Uid, gid: h.Gid, uname: h.Uname, gname: h.Gname, mtime: seconds(h.ModTime)},
	}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil, nil // containerd ignores these, and so does archive/tar
	case tar.TypeReg, tar.TypeGNUSparse:
		e.kind, e.size = tar.TypeReg, h.Size
	case tar.TypeLink, tar.TypeSymlink:
		e.link = h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		e.major, e.minor = h.Devmajor, h.Devminor
	case tar.TypeDir, tar.TypeFifo:
	default:
		return nil, &accel.Rejection{Rule: "format.entry-type", Detail: fmt.Sprintf("entry %q has type %q, which containerd does not unpack either", h.Name, h.Typeflag)}
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, paxXattr); ok {
			if e.xattrs == nil {
				e.xattrs = make(map[string]string)
			}
			e.xattrs[name] = v
		}
	}
	return e, nil
}

// checkNames refuses what JSON, and so the TOC, would silently change.
func (e *entry) checkNames() error {
	for what, s := range map[string]string{"name": e.name, "link target": e.link} {
		if !utf8.ValidString(s) {
			return &accel.Rejection{Rule: "format.utf8-names", Detail: fmt.Sprintf("the %s %q of entry %q is not UTF-8", what, s, e.name)}
		}
	}
	for k := range e.xattrs {
		if !utf8.ValidString(k) {
			return &accel.Rejection{Rule: "format.utf8-names", Detail: fmt.Sprintf("the name of extended attribute %q of entry %q is not UTF-8", k, e.name)}
		}
	}
	// Owner names are a hint that no runtime reads; the numbers count.
	e.uname, e.gname = strings.ToValidUTF8(e.uname, ""), strings.ToValidUTF8(e.gname, "")
	return nil
}

// seconds drops the fraction, as package time's Unix does, where the stock
// library rounds: a file from 10.6 s that turned into one from 11 s would make
// every .pyc file of it stale, for Python keeps int(mtime). Times that containerd
// cannot set (before 1970, after 2262) become 1970, as there.
func seconds(t time.Time) int64 {
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, 1<<63-1)) {
		return 0
	}
	return t.Unix()
}

// clean is the path from the root that containerd gives a name: ".." stops at
// the root. The root itself is "". Where it can, it is a part of name, so that
// trees need no memory of their own for paths.
func clean(name string) string {
	c := path.Clean("/" + name)[1:]
	if trimmed := strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/"); c == trimmed {
		return trimmed
	}
	return c
}

// apply is what unpacking a second header onto the same inode does: everything
// is set anew, but attributes that the header does not name stay.
func (m *meta) apply(n meta) {
	old := m.xattrs
	*m = n
	if len(old) > 0 {
		m.xattrs = maps.Clone(old)
		maps.Copy(m.xattrs, n.xattrs)
	}
}

// device is the number as "8:1".
func (e *entry) device() string {
	return strconv.FormatInt(e.major, 10) + ":" + strconv.FormatInt(e.minor, 10)
}

// isSparse reports whether h's payload in the tar is not what it stands for.
func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, paxGNUSparse) {
			return true
		}
	}
	return false
}

// whole is the header that h's file has when its holes are written out.
func whole(h *tar.Header) *tar.Header {
	w := *h
	w.Typeflag = tar.TypeReg
	w.Format = tar.FormatPAX
	w.Xattrs = nil //nolint:staticcheck // deprecated double of PAXRecords
	w.PAXRecords = map[string]string{}
	for k, v := range h.PAXRecords {
		if !strings.HasPrefix(k, paxGNUSparse) {
			w.PAXRecords[k] = v
		}
	}
	return &w
}
