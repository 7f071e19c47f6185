package profile

import (
	"context"
	"errors"
	"path"
	"slices"
	"strings"
)

// LabelPrefetch is a label, or annotation, of an image that lists what its start
// reads: paths or patterns, separated by commas or line ends.
const LabelPrefetch = "dev.accel.prefetch"

const (
	// MaxListed bounds the paths and patterns of one list, and MaxListedBytes their text.
	MaxListed      = MaxItems
	MaxListedBytes = 1 << 20

	maxGlobMatches   = 10_000
	maxListedInBytes = 256 << 10 // a label's
	// maxNameBytes is the kernel's NAME_MAX: no longer name can be there.
	maxNameBytes = 255
	// globStep is how many bytes of a pattern times bytes of a name cost as much as one step of a lookup.
	globStep = 64
)

// ListOf splits the label's value for Listed.
func ListOf(value string) []string {
	if len(value) > maxListedInBytes {
		return nil
	}
	return strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == '\n' })
}

// Listing is what a list means in an image.
type Listing struct {
	Items []Item
	// Unmatched are the paths and patterns that mean no file with content, as they were given.
	Unmatched []string
}

// Listed is what a list means that people write: paths, patterns as path.Match has them, and directories, which
// mean all files in them. A name that is there is taken for a path, whatever characters it has. The
// error is ctx's; what goes beyond the bounds is left out.
func Listed(ctx context.Context, t *Tree, paths []string) (l Listing, err error) {
	w := &work{ctx: ctx, left: maxListWork}
	taken := map[*Entry]bool{}
	add := func(e *Entry) (counts bool) {
		if !e.Regular() || e.Size == 0 {
			return false
		}
		if !taken[e] && len(l.Items) < MaxItems {
			taken[e] = true
			l.Items = append(l.Items, Item{Layer: e.Layer, Path: e.Path, Bytes: e.Size, Content: e.Content})
		}
		return true
	}
	textBytes := 0
	for _, given := range paths[:min(len(paths), MaxListed)] {
		pattern := strings.TrimSpace(given)
		if pattern == "" {
			continue
		}
		if textBytes += len(pattern); textBytes > MaxListedBytes || w.err != nil {
			break
		}
		matched := false
		for _, name := range t.listed(w, pattern) {
			e, real := t.resolve(w, name)
			if e == nil {
				continue
			}
			matched = add(e) || matched
			for _, below := range t.files(w, real) {
				matched = add(below) || matched
				if len(l.Items) == MaxItems {
					break
				}
			}
		}
		if !matched && w.err == nil {
			l.Unmatched = append(l.Unmatched, given)
		}
	}
	if w.err != nil && !errors.Is(w.err, errSpent) {
		return Listing{}, w.err
	}
	l.Items = bounded(l.Items, MaxItems, MaxHotBytes)
	return l, nil
}

// listed is the names that one line of a list means.
func (t *Tree) listed(w *work, pattern string) []string {
	if e, _ := t.resolve(w, pattern); e != nil {
		return []string{pattern}
	}
	return t.glob(w, pattern)
}

// glob is the names that a pattern matches, sorted. Symlinks on the way are followed.
func (t *Tree) glob(w *work, pattern string) []string {
	if len(pattern) > MaxPathBytes {
		return nil
	}
	found := []string{"/"}
	for part := range strings.SplitSeq(strings.Trim(path.Clean("/"+pattern), "/"), "/") {
		var next []string
		for _, dir := range found {
			if !strings.ContainsAny(part, `*?[\`) {
				if !w.spend(len(dir) + len(part)) {
					return nil
				}
				next = append(next, path.Join(dir, part))
				continue
			}
			for _, name := range t.names(w, dir) {
				if len(name) > maxNameBytes {
					continue
				}
				if !w.spend(1 + len(part)*len(name)/globStep) {
					return nil
				}
				if ok, err := path.Match(part, name); ok && err == nil && len(next) < maxGlobMatches && w.spend(len(dir)+len(name)) {
					next = append(next, path.Join(dir, name))
				}
			}
		}
		if found = next; len(found) == 0 {
			return nil
		}
	}
	return slices.DeleteFunc(found, func(name string) bool {
		e, _ := t.resolve(w, name)
		return e == nil
	})
}
