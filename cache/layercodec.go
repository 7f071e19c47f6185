package cache

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"
)

// Fields of rows about layers, beside those of blobs.
const (
	fieldChunks = iota + 100
	fieldDataBytes
	fieldFile // repeated: size and checksum of Meta, Table and TOC
)

// fileRowBytes is the length of a fieldFile.
const fileRowBytes = 8 + 4

// layerInfo is what never changes of a layer. It stands in the index, and beside the layer's files (sealed like
// a row) so that these can be taken back without an index.
type layerInfo struct {
	chunks    int64
	dataBytes int64
	files     [3]fileInfo // as LayerFiles.fixed
}

// fileInfo tells damage of a file whose content the store does not know.
type fileInfo struct {
	bytes int64
	sum   uint32 // CRC-32C
}

func (i *layerInfo) sizeBytes() int64 {
	n := i.dataBytes
	for _, f := range i.files {
		n += f.bytes
	}
	return n
}

func (i *layerInfo) encode() []byte {
	w := make(writer, 0, 128)
	w.number(fieldChunks, uint64(i.chunks))
	w.number(fieldDataBytes, uint64(i.dataBytes))
	for _, f := range i.files {
		b := binary.LittleEndian.AppendUint64(make([]byte, 0, fileRowBytes), uint64(f.bytes))
		w.bytes(fieldFile, binary.LittleEndian.AppendUint32(b, f.sum))
	}
	return w
}

// take takes a field in, when it is one of its.
func (i *layerInfo) take(field protowire.Number, v value, files *int) {
	switch field {
	case fieldChunks:
		i.chunks = int64(v.n)
	case fieldDataBytes:
		i.dataBytes = int64(v.n)
	case fieldFile:
		if *files < len(i.files) && len(v.raw) == fileRowBytes {
			i.files[*files] = fileInfo{int64(binary.LittleEndian.Uint64(v.raw)), binary.LittleEndian.Uint32(v.raw[8:])}
			*files++
		}
	}
}

func (i *layerInfo) check(files int) error {
	bad := files != len(i.files) || i.chunks < 0 || i.chunks > maxLayerChunks || i.dataBytes < 0 || i.dataBytes > maxBlobBytes
	for _, f := range i.files {
		bad = bad || f.bytes < 0 || f.bytes > maxBlobBytes
	}
	if bad {
		return fmt.Errorf("%w: a layer of %d chunks in %d bytes, with %d files", ErrDamaged, i.chunks, i.dataBytes, files)
	}
	return nil
}

// seal is the content of the file info of layer d.
func (i *layerInfo) seal(d digest.Digest) []byte { return sealRow(tableLayers, d.String(), i.encode()) }

// maxInfoBytes bounds what is read of a file info.
const maxInfoBytes = 4096

// readInfo reads the file info in a layer's folder.
func readInfo(dir string, d digest.Digest) (i layerInfo, err error) {
	f, err := os.Open(infoPath(dir))
	if err != nil {
		return i, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxInfoBytes))
	if err != nil {
		return i, err
	}
	content, err := openRow(tableLayers, d.String(), raw)
	if err != nil {
		return i, err
	}
	files := 0
	err = read(content, func(field protowire.Number, v value) { i.take(field, v, &files) })
	if err == nil {
		err = i.check(files)
	}
	return i, err
}

// sizesIn reports a file of the folder that is gone or does not have its size.
func (i *layerInfo) sizesIn(dir string) error {
	files := layerFiles(dir)
	for n, path := range files.fixed() {
		if err := sized(path, i.files[n].bytes); err != nil {
			return err
		}
	}
	return sized(files.Data, i.dataBytes)
}

func sized(path string, size int64) error {
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular() || info.Size() != size:
		return fmt.Errorf("%s is %v with %d bytes, not a file of %d", path, info.Mode().Type(), info.Size(), size)
	}
	return nil
}

// sumOf reads a file for its size and checksum.
func sumOf(path string) (i fileInfo, err error) {
	f, err := os.Open(path)
	if err != nil {
		return i, err
	}
	defer f.Close()
	h := crc32.New(castagnoli)
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	i.bytes, err = io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, *buf)
	i.sum = h.Sum32()
	return i, err
}

// layerRow is what the index has of a layer, beside the rows of its marks.
type layerRow struct {
	info      layerInfo
	allocated int64
	seq       uint64
	usedAt    int64 // nanoseconds since 1970
	visited   bool
	complete  bool // it has no rows of marks
}

func (r *layerRow) encode() []byte {
	w := writer(r.info.encode())
	w.number(fieldAllocated, uint64(r.allocated))
	w.number(fieldSeq, r.seq)
	w.number(fieldUsedAt, uint64(r.usedAt))
	w.flag(fieldVisited, r.visited)
	w.flag(fieldComplete, r.complete)
	return w
}

func decodeLayer(b []byte) (r layerRow, err error) {
	files := 0
	err = read(b, func(field protowire.Number, v value) {
		switch field {
		case fieldAllocated:
			r.allocated = int64(v.n)
		case fieldSeq:
			r.seq = v.n
		case fieldUsedAt:
			r.usedAt = int64(v.n)
		case fieldVisited:
			r.visited = v.n != 0
		case fieldComplete:
			r.complete = v.n != 0
		default:
			r.info.take(field, v, &files)
		}
	})
	if err == nil {
		err = r.info.check(files)
	}
	if err == nil && (r.allocated < 0 || r.allocated > 5*maxBlobBytes) {
		err = fmt.Errorf("%w: a layer in %d bytes", ErrDamaged, r.allocated)
	}
	return r, err
}

// segment is the part of a layer's marks that one row has; its words are those of the layer.
func (m bitmap) segment(n, chunks int64) (words bitmap, length int64) {
	first := n * segmentChunks
	length = min(segmentChunks, chunks-first)
	return m[first/64 : (first+length+63)/64], length
}

// marksKey is a layer's key and the number of the segment.
func marksKey(layerKey string, segment int64) string {
	return string(binary.BigEndian.AppendUint32([]byte(layerKey), uint32(segment)))
}

// encodeMarks returns nil where none is set.
func encodeMarks(words bitmap, length int64) []byte {
	if !slices.ContainsFunc(words, func(w uint64) bool { return w != 0 }) {
		return nil
	}
	var w writer
	w.bytes(fieldParts, words.bytes(length))
	return w
}

func decodeMarks(b []byte, length int64) (bitmap, error) {
	var raw []byte
	err := read(b, func(field protowire.Number, v value) {
		if field == fieldParts {
			raw = v.raw
		}
	})
	if err != nil {
		return nil, err
	}
	return bitmapOf(raw, length)
}

// loadLayer takes in a layer's row.
func (s *Store) loadLayer(key string, content []byte) error {
	d, err := digestOf(key)
	if err != nil {
		return err
	}
	r, err := decodeLayer(content)
	if err != nil {
		return err
	}
	l := newLayer(s, d, r.info, r.seq)
	l.allocated, l.usedAt, l.visited, l.used = r.allocated, r.usedAt, r.visited, true
	if r.complete {
		l.complete, l.marks, l.missing = true, nil, 0
	}
	s.layers[d] = l
	s.used += l.allocated
	s.seq = max(s.seq, r.seq)
	return nil
}

// loadMarks takes in a row of marks; its layer came before.
func (s *Store) loadMarks(key string, content []byte) error {
	if len(key) < 4 {
		return fmt.Errorf("%w: marks under a key of %d bytes", ErrDamaged, len(key))
	}
	d, err := digestOf(key[:len(key)-4])
	if err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint32([]byte(key[len(key)-4:])))
	l := s.layers[d]
	if l == nil || l.complete || n >= segmentsOf(l.info.chunks) {
		return fmt.Errorf("%w: marks of what is no layer, or not of that size", ErrDamaged)
	}
	words, length := l.marks.segment(n, l.info.chunks)
	marks, err := decodeMarks(content, length)
	if err != nil {
		return err
	}
	copy(words, marks)
	l.missing -= marks.count()
	return nil
}
