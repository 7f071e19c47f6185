package profile

import (
	"path"
	"slices"
	"strings"
)

// LabelPrefetch is a label, or annotation, of an image that lists what its start
// reads: paths or patterns, separated by commas or line ends.
const LabelPrefetch = "dev.accel.prefetch"

const (
	maxPatterns      = 1000
	maxPatternBytes  = 4096
	maxGlobMatches   = 10_000
	maxGlobDirs      = 10_000 // directories that a pattern looks into
	maxListedInBytes = 256 << 10
)

// ListOf splits the label's value for Listed.
func ListOf(value string) []string {
	if len(value) > maxListedInBytes {
		return nil
	}
	return strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == '\n' })
}

// Listed is the items of a list that people write: paths, patterns as path.Match has
// them, and directories, which mean all files in them. What does not exist is left
// out.
func Listed(t *Tree, paths []string) []Item {
	var items []Item
	add := func(e *Entry) {
		if e.Regular() && e.Size > 0 && len(items) < MaxItems {
			items = append(items, Item{Layer: e.Layer, Path: e.Path, Bytes: e.Size, Content: e.Content})
		}
	}
	for _, pattern := range paths[:min(len(paths), maxPatterns)] {
		if pattern = strings.TrimSpace(pattern); pattern == "" || len(pattern) > maxPatternBytes {
			continue
		}
		for _, name := range t.Glob(pattern) {
			e, real := t.Resolve(name)
			if e == nil {
				continue
			}
			add(e)
			for _, below := range t.Files(real) {
				if len(items) == MaxItems {
					break
				}
				add(below)
			}
		}
	}
	return bounded(items, MaxItems, MaxHotBytes)
}

// Glob is the names that a pattern matches, sorted. Symlinks on the way are followed.
func (t *Tree) Glob(pattern string) []string {
	found := []string{"/"}
	looked := 0
	for part := range strings.SplitSeq(strings.Trim(path.Clean("/"+pattern), "/"), "/") {
		var next []string
		for _, dir := range found {
			if !strings.ContainsAny(part, `*?[\`) {
				next = append(next, path.Join(dir, part))
				continue
			}
			if looked++; looked > maxGlobDirs {
				return nil
			}
			for _, name := range t.Names(dir) {
				if ok, err := path.Match(part, name); ok && err == nil && len(next) < maxGlobMatches {
					next = append(next, path.Join(dir, name))
				}
			}
		}
		found = next
	}
	return slices.DeleteFunc(found, func(name string) bool {
		e, _ := t.Resolve(name)
		return e == nil
	})
}
