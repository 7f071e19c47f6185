package profile

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Entry is a file of an image. Hard links share one.
type Entry struct {
	// Layer and Path say where it is: Path is a name in that layer, of a hard-linked file
	// the one that is no link.
	Layer int
	Path  string
	// Kind is the TOC's: "reg", "dir", "symlink", "char", "block" or "fifo".
	Kind string
	// Size is at most maxFileBytes.
	Size int64
	// Mode has the permission bits.
	Mode int64
	// Link is a symlink's target.
	Link    string
	Content accel.ContentID
	// Chunks are where a regular file's content is, in its order. They do not overlap; some may be
	// missing.
	Chunks []FileChunk
}

// FileChunk is a run of a file's bytes as its TOC tells of it.
type FileChunk struct {
	Offset, Bytes int64 // in the file
	// Member is where its gzip member begins in the blob, Inside where it is in what that holds.
	Member, Inside int64
	SHA256         [32]byte // all zero: the TOC does not say
}

// Regular reports whether e is a file with content.
func (e *Entry) Regular() bool { return e.Kind == "reg" }

// Executable reports whether anybody may run e.
func (e *Entry) Executable() bool { return e.Regular() && e.Mode&0o111 != 0 }

// Tree is the files of an image as a container sees them: its layers laid over one
// another. It is read only once it is made.
type Tree struct {
	root *node
	// byContent finds a regular file by its content.
	byContent func() map[accel.ContentID]*Entry
}

type node struct {
	entry    *Entry
	children map[string]*node // nil unless it is a directory
}

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"

	// maxEntries bounds the files of an image, with the directories that nobody names, and the chunks besides.
	maxEntries = 1 << 20
	// maxTreeBytes bounds the memory that they take: some 600,000 files.
	maxTreeBytes = 256 << 20
	// nodeBytes is what a name takes beside its text, measured; chunkBytes a chunk.
	nodeBytes  = 320
	chunkBytes = 64
)

// Builder lays the layers of an image over one another, each TOC being read once. It takes them lowest
// first.
type Builder struct {
	t        *Tree
	layer    int
	entries  int   // so far
	bytes    int64 // of memory, about
	tocBytes int64
}

// NewBuilder is one without layers.
func NewBuilder() *Builder {
	t := &Tree{root: newDir(&Entry{Kind: "dir"})}
	t.byContent = sync.OnceValue(t.contents)
	return &Builder{t: t}
}

// NewTree is a Builder's of TOCs that are at hand, lowest first. A nil one stands for a layer without files that
// count. The error is an accel.ErrInvalid, or ctx's.
func NewTree(ctx context.Context, tocs [][]byte) (*Tree, error) {
	b := NewBuilder()
	for _, toc := range tocs {
		var err error
		if toc == nil {
			err = b.Skip()
		} else {
			err = b.Add(ctx, bytes.NewReader(toc))
		}
		if err != nil {
			return nil, err
		}
	}
	return b.Tree(), nil
}

// Tree is what was built. Nothing may be added any more.
func (b *Builder) Tree() *Tree { return b.t }

// Skip is Add of a layer that has no files that count.
func (b *Builder) Skip() error {
	if b.layer++; b.layer > maxLayers {
		return fmt.Errorf("%w: more than %d layers", accel.ErrInvalid, maxLayers)
	}
	return nil
}

// Add reads the next layer's TOC, to its end. The error is an accel.ErrInvalid, the reader's or ctx's; the
// Builder is of no use after it.
func (b *Builder) Add(ctx context.Context, toc io.Reader) error {
	if err := b.Skip(); err != nil {
		return err
	}
	if err := b.add(ctx, b.layer-1, toc); err != nil {
		return fmt.Errorf("layer %d: %w", b.layer-1, err)
	}
	return nil
}

// charge counts a file or a directory with its text, and chunks.
func (b *Builder) charge(nodes, chunks, textBytes int) error {
	b.entries += nodes + chunks
	b.bytes += int64(nodes)*nodeBytes + int64(chunks)*chunkBytes + int64(textBytes)
	if b.entries > maxEntries || b.bytes > maxTreeBytes {
		return fmt.Errorf("%w: the image has too many files: more than %d, or %d bytes of what is known of them", accel.ErrInvalid, maxEntries, maxTreeBytes)
	}
	return nil
}

