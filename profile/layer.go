package profile

import (
	"cmp"
	"fmt"
	"slices"
	"sort"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Table is a layer's chunks in the order of both the blob and the data file; package
// lazyfs has them.
type Table interface {
	Len() int
	At(i int) accel.Chunk
	// Find is the chunk that holds a byte of the data file, or -1.
	Find(dataOffset int64) int
}

// Layer knows which chunks hold which part of which file, and the other way
// round. It takes some 100 bytes for each file and is made when it is needed, from the
// TOC and the table that the node has of every layer.
type Layer struct {
	digest digest.Digest
	table  Table
	files  []layerFile // by their first chunk
	byName map[string]int
}

const pageBytes = 4 << 10

// layerFile is a regular file that has content.
type layerFile struct {
	path    string
	size    int64
	content accel.ContentID
	first   int // chunk
	n       int
}

// TOCEntry is what matters here of an entry of a TOC, by the format's names.
type TOCEntry struct {
	Name, Type, LinkName      string
	Size, Offset, InnerOffset int64
	Digest                    digest.Digest
}

// maxTOCEntries bounds a layer's files and chunks.
const maxTOCEntries = 9 << 20

// NewLayer joins a layer's TOC with its table of chunks. Files of which the table
// knows nothing, because a later entry replaced them, are not there. Somebody else reads the TOC: each calls what
// it is given for every entry in order, and ends with its error. The error is an accel.ErrInvalid, or each's.
func NewLayer(d digest.Digest, each func(func(TOCEntry) error) error, table Table) (*Layer, error) {
	l := &Layer{digest: d, table: table, byName: map[string]int{}}
	links := map[string]string{}
	entries := 0
	err := each(func(e TOCEntry) error {
		if entries++; entries > maxTOCEntries {
			return fmt.Errorf("%w: TOC of more than %d entries", accel.ErrInvalid, maxTOCEntries)
		}
		name, counts, err := entryName(e.Name)
		if err != nil || !counts {
			return err
		}
		switch e.Type {
		case "reg":
			delete(links, name)
			delete(l.byName, name)
			if e.Size <= 0 {
				return nil
			}
			first, ok := find(table, e.Offset, e.InnerOffset)
			if !ok {
				return nil
			}
			n := chunksOf(table, first, e.Size)
			if n == 0 || !validPath(name) {
				return nil
			}
			l.byName[name] = len(l.files)
			l.files = append(l.files, layerFile{path: name, size: e.Size, content: accel.ContentIDOf(e.Digest), first: first, n: n})
		case "hardlink":
			delete(l.byName, name)
			links[name] = cleanName(e.LinkName)
		case "chunk":
		default:
			delete(links, name)
			delete(l.byName, name)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for name, target := range links {
		for range maxLinks { // a link's target may be a link
			if next, ok := links[target]; ok {
				target = next
			}
		}
		if n, ok := l.byName[target]; ok {
			l.byName[name] = n
		}
	}
	if !slices.IsSortedFunc(l.files, func(a, b layerFile) int { return cmp.Compare(a.first, b.first) }) {
		return nil, fmt.Errorf("%w: TOC and table of %s have their files in different orders", accel.ErrInvalid, d)
	}
	return l, nil
}

// find is the chunk at a place of the blob.
func find(t Table, blobOffset, innerOffset int64) (int, bool) {
	n, found := sort.Find(t.Len(), func(i int) int {
		c := t.At(i)
		return cmp.Or(cmp.Compare(blobOffset, c.BlobOffset), cmp.Compare(innerOffset, c.InnerOffset))
	})
	return n, found
}

// chunksOf is how many chunks from first on hold a file of that size; 0 where they
// do not add up to it.
func chunksOf(t Table, first int, sizeBytes int64) (n int) {
	c := t.At(first)
	last := t.Find(c.DataOffset + sizeBytes - 1)
	if last < first {
		return 0
	}
	if end := t.At(last); end.DataOffset+end.Bytes != c.DataOffset+sizeBytes {
		return 0
	}
	return last - first + 1
}

// Chunks are those that hold a part of a file; n is 0 where there is no such
// part. What reaches beyond the file's end is cut off.
func (l *Layer) Chunks(path string, offset, bytes int64) (first, n int) {
	i, ok := l.byName[path]
	if !ok || offset < 0 || bytes <= 0 || offset >= l.files[i].size {
		return 0, 0
	}
	f := l.files[i]
	start := l.table.At(f.first).DataOffset
	end := f.size
	if bytes < f.size-offset {
		end = offset + bytes
	}
	first, last := l.table.Find(start+offset), l.table.Find(start+end-1)
	if first < f.first || last < first || last >= f.first+f.n {
		return 0, 0
	}
	return first, last - first + 1
}

// item is what a chunk is a part of, widened to whole pages: the kernel
// reads nothing smaller.
func (l *Layer) item(chunk int) (Item, bool) {
	i := sort.Search(len(l.files), func(i int) bool { return l.files[i].first > chunk }) - 1
	if i < 0 || chunk >= l.files[i].first+l.files[i].n {
		return Item{}, false
	}
	f := l.files[i]
	c := l.table.At(chunk)
	at := c.DataOffset - l.table.At(f.first).DataOffset
	from, to := at&^(pageBytes-1), min((at+c.Bytes+pageBytes-1)&^(pageBytes-1), f.size)
	return Item{Path: f.path, Offset: from, Bytes: to - from, Content: f.content}, from < to
}
