package lazyfs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// writeImage writes the image from its front to its end.
func (m *image) writeImage(w io.Writer) error {
	out := &imageWriter{w: bufio.NewWriterSize(w, 256<<10)}
	out.put(m.superBlock())
	var buffer []byte
	var entries []dirent
	for i, id := range m.order {
		in := &m.inodes[id]
		p := &in.meta
		out.pad(p.at)
		buffer = m.appendInode(buffer[:0], in, uint32(i+1))
		buffer = m.appendXattrs(buffer, in)
		switch {
		case p.layout == layoutChunked:
			buffer = appendChunks(buffer, in)
		case p.layout == layoutInline && in.kind == unix.S_IFLNK:
			buffer = append(buffer, in.link...)
		case p.layout == layoutInline:
			entries = m.dirents(in, entries[:0])
			last := entries
			for n, _ := blockOf(last); n < len(last); n, _ = blockOf(last) {
				last = last[n:]
			}
			buffer = m.appendDirents(buffer, last)
		}
		out.put(buffer)
	}
	for _, id := range m.order {
		in := &m.inodes[id]
		if in.meta.blocks() == 0 {
			continue
		}
		out.pad(in.meta.block * BlockBytes)
		if in.kind == unix.S_IFLNK {
			out.put([]byte(in.link))
			continue
		}
		entries = m.dirents(in, entries[:0])
		for range in.meta.blocks() {
			n, _ := blockOf(entries)
			buffer = m.appendDirents(buffer[:0], entries[:n])
			entries = entries[n:]
			out.put(buffer)
			out.pad(alignUp(out.at, BlockBytes))
		}
	}
	out.pad(m.sharedAt)
	for _, x := range m.shared {
		out.put(x.append(buffer[:0]))
	}
	out.pad(m.sizeBytes)
	if out.err != nil {
		return out.err
	}
	return out.w.Flush()
}

// imageWriter knows how far it is.
type imageWriter struct {
	w   *bufio.Writer
	at  int64
	err error
}

func (w *imageWriter) put(b []byte) {
	if w.err == nil {
		_, w.err = w.w.Write(b)
		w.at += int64(len(b))
	}
}

var zeros [BlockBytes]byte

// pad writes zeros until to, which is not far.
func (w *imageWriter) pad(to int64) {
	if w.err == nil && to < w.at {
		w.err = fmt.Errorf("EROFS image: at %d, want to be at %d", w.at, to)
	}
	for w.err == nil && w.at < to {
		w.put(zeros[:min(to-w.at, BlockBytes)])
	}
}

func (m *image) appendInode(b []byte, in *inode, number uint32) []byte {
	p := &in.meta
	le := binary.LittleEndian
	format := p.layout << layoutShift
	if p.extended {
		format |= formatExtended
	}
	attributes := uint16(0)
	if size := m.sets[in.xattrs].sizeBytes; size > 0 {
		attributes = uint16((size-xattrHeaderBytes)/4 + 1)
	}
	union := in.rdev
	switch {
	case p.layout == layoutChunked:
		bits, _ := chunksOf(in.sizeBytes)
		union = uint32(bits | chunkIndexes)
	case p.blocks() > 0:
		union = uint32(p.block)
	}
	links := uint16(in.links)
	if p.extended {
		links = 0 // stands further behind
	}
	b = le.AppendUint16(b, format)
	b = le.AppendUint16(b, attributes)
	b = le.AppendUint16(b, in.kind|in.mode)
	b = le.AppendUint16(b, links)
	if !p.extended {
		b = le.AppendUint32(b, uint32(p.sizeBytes))
		b = le.AppendUint32(b, 0) // seconds since epoch, for kernels that know them
		b = le.AppendUint32(b, union)
		b = le.AppendUint32(b, number)
		b = le.AppendUint16(b, uint16(in.uid))
		b = le.AppendUint16(b, uint16(in.gid))
		return le.AppendUint32(b, 0)
	}
	b = le.AppendUint64(b, uint64(p.sizeBytes))
	b = le.AppendUint32(b, union)
	b = le.AppendUint32(b, number)
	b = le.AppendUint32(b, in.uid)
	b = le.AppendUint32(b, in.gid)
	b = le.AppendUint64(b, uint64(in.mtime))
	b = le.AppendUint32(b, 0) // nanoseconds: the TOC has none
	b = le.AppendUint32(b, in.links)
	return append(b, zeros[:16]...)
}

func (m *image) appendXattrs(b []byte, in *inode) []byte {
	set := &m.sets[in.xattrs]
	if set.sizeBytes == 0 {
		return b
	}
	b = append(b, 0, 0, 0, 0, byte(len(set.shared)), 0, 0, 0, 0, 0, 0, 0)
	for _, number := range set.shared {
		b = binary.LittleEndian.AppendUint32(b, number)
	}
	for _, x := range set.inline {
		b = x.append(b)
	}
	return b
}

func (x *xattr) append(b []byte) []byte {
	end := len(b) + int(x.bytes())
	b = append(b, byte(len(x.name)), x.prefix)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(x.value)))
	b = append(b, x.name...)
	b = append(b, x.value...)
	return append(b, zeros[:end-len(b)]...)
}

// appendChunks writes where the file is in the data file.
func appendChunks(b []byte, in *inode) []byte {
	b = append(b, zeros[:alignUp(int64(len(b)), chunkIndexBytes)-int64(len(b))]...)
	bits, indexes := chunksOf(in.sizeBytes)
	for i := range indexes {
		b = append(b, 0, 0, dataDevice, 0)
		b = binary.LittleEndian.AppendUint32(b, uint32(in.dataOffset/BlockBytes+i<<bits))
	}
	return b
}

// appendDirents writes one block of a directory: the entries, then their names.
func (m *image) appendDirents(b []byte, entries []dirent) []byte {
	nameAt := len(entries) * direntBytes
	for _, d := range entries {
		in := &m.inodes[d.inode]
		b = binary.LittleEndian.AppendUint64(b, in.meta.number())
		b = binary.LittleEndian.AppendUint16(b, uint16(nameAt))
		b = append(b, fileTypes[in.kind], 0)
		nameAt += len(d.name)
	}
	for _, d := range entries {
		b = append(b, d.name...)
	}
	return b
}
