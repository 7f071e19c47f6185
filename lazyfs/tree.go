package lazyfs

import (
	"bytes"
	"fmt"
	"math"
	"path"
	"strings"
	"time"

	"accel"

	"golang.org/x/sys/unix"
)

// Bounds of a layer. The larger ones are bounds of memory, far above what real
// images have; those on names are Linux's own.
const (
	maxNames = 2 << 20 // with directories that no entry names
	// So many names, and one for each so many bytes of the TOC, are allowed: an entry has
	// more, but a path of many missing parents makes many names of few bytes.
	freeNames, nameBytes = 1 << 10, 24

	maxPathBytes  = unix.PathMax - 1
	maxNameBytes  = 255
	maxMajor      = 1<<12 - 1 // of a device
	maxMinor      = 1<<20 - 1
	maxTime       = math.MaxInt64 / 1_000_000_000 // seconds, of what containerd sets: the year 2262
	permissionSet = 0o7777                        // what of a mode is not its type
)

// tree is what a TOC's entries make of an empty directory when they are applied
// one after the other, as containerd unpacks a tar: a later entry replaces an earlier
// one of its name, with all that was below it; a directory over a directory only
// sets its attributes; a hard link sets those of its target. Names are data here:
// they are cleaned as if the layer were all there is, so that ".." stops at its root.
type tree struct {
	nodes    []node // 0 is the root
	maxNames int
	byName   map[childKey]uint32
	inodes   []inode
	xattrs   xattrSets
	content  content
	pending  []uint32 // hard links whose target was not there when they came

	// The parent that was found last: entries of a directory mostly come together.
	lastDir  []byte
	lastNode uint32
	lastTime struct {
		text string
		unix int64
	}
}

type childKey struct {
	parent uint32
	name   string
}

// node is one name. The root is its own parent.
type node struct {
	name        string
	parent      uint32
	inode       uint32
	child, next uint32 // first child and next sibling, 0 for none
	dead        bool   // it is not there: a parent of it was replaced
	// hides: the layer has a whiteout of that name too. What it hides is in the layers
	// below, never here.
	hides bool
	alone bool // a directory below which nothing of the lower layers shows
}

// inode is what one or more names stand for.
type inode struct {
	kind     uint16 // unix.S_IFREG and so on, 0 for a hard link that waits
	mode     uint16 // permissions, setuid, setgid and sticky
	uid, gid uint32
	rdev     uint32
	links    uint32
	opaque   bool   // a directory that hides what the layers below have in it
	link     string // a symlink's target, or a waiting hard link's
	mtime    int64  // seconds since 1970
	xattrs   uint32 // a set's number
	// Of a regular file: its size, its first chunk, its place in the data file.
	sizeBytes, dataOffset int64
	first                 uint32
	// Of a directory, once the image is planned: first, among the names in order, and
	// how many.
	count uint32
	meta  place
}

// rootInode and whiteoutInode are there from the start. All whiteouts are one
// inode, as overlayfs itself makes them.
const (
	rootInode = iota
	whiteoutInode
)

func newTree(tocBytes int) *tree {
	// An entry with its digests takes some 350 bytes, and what it becomes fewer.
	expect := tocBytes/350 + 16
	t := &tree{
		maxNames: min(maxNames, freeNames+tocBytes/nameBytes),
		nodes:    make([]node, 1, expect),
		inodes:   make([]inode, 2, expect),
		byName:   make(map[childKey]uint32, expect),
		xattrs:   newXattrSets(),
	}
	t.inodes[rootInode] = inode{kind: unix.S_IFDIR, mode: 0o755}
	t.inodes[whiteoutInode] = inode{kind: unix.S_IFCHR}
	t.content.file = noFile
	t.content.chunks = make([]accel.Chunk, 0, expect)
	return t
}

// add applies one entry.
func (t *tree) add(e *tocEntry) error {
	if string(e.kind) == "chunk" {
		return t.content.more(e)
	}
	if err := t.content.end(); err != nil {
		return err
	}
	p, err := cleanPath(e)
	if err != nil {
		return err
	}
	skip := false
	switch p := string(p); {
	case p == ".prefetch.landmark", p == ".no.prefetch.landmark", p == "stargz.index.json":
		skip = true // of the format, not of the layer
	case strings.Contains(p, whiteoutPrefix):
		if skip, err = t.whiteout(e, p); err != nil {
			return err
		}
	}
	if skip {
		return t.content.begin(e, noFile, new(uint32))
	}
	if len(p) == 0 {
		return t.setRoot(e)
	}
	return t.place(e, p)
}

// cleanPath is the entry's path below the root, "" for the root itself.
func cleanPath(e *tocEntry) ([]byte, error) {
	p := clean(e.name)
	switch {
	case len(p) > maxPathBytes || len(e.linkName) > maxPathBytes:
		return nil, e.invalid("has a path of more than %d bytes", maxPathBytes)
	case bytes.IndexByte(p, 0) >= 0 || bytes.IndexByte(e.linkName, 0) >= 0:
		return nil, e.invalid("has a zero byte in a name")
	}
	return p, nil
}

