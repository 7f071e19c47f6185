package lazyfs

import (
	"bytes"
	"fmt"
	"math"

	"accel"

	"golang.org/x/sys/unix"
)

// Bounds of content, beside those of package accel.
const (
	// maxInnerBytes bounds what has to be inflated to get at a chunk inside of a member.
	maxInnerBytes = 256 << 20
	// gzipRatio is how much deflate can shrink at best: 258 bytes by two bits.
	gzipRatio = 1032
)

// noFile stands for a file whose content nobody wants.
const noFile = math.MaxUint32

// content is the layer's chunks as they come, and the file and gzip member that
// are open.
type content struct {
	tocOffset int64
	chunks    []accel.Chunk

	file      uint32 // its inode, or noFile
	isFile    bool   // "chunk" entries may follow
	name      []byte
	sizeBytes int64
	doneBytes int64 // how much of it has chunks so far

	member      int64 // where the open member begins in the blob
	memberFirst int   // the first of its chunks
	innerEnd    int64 // where the last of its chunks ends in what it inflates to; 0: no member yet
}

// begin opens a file: the entry has its first chunk. Any other entry that was left
// out may come here too, with noFile.
func (c *content) begin(e *tocEntry, in uint32, firstChunk *uint32) error {
	c.isFile = string(e.kind) == "reg"
	if !c.isFile {
		return nil
	}
	if e.size < 0 || e.size > maxDataBytes {
		return e.invalid("has %d bytes", e.size)
	}
	c.file, c.name, c.sizeBytes, c.doneBytes = in, e.name, e.size, 0
	*firstChunk = uint32(len(c.chunks))
	if e.size == 0 {
		return nil
	}
	return c.add(e)
}

// more takes a "chunk" entry. They follow their file at once.
func (c *content) more(e *tocEntry) error {
	if !c.isFile || (len(e.name) > 0 && !bytes.Equal(e.name, c.name) && !bytes.Equal(clean(e.name), clean(c.name))) {
		return e.invalid("is a chunk without its file")
	}
	return c.add(e)
}

// end closes the file that is open.
func (c *content) end() error {
	if c.isFile && c.doneBytes != c.sizeBytes {
		return fmt.Errorf("%w: TOC: file %.100q has chunks for %d of its %d bytes", accel.ErrInvalid, c.name, c.doneBytes, c.sizeBytes)
	}
	c.isFile = false
	return nil
}

func (c *content) add(e *tocEntry) error {
	bytesLeft, n := c.sizeBytes-c.doneBytes, e.chunkSize
	if n == 0 {
		n = bytesLeft // as the format has it
	}
	switch {
	case e.chunkOffset != c.doneBytes || n <= 0 || n > bytesLeft:
		return e.invalid("has a chunk of %d bytes at %d of %d, the last one ended at %d", e.chunkSize, e.chunkOffset, c.sizeBytes, c.doneBytes)
	case e.offset < 0 || e.offset >= c.tocOffset || e.innerOffset < 0:
		return e.invalid("is at %d (%d), outside of the %d bytes of content", e.offset, e.innerOffset, c.tocOffset)
	case n > accel.MaxChunkBytes:
		return e.unsupported("has a chunk of %d bytes, more than %d", n, accel.MaxChunkBytes)
	case e.innerOffset > maxInnerBytes-n:
		return e.unsupported("shares a gzip member of more than %d bytes", maxInnerBytes)
	case len(c.chunks) == accel.MaxLayerChunks:
		return e.unsupported("is more than %d chunks", accel.MaxLayerChunks)
	}
	if c.innerEnd > 0 && (e.offset < c.member || (e.offset == c.member && e.innerOffset < c.innerEnd)) {
		return e.invalid("is at %d (%d), before the end of the chunk before it", e.offset, e.innerOffset)
	}
	if c.innerEnd == 0 || e.offset > c.member {
		if err := c.endMember(e.offset); err != nil {
			return err
		}
		c.member, c.memberFirst = e.offset, len(c.chunks)
	}
	c.innerEnd = e.innerOffset + n
	c.doneBytes += n
	if c.file == noFile {
		return nil
	}
	text := e.chunkDigest
	if len(text) == 0 && n == c.sizeBytes {
		text = e.digest
	}
	sum, ok := parseDigest(text)
	if !ok {
		return e.unsupported("has a chunk without a SHA-256 digest")
	}
	c.chunks = append(c.chunks, accel.Chunk{BlobOffset: e.offset, InnerOffset: e.innerOffset, Bytes: n, Digest: sum})
	return nil
}

// endMember tells the open member's chunks how long it is: until the next one, or
// until the TOC.
func (c *content) endMember(next int64) error {
	if c.innerEnd > (next-c.member)*gzipRatio {
		return fmt.Errorf("%w: TOC: %d bytes of content in the %d bytes at %d, more than gzip can hold", accel.ErrInvalid, c.innerEnd, next-c.member, c.member)
	}
	if next-c.member > accel.MaxMemberBytes && c.memberFirst < len(c.chunks) {
		return fmt.Errorf("%w: TOC: %d bytes of the blob at %d for one chunk, more than %d", ErrUnsupported, next-c.member, c.member, accel.MaxMemberBytes)
	}
	for i := range c.chunks[c.memberFirst:] {
		c.chunks[c.memberFirst+i].BlobBytes = next - c.member
	}
	return nil
}

// placeContent gives every file that still has a name its place in the data file,
// in the layer's order, so that a fill from the blob's front to its end writes in
// order too. Chunks of files that were replaced go.
func (t *tree) placeContent() (dataBytes int64, err error) {
	kept := t.content.chunks[:0]
	for i := range t.inodes {
		in := &t.inodes[i]
		if in.kind != unix.S_IFREG || in.links == 0 || in.sizeBytes == 0 {
			continue
		}
		if in.sizeBytes > maxDataBytes-dataBytes {
			return 0, fmt.Errorf("%w: more than %d bytes of content", ErrUnsupported, int64(maxDataBytes))
		}
		in.dataOffset = dataBytes
		at := dataBytes
		for _, c := range t.content.chunks[in.first:] {
			if at == dataBytes+in.sizeBytes {
				break
			}
			c.DataOffset = at
			at += c.Bytes
			kept = append(kept, c)
		}
		dataBytes += alignUp(in.sizeBytes, BlockBytes)
	}
	t.content.chunks = kept
	return dataBytes, nil
}

func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }
