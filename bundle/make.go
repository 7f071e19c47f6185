package bundle

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"accel"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

const (
	// maxPackedTOCBytes bounds a TOC as it is in the blob.
	maxPackedTOCBytes = 64 << 20
	// Chunks that follow each other in the blob are read together, up to runBytes and over gaps of gapBytes.
	runBytes = 4 << 20
	gapBytes = 32 << 10
)

// Range reads bytes of one of the image's layers, in its converted form.
type Range func(ctx context.Context, layer int, offset, bytes int64) ([]byte, error)

// Made is a bundle and what an artifact says of it.
type Made struct {
	Description
	Content []byte
}

// Make makes the bundle of an image, by its mapping and its profile, within bounds: of a larger one what is used last
// is left out. Equal input gives equal bytes. The error is ErrTooLarge, accel.ErrInvalid where the blobs are not what the mapping
// says or a layer has no TOC, or read's.
func Make(ctx context.Context, layers []accel.LayerMapping, items []accel.ProfileItem, read Range, most Bounds) (Made, error) {
	tables, tocs := make([]*table, len(layers)), make([][]byte, len(layers))
	for n, l := range layers {
		bytes := l.TargetBytes - l.TOCOffset
		if l.TOCDigest == "" || l.TOCOffset <= 0 || bytes <= 0 || bytes > maxPackedTOCBytes {
			return Made{}, fmt.Errorf("%w: layer %s has no TOC that counts", accel.ErrInvalid, l.Target)
		}
		packed, err := read(ctx, n, l.TOCOffset, bytes)
		if err != nil {
			return Made{}, err
		}
		if tocs[n], err = unpackTOC(packed, l.TOCDigest); err != nil {
			return Made{}, fmt.Errorf("layer %s: %w", l.Target, err)
		}
		if tables[n], err = newTable(n, tocs[n], l.TOCOffset); err != nil {
			return Made{}, fmt.Errorf("layer %s: %w", l.Target, err)
		}
	}
	p := &packer{ctx: ctx, read: read, tables: tables, chunks: hot(tables, items, most.ContentBytes)}
	chunks := make([]Chunk, len(p.chunks))
	for i, c := range p.chunks {
		chunks[i] = c.Chunk
	}
	content, h, err := write(tocs, chunks, p.next, most.SizeBytes)
	if err != nil {
		return Made{}, err
	}
	return Made{Description: describe(h, content), Content: content}, nil
}

// packer reads the chunks in their order.
type packer struct {
	ctx    context.Context
	read   Range
	tables []*table
	chunks []placed // those to come

	run      []byte // of the blob
	layer    int
	from     int64
	member   []byte // inflated, as far as it was needed
	memberAt int64  // 0: none
}

// next is the content of the next chunk, which is c.
func (p *packer) next(c Chunk) ([]byte, error) {
	this := p.chunks[0]
	end := p.tables[c.Layer].end(c.BlobOffset)
	if p.layer != c.Layer || c.BlobOffset < p.from || end > p.from+int64(len(p.run)) {
		if err := p.fetch(); err != nil {
			return nil, err
		}
	}
	p.chunks = p.chunks[1:]
	if need := c.InnerOffset + c.Bytes; p.memberAt != c.BlobOffset || need > int64(len(p.member)) {
		zr, err := gzip.NewReader(bytes.NewReader(p.run[c.BlobOffset-p.from : end-p.from]))
		if err != nil {
			return nil, fmt.Errorf("%w: a chunk at %d: %w", accel.ErrInvalid, c.BlobOffset, err)
		}
		// A little more than is needed: the next chunk may be in it.
		p.memberAt = 0
		if p.member, err = io.ReadAll(io.LimitReader(zr, need+mostFrameBytes)); err != nil {
			return nil, fmt.Errorf("%w: a chunk at %d: %w", accel.ErrInvalid, c.BlobOffset, err)
		}
		if p.memberAt = c.BlobOffset; need > int64(len(p.member)) {
			return nil, fmt.Errorf("%w: a chunk at %d ends early", accel.ErrInvalid, c.BlobOffset)
		}
	}
	content := p.member[c.InnerOffset : c.InnerOffset+c.Bytes]
	if digest.FromBytes(content) != this.digest {
		return nil, fmt.Errorf("%w: a chunk at %d does not have its digest", accel.ErrInvalid, c.BlobOffset)
	}
	return content, nil
}

// fetch reads the next chunk's members, and those of the chunks that follow it where they lie behind.
func (p *packer) fetch() (err error) {
	first := p.chunks[0]
	t := p.tables[first.Layer]
	from, end := first.BlobOffset, t.end(first.BlobOffset)
	for _, c := range p.chunks[1:] {
		after := t.end(c.BlobOffset)
		if c.Layer != first.Layer || c.BlobOffset < from || c.BlobOffset > end+gapBytes || after-from > runBytes {
			break
		}
		end = max(end, after)
	}
	p.run, err = p.read(p.ctx, first.Layer, from, end-from)
	p.layer, p.from, p.memberAt = first.Layer, from, 0
	if err == nil && int64(len(p.run)) != end-from {
		err = fmt.Errorf("%w: %d bytes of a blob, not %d", accel.ErrInvalid, len(p.run), end-from)
	}
	return err
}