// clean is path.Clean below a root, and quick where there is nothing to clean.
func clean(name []byte) []byte {
	p := bytes.TrimSuffix(name, []byte("/"))
	for rest := p; ; {
		component, after, more := bytes.Cut(rest, []byte("/"))
		switch string(component) {
		case "", ".", "..":
			return []byte(strings.TrimPrefix(path.Clean("/"+string(name)), "/"))
		}
		if !more {
			return p
		}
		rest = after
	}
}

func (t *tree) setRoot(e *tocEntry) error {
	if string(e.kind) != "dir" {
		return e.invalid("is the root and no directory")
	}
	return t.attributes(e, &t.inodes[rootInode])
}

// place gives the entry its name.
func (t *tree) place(e *tocEntry, p []byte) error {
	dir, base := split(p)
	parent, err := t.parent(e, dir)
	if err != nil {
		return err
	}
	at, found := t.byName[childKey{parent, string(base)}]
	if found && string(e.kind) == "dir" && t.isDir(at) {
		return t.attributes(e, &t.inodes[t.nodes[at].inode])
	}
	made, err := t.make(e)
	if err != nil {
		return err
	}
	if found {
		t.replace(at, made)
	} else if at, err = t.name(e, parent, base, made); err != nil {
		return err
	}
	switch t.inodes[made].kind {
	case unix.S_IFREG:
		return t.content.begin(e, made, &t.inodes[made].first)
	case 0:
		return t.link(e, at)
	}
	return nil
}

func split(p []byte) (dir, base []byte) {
	i := bytes.LastIndexByte(p, '/')
	return p[:max(i, 0)], p[i+1:]
}

func (t *tree) isDir(n uint32) bool { return t.inodes[t.nodes[n].inode].kind == unix.S_IFDIR }

// parent is the node of a directory, made where it is missing.
func (t *tree) parent(e *tocEntry, dir []byte) (uint32, error) {
	if len(dir) == 0 {
		return 0, nil
	}
	if bytes.Equal(dir, t.lastDir) {
		return t.lastNode, nil
	}
	at := uint32(0)
	for component := range bytes.SplitSeq(dir, []byte("/")) {
		next, found := t.byName[childKey{at, string(component)}]
		if !found || t.nodes[next].inode == whiteoutInode {
			made := t.addInode(inode{kind: unix.S_IFDIR, mode: 0o755})
			if found {
				t.replace(next, made)
			} else {
				var err error
				if next, err = t.name(e, at, component, made); err != nil {
					return 0, err
				}
			}
		}
		switch t.inodes[t.nodes[next].inode].kind {
		case unix.S_IFDIR:
		case unix.S_IFLNK:
			// Where that leads, the layers below decide.
			return 0, e.unsupported("is below a symlink")
		default:
			return 0, e.invalid("is below something that is no directory")
		}
		at = next
	}
	t.lastDir, t.lastNode = append(t.lastDir[:0], dir...), at
	return at, nil
}

func (t *tree) addInode(in inode) uint32 {
	t.inodes = append(t.inodes, in)
	return uint32(len(t.inodes) - 1)
}

// name adds a name that was not there.
func (t *tree) name(e *tocEntry, parent uint32, base []byte, in uint32) (uint32, error) {
	if len(base) > maxNameBytes {
		return 0, e.invalid("has a name of more than %d bytes", maxNameBytes)
	}
	if len(t.nodes) >= t.maxNames {
		return 0, e.unsupported("is more than %d names", t.maxNames)
	}
	n := uint32(len(t.nodes))
	name := string(base)
	t.nodes = append(t.nodes, node{name: name, parent: parent, inode: in, next: t.nodes[parent].child})
	t.nodes[parent].child = n
	t.byName[childKey{parent, name}] = n
	return n, nil
}

// replace gives a name another inode. All below it is gone.
func (t *tree) replace(n, in uint32) {
	if t.nodes[n].inode == whiteoutInode {
		t.nodes[n].hides = true
	}
	stack := []uint32{t.nodes[n].child}
	t.nodes[n].inode, t.nodes[n].child = in, 0
	t.lastDir = nil // it may have been this, or below
	for len(stack) > 0 {
		at := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for ; at != 0; at = t.nodes[at].next {
			t.nodes[at].dead = true
			delete(t.byName, childKey{t.nodes[at].parent, t.nodes[at].name})
			if child := t.nodes[at].child; child != 0 {
				stack = append(stack, child)
			}
		}
	}
}