func newDir(e *Entry) *node { return &node{entry: e, children: map[string]*node{}} }

// add lays one layer over what there is. Its whiteouts hide what is below it, not
// its own files, wherever they stand in it.
func (b *Builder) add(ctx context.Context, layer int, toc io.Reader) error {
	t := b.t
	var entries []*Entry
	links := map[string]string{}
	var open *Entry // the file that chunks may follow
	err := eachEntry(ctx, toc, maxTOCBytes-b.tocBytes, func(name string, e *tocEntry) error {
		if e.Type == "chunk" {
			if open != nil && open.Path == name {
				open.add(e)
			}
			return b.charge(0, 1, 0)
		}
		open = nil
		if err := b.charge(1, 0, len(name)+len(e.LinkName)); err != nil {
			return err
		}
		dir, base := path.Split(name)
		if base == opaqueName {
			if d := t.node(path.Clean(dir)); d != nil && d.children != nil {
				clear(d.children)
			}
			return nil
		}
		if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
			if d := t.node(path.Clean(dir)); d != nil && d.children != nil {
				delete(d.children, hidden)
			}
			return nil
		}
		delete(links, name)
		if e.Type == "hardlink" {
			links[name] = cleanName(e.LinkName)
			return nil
		}
		entry := &Entry{
			Layer: layer, Path: name, Kind: kindOf(e.Type), Size: min(max(e.Size, 0), maxFileBytes), Mode: e.Mode, Link: e.LinkName, Content: accel.ContentIDOf(e.Digest),
		}
		entries = append(entries, entry)
		if entry.Regular() && entry.Size > 0 {
			open = entry
			open.add(e)
			return b.charge(0, 1, 0)
		}
		return nil
	}, &b.tocBytes)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := b.put(e.Path, e, layer); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(links)) {
		target := links[name]
		for range maxLinks {
			next, ok := links[target]
			if !ok {
				break
			}
			target = next
		}
		if e := t.node(target); e != nil && e.children == nil {
			if err := b.put(name, e.entry, layer); err != nil {
				return err
			}
		}
	}
	return nil
}

// add takes a chunk in if it makes sense behind those that are there.
func (e *Entry) add(c *tocEntry) {
	n := c.ChunkSize
	if n == 0 {
		n = e.Size - c.ChunkOffset
	}
	from := int64(0)
	if k := len(e.Chunks); k > 0 {
		from = e.Chunks[k-1].Offset + e.Chunks[k-1].Bytes
	}
	if c.ChunkOffset < from || n <= 0 || n > e.Size || c.ChunkOffset > e.Size-n || c.Offset <= 0 || c.InnerOffset < 0 {
		return
	}
	e.Chunks = append(e.Chunks, FileChunk{Offset: c.ChunkOffset, Bytes: n, Member: c.Offset, Inside: c.InnerOffset, SHA256: sumOf(c.ChunkDigest)})
}

// sumOf is d's, all zero unless it is a SHA-256.
func sumOf(d digest.Digest) (sum [32]byte) {
	text, ok := strings.CutPrefix(d.String(), "sha256:")
	if !ok || len(text) != hex.EncodedLen(len(sum)) {
		return sum
	}
	if _, err := hex.Decode(sum[:], []byte(text)); err != nil {
		return [32]byte{}
	}
	return sum
}

// kindOf spares memory: there are few kinds, and many files.
func kindOf(given string) string {
	for _, k := range []string{"reg", "dir", "symlink", "char", "block", "fifo"} {
		if given == k {
			return k
		}
	}
	return "unknown"
}

// put sets a name. A directory over a directory keeps what is in it; what is missing
// above it is made.
func (b *Builder) put(name string, e *Entry, layer int) error {
	if name == "" {
		return nil
	}
	dir := b.t.root
	for rest := name; ; {
		part, more, deeper := strings.Cut(rest, "/")
		below := dir.children[part]
		if !deeper {
			if e.Kind != "dir" {
				dir.children[part] = &node{entry: e}
			} else if below == nil || below.children == nil {
				dir.children[part] = newDir(e)
			} else {
				below.entry = e
			}
			return nil
		}
		if below == nil || below.children == nil {
			if err := b.charge(1, 0, 0); err != nil {
				return err
			}
			below = newDir(&Entry{Layer: layer, Kind: "dir", Path: name[:len(name)-len(more)-1]})
			dir.children[part] = below
		}
		dir, rest = below, more
	}
}

