package convert

import (
	"archive/tar"
	"fmt"
	"path"
	"slices"
	"strings"

	"accel"
)

// Linux's own bounds, which containerd meets in the end: links on the way to a
// directory, bytes of a path, and directories that fit into those.
const (
	maxSymlinks  = 40
	maxPathBytes = 4096
	maxDepth     = maxPathBytes / 2
)

// tree is what a layer's entries make of an empty directory when containerd
// applies them one after the other (pkg/archive, applyNaive): a later entry
// replaces an earlier one of its name, with all that was below it; a directory
// over a directory only sets its attributes; parents are followed through
// symlinks, and made where they are missing. Whiteouts stay what they are in the
// tar: files whose names begin with ".wh.".
//
// containerd fails on an image with a hard link to what is not there yet. Here
// such a link finds its target at the end, as in the stock library.
type tree struct {
	root    *node
	pending []*node // hard links whose target was not there
	// The parent that was found last: entries of a directory mostly come together.
	lastDir  string
	lastNode *node
}

// node is one name.
type node struct {
	name     string // last component
	parent   *node
	depth    int
	inode    *inode // nil: a hard link that waits for its target
	children map[string]*node
	own      *entry // the header that made this name; nil for an implicit directory
}

// inode is what one or more names stand for.
type inode struct {
	*entry
	implicit bool // a parent that no entry names: 0755, owned by 0:0
	linked   bool // had more than one name at some time
}

func newTree() *tree {
	return &tree{root: &node{inode: implicitDir()}}
}

func implicitDir() *inode {
	return &inode{implicit: true, entry: &entry{kind: tar.TypeDir, meta: meta{mode: 0o755}}}
}

func (n *node) isDir() bool { return n.inode != nil && n.inode.kind == tar.TypeDir }

// path is n's place below the root, "" for the root.
func (n *node) path() string {
	if n.parent == nil {
		return ""
	}
	if p := n.parent.path(); p != "" {
		return p + "/" + n.name
	}
	return n.name
}

func (n *node) add(name string, in *inode, own *entry) *node {
	c := &node{name: name, parent: n, depth: n.depth + 1, inode: in, own: own}
	if n.children == nil {
		n.children = map[string]*node{}
	}
	n.children[name] = c
	return c
}

// set applies a directory's entry to a directory.
func (n *node) set(e *entry) {
	if n.own == nil {
		n.own, n.inode.entry, n.inode.implicit = e, e, false
		return
	}
	n.inode.apply(e.meta)
}

// add applies one entry.
func (t *tree) add(e *entry) error {
	if len(e.name) > maxPathBytes || len(e.link) > maxPathBytes {
		return cannotApply(e, "or its target is longer than %d bytes", maxPathBytes)
	}
	p := clean(e.name)
	if p == "" {
		if e.kind == tar.TypeDir {
			t.root.set(e)
		}
		return nil // anything else at the root containerd ignores
	}
	dir, base := path.Split(p)
	parent, err := t.parent(dir, e)
	if err != nil {
		return err
	}
	old := parent.children[base]
	if old != nil && old.isDir() && e.kind == tar.TypeDir {
		old.set(e)
		return nil
	}
	if old != nil {
		delete(parent.children, base)
		t.lastDir, t.lastNode = "", nil // it may have been below
	}
	if e.kind != tar.TypeLink {
		parent.add(base, &inode{entry: e}, e)
		return nil
	}
	target := t.lookup(e.link)
	switch {
	case target == nil || target.inode == nil:
		t.pending = append(t.pending, parent.add(base, nil, e))
	case target.isDir():
		return cannotApply(e, "is a hard link to a directory, %q", e.link)
	default:
		mode := target.inode.mode
		target.inode.apply(e.meta)
		if target.inode.kind == tar.TypeSymlink {
			target.inode.mode = mode // there is no lchmod
		}
		target.inode.linked = true
		parent.add(base, target.inode, e)
	}
	return nil
}