// make is the inode that the entry describes.
func (t *tree) make(e *tocEntry) (uint32, error) {
	in := inode{}
	switch string(e.kind) {
	case "reg":
		in.kind, in.sizeBytes = unix.S_IFREG, e.size
	case "dir":
		in.kind = unix.S_IFDIR
	case "symlink":
		if len(e.linkName) == 0 {
			return 0, e.invalid("is a symlink to nothing")
		}
		in.kind, in.link = unix.S_IFLNK, string(e.linkName)
	case "hardlink":
		in.link = string(clean(e.linkName))
	case "char":
		in.kind = unix.S_IFCHR
	case "block":
		in.kind = unix.S_IFBLK
	case "fifo":
		in.kind = unix.S_IFIFO
	default:
		return 0, e.unsupported("has the type %.20q", e.kind)
	}
	if in.kind == unix.S_IFCHR || in.kind == unix.S_IFBLK {
		if e.devMajor < 0 || e.devMajor > maxMajor || e.devMinor < 0 || e.devMinor > maxMinor {
			return 0, e.invalid("has the device number %d:%d", e.devMajor, e.devMinor)
		}
		major, minor := uint32(e.devMajor), uint32(e.devMinor)
		in.rdev = minor&0xff | major<<8 | minor&^0xff<<12 // the kernel's new_encode_dev
	}
	if in.kind != 0 {
		if err := t.attributes(e, &in); err != nil {
			return 0, err
		}
	}
	return t.addInode(in), nil
}

// attributes sets what an entry says of owner, mode, time and extended attributes.
// Those that were there before and it does not name stay, as setxattr leaves them.
func (t *tree) attributes(e *tocEntry, in *inode) error {
	const maxID = 1<<32 - 1
	if e.uid < 0 || e.uid > maxID || e.gid < 0 || e.gid > maxID {
		return e.invalid("belongs to %d:%d", e.uid, e.gid)
	}
	in.uid, in.gid = uint32(e.uid), uint32(e.gid)
	in.mode = uint16(e.mode & permissionSet)
	if in.kind == unix.S_IFLNK {
		in.mode = 0o777 // there is no lchmod
	}
	switch text := string(e.modTime); text {
	case "":
		in.mtime = 0 // the format leaves it out
	case t.lastTime.text:
		in.mtime = t.lastTime.unix
	default:
		at, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return e.invalid("has the time %.40q", text)
		}
		if in.mtime = at.Unix(); in.mtime < 0 || in.mtime > maxTime {
			in.mtime = 0 // as containerd sets it
		}
		t.lastTime.text, t.lastTime.unix = text, in.mtime
	}
	set, err := t.xattrs.parse(e, in.kind != unix.S_IFREG && in.kind != unix.S_IFDIR)
	if err != nil {
		return err
	}
	in.xattrs, err = t.xattrs.join(e, in.xattrs, set)
	return err
}

// link finds the target of a hard link. One that is not there yet is looked for at the end.
func (t *tree) link(e *tocEntry, n uint32) error {
	target, found := t.lookup(t.inodes[t.nodes[n].inode].link)
	if !found || t.inodes[t.nodes[target].inode].kind == 0 {
		t.pending = append(t.pending, n)
		return nil
	}
	if t.isDir(target) {
		return e.invalid("is a hard link to a directory, %.100q", e.linkName)
	}
	t.nodes[n].inode = t.nodes[target].inode
	return t.attributes(e, &t.inodes[t.nodes[n].inode])
}

// lookup finds the name that a hard link points to.
func (t *tree) lookup(p string) (uint32, bool) {
	at := uint32(0)
	for component := range strings.SplitSeq(p, "/") {
		next, found := t.byName[childKey{at, component}]
		if !found {
			return 0, false
		}
		at = next
	}
	return at, t.nodes[at].inode != whiteoutInode
}

// finishLinks finds the targets of the hard links that came before them.
func (t *tree) finishLinks() error {
	waits := func(n uint32) bool { return t.inodes[t.nodes[n].inode].kind == 0 }
	for _, n := range t.pending {
		if t.nodes[n].dead {
			continue
		}
		var way []uint32
		at := n
		for waits(at) {
			way = append(way, at)
			link := t.inodes[t.nodes[at].inode].link
			next, found := t.lookup(link)
			switch {
			case !found:
				return fmt.Errorf("%w: TOC: hard link %.100q to %.100q, which is not in the layer", accel.ErrInvalid, t.nodes[at].name, link)
			case t.isDir(next):
				return fmt.Errorf("%w: TOC: hard link %.100q to the directory %.100q", accel.ErrInvalid, t.nodes[at].name, link)
			case len(way) > len(t.pending):
				return fmt.Errorf("%w: TOC: hard link %.100q in a circle", accel.ErrInvalid, t.nodes[n].name)
			}
			at = next
		}
		for _, w := range way {
			t.nodes[w].inode = t.nodes[at].inode
		}
	}
	return nil
}

// countLinks counts the names of each inode. One without any was replaced.
func (t *tree) countLinks() {
	t.inodes[rootInode].links = 2
	for i := 1; i < len(t.nodes); i++ {
		n := &t.nodes[i]
		switch in := &t.inodes[n.inode]; {
		case n.dead:
		case in.kind == unix.S_IFDIR:
			in.links += 2
			t.inodes[t.nodes[n.parent].inode].links++
		default:
			in.links++
		}
	}
}