// contents finds the first file of each content.
func (t *Tree) contents() map[accel.ContentID]*Entry {
	found := map[accel.ContentID]*Entry{}
	t.root.each(nil, "", func(_ string, e *Entry) bool {
		if _, ok := found[e.Content]; e.Regular() && e.Size > 0 && !ok && !e.Content.IsZero() {
			found[e.Content] = e
		}
		return true
	})
	return found
}

// node is that of a clean name, symlinks not followed.
func (t *Tree) node(name string) *node {
	n := t.root
	if name == "" || name == "." {
		return n
	}
	for part := range strings.SplitSeq(name, "/") {
		if n = n.children[part]; n == nil { // a nil map has nothing
			return nil
		}
	}
	return n
}

// Resolve finds a name as a program in the container would, with all symlinks
// followed, inside the image. real is its name without any; the entry is nil where
// there is no such file.
func (t *Tree) Resolve(name string) (e *Entry, real string) {
	e, real, _ = t.walk(name, true)
	return e, real
}

// Lookup is Resolve but for the last part of the name, which is taken as it is.
func (t *Tree) Lookup(name string) (e *Entry, real string) {
	e, real, _ = t.walk(name, false)
	return e, real
}

// resolve is Resolve that is paid for.
func (t *Tree) resolve(w *work, name string) (e *Entry, real string) {
	if w.err != nil {
		return nil, ""
	}
	e, real, steps := t.walk(name, true)
	if !w.spend(steps) {
		return nil, ""
	}
	return e, real
}

// maxSteps bounds one lookup, where links lead back and forth.
const maxSteps = 4096

func (t *Tree) walk(name string, followLast bool) (e *Entry, real string, steps int) {
	if len(name) > MaxPathBytes {
		return nil, "", 1
	}
	at, parts := []*node{t.root}, make([]string, 0, 16)
	links := 0
	for rest, more := name, true; more; {
		if steps++; steps > maxSteps {
			return nil, "", steps
		}
		var part string
		part, rest, more = strings.Cut(rest, "/")
		switch part {
		case "", ".":
			continue
		case "..":
			parts = parts[:max(0, len(parts)-1)]
			at = at[:len(parts)+1]
			continue
		}
		n := at[len(at)-1].children[part]
		if n == nil {
			return nil, "", steps
		}
		if n.entry.Kind == "symlink" && (followLast || more) {
			if links++; links > maxLinks || len(n.entry.Link) > MaxPathBytes {
				return nil, "", steps
			}
			if strings.HasPrefix(n.entry.Link, "/") {
				at, parts = at[:1], parts[:0]
			}
			if more {
				rest = n.entry.Link + "/" + rest
			} else {
				rest, more = n.entry.Link, true
			}
			continue
		}
		at, parts = append(at, n), append(parts, part)
	}
	return at[len(at)-1].entry, strings.Join(parts, "/"), steps
}

// names lists a directory, sorted.
func (t *Tree) names(w *work, dir string) []string {
	e, real := t.resolve(w, dir)
	if e == nil {
		return nil
	}
	n := t.node(real)
	if n == nil || !w.spend(len(n.children)) {
		return nil
	}
	return slices.Sorted(maps.Keys(n.children))
}

// files is everything below a directory, in the order of the names, the directory
// itself left out.
func (t *Tree) files(w *work, dir string) func(yield func(name string, e *Entry) bool) {
	return func(yield func(string, *Entry) bool) {
		if n := t.node(dir); n != nil {
			n.each(w, dir, yield)
		}
	}
}

// each is paid by w, unless that is nil.
func (n *node) each(w *work, name string, yield func(string, *Entry) bool) bool {
	if len(n.children) == 0 {
		return true
	}
	if w != nil && !w.spend(len(n.children)) {
		return false
	}
	for _, part := range slices.Sorted(maps.Keys(n.children)) {
		c := n.children[part]
		below := part
		if name != "" {
			below = name + "/" + part
		}
		if w != nil && !w.spend(len(below)/globStep) {
			return false
		}
		if !yield(below, c.entry) || !c.each(w, below, yield) {
			return false
		}
	}
	return true
}
