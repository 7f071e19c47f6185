package bundle

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"slices"

	"accel"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

// maxTOCBytes bounds a TOC as JSON: some 600,000 entries.
const maxTOCBytes = 256 << 20

// unpackTOC takes the JSON out of the gzip member and its tar entry, and checks its digest.
func unpackTOC(packed []byte, want digest.Digest) ([]byte, error) {
	zr, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	zr.Multistream(false)
	tr := tar.NewReader(zr)
	h, err := tr.Next()
	if err != nil {
		return nil, err
	}
	if h.Size <= 0 || h.Size > maxTOCBytes {
		return nil, fmt.Errorf("%w: a TOC of %d bytes", accel.ErrInvalid, h.Size)
	}
	var toc bytes.Buffer
	if _, err := io.Copy(&toc, tr); err != nil {
		return nil, err
	}
	if got := digest.FromBytes(toc.Bytes()); got != want {
		return nil, fmt.Errorf("%w: the TOC has digest %s, not %s", accel.ErrInvalid, got, want)
	}
	return toc.Bytes(), nil
}

// table is where a layer's files have their chunks.
type table struct {
	files map[string][]placed // in a file's order
	ends  []int64             // where gzip members begin, and the TOC, ascending
}

// placed is a chunk of a file.
type placed struct {
	Chunk
	offset int64 // in the file
	digest digest.Digest
}

// newTable reads a TOC. What makes no sense in it is left out: it is read as not hot.
func newTable(layer int, toc []byte, tocOffset int64) (*table, error) {
	var in struct {
		Entries []struct {
			Name        string        `json:"name"`
			Type        string        `json:"type"`
			Size        int64         `json:"size"`
			Offset      int64         `json:"offset"`
			InnerOffset int64         `json:"innerOffset"`
			ChunkOffset int64         `json:"chunkOffset"`
			ChunkSize   int64         `json:"chunkSize"`
			ChunkDigest digest.Digest `json:"chunkDigest"`
		} `json:"entries"`
	}
	if err := json.Unmarshal(toc, &in); err != nil {
		return nil, fmt.Errorf("%w: TOC: %w", accel.ErrInvalid, err)
	}
	t := &table{files: map[string][]placed{}, ends: []int64{tocOffset}}
	sizes := map[string]int64{}
	for i := range in.Entries {
		e := &in.Entries[i]
		name := path.Clean("/" + e.Name)[1:]
		switch e.Type {
		case "reg":
			sizes[name] = e.Size
			delete(t.files, name) // a later entry replaces an earlier one
			if e.Size == 0 {
				continue
			}
		case "chunk":
		default:
			continue
		}
		c := placed{Chunk: Chunk{Layer: layer, BlobOffset: e.Offset, InnerOffset: e.InnerOffset, Bytes: e.ChunkSize}, offset: e.ChunkOffset, digest: e.ChunkDigest}
		if c.Bytes == 0 {
			c.Bytes = sizes[name] - c.offset
		}
		if c.BlobOffset <= 0 || c.BlobOffset >= tocOffset {
			continue
		}
		t.ends = append(t.ends, c.BlobOffset)
		if c.offset >= 0 && c.Bytes > 0 && c.Bytes <= maxChunkBytes && c.InnerOffset >= 0 && c.InnerOffset <= maxChunkBytes {
			t.files[name] = append(t.files[name], c)
		}
	}
	slices.Sort(t.ends)
	t.ends = slices.Compact(t.ends)
	return t, nil
}

// end is where the gzip members at an offset end.
func (t *table) end(offset int64) int64 {
	n, _ := slices.BinarySearch(t.ends, offset+1)
	return t.ends[min(n, len(t.ends)-1)]
}

// hot are the chunks of what a profile names, each once, in its order, for as many bytes as are left; of equal ones the first.
func hot(tables []*table, items []accel.ProfileItem, left int64) (chunks []placed) {
	named, contents := map[Chunk]bool{}, map[digest.Digest]bool{}
	for _, i := range items {
		if i.Layer < 0 || i.Layer >= len(tables) {
			continue
		}
		for _, c := range tables[i.Layer].files[i.Path] {
			if c.offset >= i.Offset+i.Bytes || c.offset+c.Bytes <= i.Offset || named[c.Chunk] {
				continue
			}
			if named[c.Chunk] = true; contents[c.digest] {
				continue
			}
			contents[c.digest] = true
			if left -= c.Bytes; left < 0 || len(chunks) == maxChunks {
				return chunks
			}
			chunks = append(chunks, c)
		}
	}
	return chunks
}