// finish finds the targets of the hard links that came before them.
func (t *tree) finish() error {
	for _, n := range t.pending {
		var way []*node
		for at := n; at.inode == nil; {
			way = append(way, at)
			target := t.lookup(at.own.link)
			switch {
			case target == nil:
				return cannotApply(at.own, "is a hard link to %q, which is not in this layer", at.own.link)
			case target.isDir():
				return cannotApply(at.own, "is a hard link to a directory, %q", at.own.link)
			case len(way) > len(t.pending):
				return cannotApply(n.own, "is a hard link in a circle")
			}
			at = target
			if at.inode != nil {
				at.inode.linked = true
				for _, w := range way {
					w.inode = at.inode
				}
			}
		}
	}
	return nil
}

func cannotApply(e *entry, format string, args ...any) error {
	return malformed("entry %q %s: containerd cannot unpack it: %w", e.name, fmt.Sprintf(format, args...), accel.ErrInvalid)
}

// parent is the directory in which e belongs, made where it is missing.
func (t *tree) parent(dir string, e *entry) (*node, error) {
	if dir == "" {
		return t.root, nil
	}
	if dir == t.lastDir {
		return t.lastNode, nil
	}
	at := t.walk(dir, true)
	if at == nil || !at.isDir() {
		return nil, cannotApply(e, "is below something that is no directory, or too deep")
	}
	t.lastDir, t.lastNode = dir, at
	return at, nil
}

// lookup finds the name that a hard link points to. Its parents are followed
// through symlinks, the last component is not.
func (t *tree) lookup(name string) *node {
	dir, base := path.Split(clean(name))
	if base == "" {
		return t.root
	}
	at := t.walk(dir, false)
	if at == nil {
		return nil
	}
	return at.children[base]
}

// walk goes down dir, whose symlinks it resolves within the root. A component
// that is missing is made or ends the walk with nil.
func (t *tree) walk(dir string, create bool) *node {
	at, links := t.root, 0
	left := strings.Split(strings.Trim(dir, "/"), "/")
	for len(left) > 0 {
		name := left[0]
		left = left[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if at.parent != nil {
				at = at.parent
			}
			continue
		}
		next := at.children[name]
		switch {
		case next == nil && create && at.isDir():
			if at.depth >= maxDepth {
				return nil
			}
			next = at.add(name, implicitDir(), nil)
		case next == nil:
			return nil
		case next.inode != nil && next.inode.kind == tar.TypeSymlink:
			if links++; links > maxSymlinks {
				return nil
			}
			if strings.HasPrefix(next.inode.link, "/") {
				at = t.root
			}
			left = append(strings.Split(next.inode.link, "/"), left...)
			continue
		}
		at = next
	}
	return at
}

// each calls f for n and every name below it, parents first, in no other order.
func (n *node) each(f func(*node)) {
	f(n)
	for _, c := range n.children {
		c.each(f)
	}
}

// named is one name of the finished tree. Where an inode has several, the first
// is the file and the others are links to it.
type named struct {
	*inode
	own    *entry // the header that made the name
	path   string
	linkTo string // path of the file for a further name of it, else ""
	seq    int    // place in the layer: the content's for the file, the header's for a link
}

// list is everything that an entry of the layer put there, in the order of the
// layer. It is called after finish.
func (t *tree) list() []named {
	first := map[*inode]*node{} // of inodes that had links
	var out []named
	t.root.each(func(n *node) {
		if n.own == nil {
			return
		}
		p := n.path()
		if c := clean(n.own.name); c == p {
			p = c // needs no memory
		}
		out = append(out, named{inode: n.inode, own: n.own, path: p})
		if n.own.kind == tar.TypeLink || n.inode.linked {
			if f := first[n.inode]; f == nil || n.own.seq < f.own.seq {
				first[n.inode] = n
			}
		}
	})
	for i := range out {
		l := &out[i]
		l.seq = l.inode.seq
		if f := first[l.inode]; f != nil && f.own != l.own {
			l.linkTo, l.seq = f.path(), l.own.seq
		}
	}
	slices.SortFunc(out, func(a, b named) int { return a.seq - b.seq })
	return out
}
