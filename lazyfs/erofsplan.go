package lazyfs

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// image is a layer's EROFS image before it is written: everything has its place.
type image struct {
	*tree
	uuid      [16]byte
	dataBytes int64
	epoch     int64    // the time that compact inodes have
	order     []uint32 // inodes as they follow each other
	children  []uint32 // names in order, directory by directory
	sets      []xattrPlan
	shared    []xattr
	sharedAt  int64
	sizeBytes int64
}

// dirent is an entry of a directory.
type dirent struct {
	name  string
	inode uint32
}

// planImage gives every inode its place. The tree is complete.
func planImage(t *tree, dataBytes int64, uuid [16]byte) *image {
	m := &image{tree: t, dataBytes: dataBytes, uuid: uuid}
	m.setOrder()
	m.setEpoch()
	m.planXattrs()
	at := int64(firstInodeAt)
	for _, id := range m.order {
		at = m.placeInode(&m.inodes[id], at)
	}
	at = alignUp(at, BlockBytes)
	for _, id := range m.order {
		if p := &m.inodes[id].meta; p.blocks() > 0 {
			p.block = at / BlockBytes
			at += p.blocks() * BlockBytes
		}
	}
	m.sharedAt = at
	for _, x := range m.shared {
		at += x.bytes()
	}
	m.sizeBytes = alignUp(at, BlockBytes)
	return m
}

// setOrder puts the inodes of each directory side by side, so that listing one with
// attributes reads few blocks.
func (m *image) setOrder() {
	m.order = make([]uint32, 0, len(m.inodes))
	m.children = make([]uint32, 0, len(m.nodes))
	seen := make([]bool, len(m.inodes))
	m.order = append(m.order, rootInode)
	dirs := []uint32{0}
	var entries []dirent
	for i := 0; i < len(dirs); i++ {
		n := &m.nodes[dirs[i]]
		in := &m.inodes[n.inode]
		in.meta.node = dirs[i]
		in.first = uint32(len(m.children))
		for c := n.child; c != 0; c = m.nodes[c].next {
			if !m.nodes[c].dead {
				m.children = append(m.children, c)
			}
		}
		names := m.children[in.first:]
		in.count = uint32(len(names))
		slices.Reverse(names) // as they came, which is mostly sorted
		slices.SortFunc(names, func(a, b uint32) int { return strings.Compare(m.nodes[a].name, m.nodes[b].name) })
		for _, c := range names {
			id := m.nodes[c].inode
			if !seen[id] {
				seen[id] = true
				m.order = append(m.order, id)
			}
			if m.inodes[id].kind == unix.S_IFDIR {
				dirs = append(dirs, c)
			}
		}
		entries = m.dirents(in, entries[:0])
		in.meta.sizeBytes = direntsBytes(entries)
	}
}

// setEpoch takes the time that most inodes have: those are half as large.
func (m *image) setEpoch() {
	count := map[int64]int{}
	for _, id := range m.order {
		count[m.inodes[id].mtime]++
	}
	most := 0
	for at, n := range count {
		if n > most || (n == most && at < m.epoch) {
			m.epoch, most = at, n
		}
	}
}

// placeInode sets where the inode is, and returns where the next one may be.
func (m *image) placeInode(in *inode, at int64) int64 {
	p := &in.meta
	switch in.kind {
	case unix.S_IFREG:
		p.sizeBytes = in.sizeBytes
	case unix.S_IFLNK:
		p.sizeBytes = int64(len(in.link))
	}
	p.extended = in.mtime != m.epoch || in.uid > maxCompact16 || in.gid > maxCompact16 ||
		in.links > maxCompact16 || p.sizeBytes > maxCompact32
	header := p.inodeBytes() + m.sets[in.xattrs].sizeBytes
	tail := int64(0)
	switch {
	case in.kind == unix.S_IFREG && p.sizeBytes > 0:
		p.layout = layoutChunked
		_, indexes := chunksOf(p.sizeBytes)
		header = alignUp(header, chunkIndexBytes) + indexes*chunkIndexBytes
	case in.kind == unix.S_IFDIR || in.kind == unix.S_IFLNK:
		// What stands behind an inode may not cross a block's border.
		if tail = p.sizeBytes % BlockBytes; tail > 0 && header+tail <= BlockBytes {
			p.layout = layoutInline
		} else {
			tail = 0
		}
	}
	if at%BlockBytes+p.inodeBytes() > BlockBytes || (tail > 0 && (at+header)%BlockBytes+tail > BlockBytes) {
		at = alignUp(at, BlockBytes)
	}
	p.at = at
	return alignUp(at+header+tail, slotBytes)
}

