package convert

import (
	"archive/tar"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"
)

const (
	whatMissing = "missing"
	whatExtra   = "extra"
	whatConfig  = "config"
)

// comparison of two trees.
type comparison struct {
	max       int   // differences
	tolerance int64 // of times, seconds
}

// tocTolerance compares a tar with a TOC of the stock library, which rounds.
var tocTolerance = comparison{max: 1, tolerance: 1}

type differ struct {
	comparison
	out []Difference
	// pairs holds which inode of one tree is which of the other, for inodes with
	// several names.
	pairs map[*inode]*inode
	first map[*inode]string // the name under which it was seen
}

// diffTrees compares two trees, name by name in order.
func diffTrees(a, b *tree, c comparison) []Difference {
	d := &differ{comparison: c, pairs: map[*inode]*inode{}, first: map[*inode]string{}}
	d.nodes(a.root, b.root, "")
	return d.out
}

func (d *differ) full() bool { return len(d.out) >= d.max }

func (d *differ) say(path, what, a, b string) {
	if !d.full() {
		d.out = append(d.out, Difference{Layer: -1, Path: path, What: what, A: a, B: b})
	}
}

func (d *differ) nodes(a, b *node, path string) {
	if d.full() {
		return
	}
	d.inodes(a, b, path)
	for _, name := range sortedKeys(a.children, b.children) {
		ca, cb := a.children[name], b.children[name]
		p := name
		if path != "" {
			p = path + "/" + name
		}
		switch {
		case cb == nil:
			d.say(p, whatMissing, ca.describe(), "")
		case ca == nil:
			d.say(p, whatExtra, "", cb.describe())
		default:
			d.nodes(ca, cb, p)
		}
	}
}

func (d *differ) inodes(na, nb *node, path string) {
	a, b := na.inode, nb.inode
	if a == nil || b == nil { // hard links of a sampled layer
		if a != nil || b != nil || na.own.link != nb.own.link {
			d.say(path, "link", na.describe(), nb.describe())
		}
		return
	}
	if a.kind != b.kind {
		d.say(path, "type", na.describe(), nb.describe())
		return
	}
	if a.linked || b.linked {
		pa, pb := d.pairs[a], d.pairs[b]
		if pa == nil && pb == nil {
			d.pairs[a], d.pairs[b] = b, a
			d.first[a], d.first[b] = path, path
		} else if pa != b {
			d.say(path, "hard link", d.sameAs(a), d.sameAs(b))
		}
	}
	if !a.implicit && !b.implicit {
		d.metas(a.meta, b.meta, a.kind, path)
	}
	d.value(path, "size", a.size, b.size)
	d.text(path, "target", a.link, b.link)
	if a.device() != b.device() {
		d.say(path, "device", a.device(), b.device())
	}
	if a.kind == tar.TypeReg && a.size == b.size && a.content != b.content {
		d.say(path, "content", "sha256:"+hex.EncodeToString(a.content[:]), "sha256:"+hex.EncodeToString(b.content[:]))
	}
}

func (d *differ) sameAs(i *inode) string {
	if p, ok := d.first[i]; ok {
		return strconv.Quote("/" + p)
	}
	return "a file of its own"
}

func (d *differ) metas(a, b meta, kind byte, path string) {
	if kind != tar.TypeSymlink && a.mode&0o7777 != b.mode&0o7777 {
		d.say(path, "mode", fmt.Sprintf("%04o", a.mode&0o7777), fmt.Sprintf("%04o", b.mode&0o7777))
	}
	d.value(path, "uid", int64(a.uid), int64(b.uid))
	d.value(path, "gid", int64(a.gid), int64(b.gid))
	if delta := a.mtime - b.mtime; delta > d.tolerance || -delta > d.tolerance {
		d.say(path, "modification time", inUTC(a.mtime), inUTC(b.mtime))
	}
	for _, k := range sortedKeys(a.xattrs, b.xattrs) {
		va, oka := a.xattrs[k]
		vb, okb := b.xattrs[k]
		if va != vb || oka != okb {
			d.say(path, "extended attribute "+strconv.Quote(k), orAbsent(va, oka), orAbsent(vb, okb))
		}
	}
}

func (d *differ) value(path, what string, a, b int64) {
	if a != b {
		d.say(path, what, strconv.FormatInt(a, 10), strconv.FormatInt(b, 10))
	}
}

func (d *differ) text(path, what, a, b string) {
	if a != b {
		d.say(path, what, strconv.Quote(a), strconv.Quote(b))
	}
}

func inUTC(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }

func orAbsent(v string, ok bool) string {
	if !ok {
		return "absent"
	}
	return strconv.Quote(v)
}

// describe names a node's type.
func (n *node) describe() string {
	if n.inode == nil {
		return "hard link to " + strconv.Quote(n.own.link)
	}
	switch n.inode.kind {
	case tar.TypeReg:
		return fmt.Sprintf("file of %d bytes", n.inode.size)
	case tar.TypeDir:
		return "directory"
	case tar.TypeSymlink:
		return "symlink to " + strconv.Quote(n.inode.link)
	case tar.TypeChar:
		return "character device " + n.inode.device()
	case tar.TypeBlock:
		return "block device " + n.inode.device()
	default:
		return "fifo"
	}
}

// sortedKeys are the keys of both maps.
func sortedKeys[V any](a, b map[string]V) []string {
	keys := slices.AppendSeq(make([]string, 0, max(len(a), len(b))), maps.Keys(a))
	for k := range b {
		if _, ok := a[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}
