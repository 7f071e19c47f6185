package lazyfs

import (
	"cmp"
	"slices"
	"strings"

	"accel"

	"golang.org/x/sys/unix"
)

// File finds a regular file that has content by its clean path below the layer's root, and tells what EachEntry would of
// it, but for its digest. Hard links are files here. It is there for who wants to know of few files, right after
// Build: nothing of the TOC is read again.
func (l *Layout) File(path string) (Entry, bool) {
	m := l.image
	at := m.inodes[rootInode]
	for component := range strings.SplitSeq(path, "/") {
		if at.kind != unix.S_IFDIR {
			return Entry{}, false
		}
		names := m.children[at.first : at.first+at.count]
		i, found := slices.BinarySearchFunc(names, component, func(n uint32, name string) int { return cmp.Compare(m.nodes[n].name, name) })
		if !found {
			return Entry{}, false
		}
		at = m.inodes[m.nodes[names[i]].inode]
	}
	if at.kind != unix.S_IFREG || at.sizeBytes == 0 {
		return Entry{}, false
	}
	i, _ := slices.BinarySearchFunc(l.chunks, at.dataOffset, func(c accel.Chunk, to int64) int { return cmp.Compare(c.DataOffset, to) })
	c := l.chunks[i]
	return Entry{Type: "reg", Name: path, Size: at.sizeBytes, Offset: c.BlobOffset, InnerOffset: c.InnerOffset}, true
}
