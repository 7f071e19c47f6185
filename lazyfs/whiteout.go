package lazyfs

import "strings"

// Whiteouts as a layer's tar has them.
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq" // its directory hides the one below
	aufsPrefix     = ".wh..wh."     // AUFS's own books
)

// whiteout looks whether the entry is one, and applies it. It reports whether the
// entry is done with. What is below a name of that kind is nobody's content, and
// is left out as the stock snapshotter does.
//
// A whiteout beside a real entry of its name hides what the layers below have
// under that name, wherever it stands among the entries: the image specification
// has whiteouts apply to lower layers only. So the real entry wins, and hides the
// lower one; a directory does that by being opaque.
func (t *tree) whiteout(e *tocEntry, p string) (done bool, err error) {
	dir, base := "", p
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		dir, base = p[:i], p[i+1:]
		if strings.HasPrefix(dir, whiteoutPrefix) || strings.Contains(dir, "/"+whiteoutPrefix) {
			return true, nil
		}
	}
	if !strings.HasPrefix(base, whiteoutPrefix) {
		return false, nil
	}
	if strings.HasPrefix(base, aufsPrefix) && base != opaqueName {
		return true, nil
	}
	parent, err := t.parent(e, []byte(dir))
	if err != nil {
		return false, err
	}
	if base == opaqueName {
		return true, t.makeOpaque(e, &t.inodes[t.nodes[parent].inode])
	}
	hidden := base[len(whiteoutPrefix):]
	switch hidden {
	case "", ".", "..":
		return false, e.invalid("is a whiteout of %q", hidden)
	}
	if n, found := t.byName[childKey{parent, hidden}]; found {
		if t.nodes[n].inode != whiteoutInode {
			t.nodes[n].hides = true
		}
		return true, nil
	}
	_, err = t.name(e, parent, []byte(hidden), whiteoutInode)
	return true, err
}

func (t *tree) makeOpaque(e *tocEntry, in *inode) error {
	opaque, err := t.xattrs.opaque(e)
	if err != nil {
		return err
	}
	in.opaque = true
	in.xattrs, err = t.xattrs.join(e, in.xattrs, opaque)
	return err
}

// finishWhiteouts makes the directories opaque that have a whiteout beside them, and
// drops the whiteouts below opaque ones: they hide nothing, and overlayfs would
// list their names, since it looks for whiteouts only where layers meet.
func (t *tree) finishWhiteouts() error {
	for i := range t.nodes { // parents come before what is in them
		n := &t.nodes[i]
		if n.dead || (!t.isDir(uint32(i)) && n.inode != whiteoutInode) {
			continue
		}
		n.alone = t.nodes[n.parent].alone
		if n.inode == whiteoutInode {
			n.dead = n.alone
			continue
		}
		in := &t.inodes[n.inode]
		if n.hides {
			if err := t.makeOpaque(&tocEntry{name: []byte(n.name)}, in); err != nil {
				return err
			}
		}
		n.alone = n.alone || in.opaque
	}
	return nil
}