// chunksOf is how EROFS is told of a file of that size, which is in one piece: with
// chunks as large as may be.
func chunksOf(sizeBytes int64) (bits uint16, indexes int64) {
	blocks := alignUp(sizeBytes, BlockBytes) / BlockBytes
	for bits < maxChunkBits && int64(1)<<bits < blocks {
		bits++
	}
	return bits, (blocks + 1<<bits - 1) >> bits
}

// dirents are a directory's entries in order, appended to to.
func (m *image) dirents(in *inode, to []dirent) []dirent {
	for _, c := range m.children[in.first : in.first+in.count] {
		to = append(to, dirent{m.nodes[c].name, m.nodes[c].inode})
	}
	n := &m.nodes[in.meta.node]
	for _, dot := range []dirent{{".", n.inode}, {"..", m.nodes[n.parent].inode}} {
		at, _ := slices.BinarySearchFunc(to, dot.name, func(d dirent, name string) int { return strings.Compare(d.name, name) })
		to = slices.Insert(to, at, dot)
	}
	return to
}

// blockOf is how many of the entries go into the first block, and how much of it they take.
func blockOf(entries []dirent) (count, sizeBytes int) {
	for _, d := range entries {
		if sizeBytes+direntBytes+len(d.name) > BlockBytes {
			break
		}
		sizeBytes += direntBytes + len(d.name)
		count++
	}
	return count, sizeBytes
}

func direntsBytes(entries []dirent) (total int64) {
	for {
		count, sizeBytes := blockOf(entries)
		if entries = entries[count:]; len(entries) == 0 {
			return total + int64(sizeBytes)
		}
		total += BlockBytes
	}
}

// xattrPlan is how one set of attributes is written.
type xattrPlan struct {
	inline    []xattr
	shared    []uint32 // numbers in the shared area
	sizeBytes int64
}

func (x *xattr) bytes() int64 { return alignUp(int64(xattrEntryBytes+len(x.name)+len(x.value)), 4) }

// planXattrs shares what more than one inode has: there it takes 4 bytes for each,
// with SELinux labels instead of 40.
func (m *image) planXattrs() {
	used := make([]int, len(m.xattrs.sets))
	for _, id := range m.order {
		used[m.inodes[id].xattrs]++
	}
	count := map[xattr]int{}
	for i, set := range m.xattrs.sets {
		if used[i] == 0 {
			continue
		}
		for _, x := range set {
			count[x] += used[i]
		}
	}
	numbers := map[xattr]uint32{}
	at := int64(0)
	m.sets = make([]xattrPlan, len(m.xattrs.sets))
	for i, set := range m.xattrs.sets {
		if used[i] == 0 || len(set) == 0 {
			continue
		}
		p := &m.sets[i]
		p.sizeBytes = xattrHeaderBytes
		for _, x := range set {
			if count[x] < 2 || len(p.shared) == maxSharedXattrs {
				p.inline = append(p.inline, x)
				p.sizeBytes += x.bytes()
				continue
			}
			number, known := numbers[x]
			if !known {
				number = uint32(at / 4)
				numbers[x] = number
				m.shared = append(m.shared, x)
				at += x.bytes()
			}
			p.shared = append(p.shared, number)
			p.sizeBytes += 4
		}
	}
}
