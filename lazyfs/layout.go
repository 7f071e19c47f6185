package lazyfs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"accel"
)

// BlockBytes is the file system's block: a file's content begins at a multiple of
// it, and the data file ends at one.
const BlockBytes = 4096

// maxDataBytes bounds a layer's data file.
const maxDataBytes = 1 << 40

// maxBlobBytes bounds where things are in a blob, so that sums do not overflow.
const maxBlobBytes = 1 << 48

// Files are the three files of one layer on disk.
type Files struct {
	Meta  string // the EROFS image: names and inodes, no content
	Table string // the chunk table
	Data  string // sparse, with the content of all regular files
}

// Layout is what a layer's files will be: the same for the same TOC, byte by byte.
type Layout struct {
	image     *image
	chunks    []accel.Chunk // in the data file's order
	dataBytes int64
}

// Build makes a layer's layout from its TOC: the JSON, whose digest was checked, and
// where it begins in the blob, which is where content ends. It keeps no part of toc.
//
// The error is accel.ErrInvalid where the TOC is not one that a converter writes, and
// ErrUnsupported where the layer has to be unpacked as ever. A layer has at most
// 2,097,152 names, and as many chunks of up to 16 MiB in up to 32 MiB of the blob (accel.MaxLayerChunks and
// others); its content is up to 1 TiB; paths and names are bounded as Linux does.
func Build(toc []byte, tocOffset int64) (*Layout, error) {
	if tocOffset < 0 || tocOffset > maxBlobBytes {
		return nil, fmt.Errorf("%w: a TOC at %d", accel.ErrInvalid, tocOffset)
	}
	t := newTree(len(toc))
	t.content.tocOffset = tocOffset
	if err := decodeTOC(toc, t.add); err != nil {
		return nil, err
	}
	if err := t.finish(); err != nil {
		return nil, err
	}
	dataBytes, err := t.placeContent()
	if err != nil {
		return nil, err
	}
	// Overlayfs tells file systems apart by it.
	var uuid [16]byte
	sum := sha256.Sum256(toc)
	copy(uuid[:], sum[:])
	return &Layout{image: planImage(t, dataBytes, uuid), chunks: t.content.chunks, dataBytes: dataBytes}, nil
}

// finish does what needs all entries.
func (t *tree) finish() error {
	if err := t.content.end(); err != nil {
		return err
	}
	if err := t.content.endMember(t.content.tocOffset); err != nil {
		return err
	}
	if err := t.finishLinks(); err != nil {
		return err
	}
	if err := t.finishWhiteouts(); err != nil {
		return err
	}
	t.countLinks()
	t.byName, t.content.name = nil, nil
	return nil
}

// Chunks is how many chunks the layer has.
func (l *Layout) Chunks() int { return len(l.chunks) }

// DataBytes is the size of the data file.
func (l *Layout) DataBytes() int64 { return l.dataBytes }

// FilesBytes is what all three files take once the data file has no holes left.
func (l *Layout) FilesBytes() int64 {
	return l.image.sizeBytes + tableHeaderBytes + int64(len(l.chunks))*recordBytes + l.dataBytes
}

// Store writes Meta and Table, and gives Data its size; what Data holds already
// stays, so that lost files can be made again beside it. Nothing is synced: a container waits, and the caller, whose
// directory it is, syncs the files together.
func (l *Layout) Store(f Files) error {
	if err := writeFile(f.Meta, l.image.writeImage); err != nil {
		return fmt.Errorf("write the layer's metadata: %w", err)
	}
	err := writeFile(f.Table, func(w io.Writer) error {
		return writeTable(w, l.dataBytes, len(l.chunks), func(i int) accel.Chunk { return l.chunks[i] })
	})
	if err != nil {
		return fmt.Errorf("write the layer's chunk table: %w", err)
	}
	if err := l.makeData(f.Data); err != nil {
		return fmt.Errorf("make the layer's data file: %w", err)
	}
	return nil
}

func writeFile(path string, write func(io.Writer) error) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := write(file); err != nil {
		return errors.Join(err, file.Close())
	}
	return file.Close()
}

func (l *Layout) makeData(path string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(file.Truncate(l.dataBytes), file.Close())
}
