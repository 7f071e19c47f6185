package profile

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"accel"
)

// Entry is a file of an image. Hard links share one.
type Entry struct {
	// Layer and Path say where it is: Path is a name in that layer, of a hard-linked file
	// the one that is no link.
	Layer int
	Path  string
	// Kind is the TOC's: "reg", "dir", "symlink", "char", "block" or "fifo".
	Kind string
	Size int64
	// Mode has the permission bits.
	Mode int64
	// Link is a symlink's target.
	Link    string
	Content accel.ContentID
}

// Regular reports whether e is a file with content.
func (e *Entry) Regular() bool { return e.Kind == "reg" }

// Executable reports whether anybody may run e.
func (e *Entry) Executable() bool { return e.Regular() && e.Mode&0o111 != 0 }

// Tree is the files of an image as a container sees them: its layers laid over one
// another. It is read only once it is made.
type Tree struct {
	root      *node
	byContent map[accel.ContentID]string // a regular file's name
}

type node struct {
	entry    *Entry
	children map[string]*node // nil unless it is a directory
}

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// NewTree reads the TOCs of an image's layers, lowest first. A nil one stands for a layer
// without files that count. The error is an accel.ErrInvalid.
func NewTree(tocs [][]byte) (*Tree, error) {
	if len(tocs) > maxLayers {
		return nil, fmt.Errorf("%w: %d layers are more than %d", accel.ErrInvalid, len(tocs), maxLayers)
	}
	t := &Tree{root: newDir(&Entry{Kind: "dir"})}
	left := maxEntries
	for n, toc := range tocs {
		if toc == nil {
			continue
		}
		if err := t.addLayer(n, toc, &left); err != nil {
			return nil, fmt.Errorf("layer %d: %w", n, err)
		}
	}
	t.byContent = map[accel.ContentID]string{}
	for name, e := range t.Files("") {
		if before, ok := t.byContent[e.Content]; e.Regular() && e.Size > 0 && (!ok || name < before) {
			t.byContent[e.Content] = name
		}
	}
	delete(t.byContent, accel.ContentID{})
	return t, nil
}

func newDir(e *Entry) *node { return &node{entry: e, children: map[string]*node{}} }

// addLayer lays one layer over what there is. Its whiteouts hide what is below it, not
// its own files, wherever they stand in it.
func (t *Tree) addLayer(layer int, toc []byte, left *int) error {
	var names []string
	var entries []*Entry
	links := map[string]string{}
	err := eachEntry(toc, func(name string, e *tocEntry) error {
		if e.Type == "chunk" {
			return nil
		}
		if *left--; *left < 0 {
			return fmt.Errorf("%w: more than %d files", accel.ErrInvalid, maxEntries)
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
		names = append(names, name)
		entries = append(entries, &Entry{
			Layer: layer, Path: name, Kind: e.Type, Size: max(e.Size, 0), Mode: e.Mode, Link: e.LinkName, Content: accel.ContentIDOf(e.Digest),
		})
		return nil
	})
	if err != nil {
		return err
	}
	for n, name := range names {
		t.put(name, entries[n], layer)
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
			t.put(name, e.entry, layer)
		}
	}
	return nil
}

// put sets a name. A directory over a directory keeps what is in it; what is missing
// above it is made.
func (t *Tree) put(name string, e *Entry, layer int) {
	if name == "" {
		return
	}
	dir := t.root
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
			return
		}
		if below == nil || below.children == nil {
			below = newDir(&Entry{Layer: layer, Kind: "dir", Path: name[:len(name)-len(more)-1]})
			dir.children[part] = below
		}
		dir, rest = below, more
	}
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
func (t *Tree) Resolve(name string) (e *Entry, real string) { return t.walk(name, true) }

// Lookup is Resolve but for the last part of the name, which is taken as it is.
func (t *Tree) Lookup(name string) (e *Entry, real string) { return t.walk(name, false) }

// maxSteps bounds one lookup, where links lead back and forth.
const maxSteps = 4096

func (t *Tree) walk(name string, followLast bool) (*Entry, string) {
	if len(name) > maxPathBytes {
		return nil, ""
	}
	type level struct {
		n    *node
		name string
	}
	at := []level{{t.root, ""}}
	rest := strings.Split(name, "/")
	links, steps := 0, 0
	for len(rest) > 0 {
		if steps++; steps > maxSteps {
			return nil, ""
		}
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		here := at[len(at)-1]
		n := here.n.children[part]
		if n == nil {
			return nil, ""
		}
		if n.entry.Kind == "symlink" && (followLast || len(rest) > 0) {
			if links++; links > maxLinks || len(n.entry.Link) > maxPathBytes {
				return nil, ""
			}
			if strings.HasPrefix(n.entry.Link, "/") {
				at = at[:1]
			}
			rest = append(strings.Split(n.entry.Link, "/"), rest...)
			continue
		}
		at = append(at, level{n, path.Join(here.name, part)})
	}
	last := at[len(at)-1]
	return last.n.entry, last.name
}

// Names lists a directory, sorted.
func (t *Tree) Names(dir string) []string {
	_, real := t.Resolve(dir)
	n := t.node(real)
	if n == nil || (real == "" && path.Clean("/"+dir) != "/") {
		return nil
	}
	return slices.Sorted(maps.Keys(n.children))
}

// Files is everything below a directory, in the order of the names, the directory
// itself left out.
func (t *Tree) Files(dir string) func(yield func(name string, e *Entry) bool) {
	return func(yield func(string, *Entry) bool) {
		if n := t.node(cleanName(dir)); n != nil {
			n.each(cleanName(dir), yield)
		}
	}
}

func (n *node) each(name string, yield func(string, *Entry) bool) bool {
	for _, part := range slices.Sorted(maps.Keys(n.children)) {
		c := n.children[part]
		below := path.Join(name, part)
		if !yield(below, c.entry) || !c.each(below, yield) {
			return false
		}
	}
	return true
}
