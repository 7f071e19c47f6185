package profile

import (
	"cmp"
	"fmt"
	"path"
	"strings"
	"unicode/utf8"

	"accel"
)

// Bounds of what comes from outside.
const (
	// MaxItems bounds a profile and a report. A large start reads 5,000 files.
	MaxItems = 1 << 14
	// MaxHotBytes bounds what a start may claim to read. The largest starts that were
	// measured read some 300 MB.
	MaxHotBytes = 1 << 30
	// maxLayers: overlayfs mounts no more than 500, Docker makes no more than 127.
	maxLayers = 512
	// MaxPathBytes is the longest name: the kernel's PATH_MAX.
	MaxPathBytes = 4096
	// maxLinks is how many links a lookup follows, as in the kernel.
	maxLinks = 40
	// maxFileBytes is the largest file that there may be.
	maxFileBytes = 1 << 40
)

// Item is short for what everything here deals with.
type Item = accel.ProfileItem

// place is a file of an image.
type place struct {
	layer int
	path  string
}

func (p place) compare(o place) int {
	return cmp.Or(cmp.Compare(p.layer, o.layer), strings.Compare(p.path, o.path))
}

func placeOf(i Item) place { return place{i.Layer, i.Path} }

// check says what is wrong with one item.
func check(i Item) error {
	switch {
	case i.Layer < 0 || i.Layer >= maxLayers:
		return fmt.Errorf("%w: layer %d", accel.ErrInvalid, i.Layer)
	case !validPath(i.Path):
		return fmt.Errorf("%w: path %.100q", accel.ErrInvalid, i.Path)
	case i.Offset < 0 || i.Bytes <= 0 || i.Offset > maxFileBytes || i.Bytes > maxFileBytes-i.Offset:
		return fmt.Errorf("%w: %d bytes at %d of %.100q", accel.ErrInvalid, i.Bytes, i.Offset, i.Path)
	}
	return nil
}

func validPath(p string) bool {
	return p != "" && p != "." && len(p) <= MaxPathBytes && p[0] != '/' && p != ".." && !strings.HasPrefix(p, "../") &&
		path.Clean(p) == p && utf8.ValidString(p) && !strings.ContainsRune(p, 0)
}

// checkAll is check for a list, with its bounds.
func checkAll(items []Item) error {
	if len(items) > MaxItems {
		return fmt.Errorf("%w: %d items are more than %d", accel.ErrInvalid, len(items), MaxItems)
	}
	seen := map[place]*spans{}
	for n, i := range items {
		if err := check(i); err != nil {
			return fmt.Errorf("item %d: %w", n, err)
		}
		fresh := covered(seen, i)
		if len(fresh) != 1 || fresh[0] != (span{i.Offset, i.Offset + i.Bytes}) {
			return fmt.Errorf("%w: item %d: %d bytes at %d of %.100q overlap an earlier one", accel.ErrInvalid, n, i.Bytes, i.Offset, i.Path)
		}
	}
	return nil
}

// covered adds i to the files seen, and returns what of it is new.
func covered(seen map[place]*spans, i Item) []span {
	set := seen[placeOf(i)]
	if set == nil {
		set = &spans{}
		seen[placeOf(i)] = set
	}
	return set.add(span{i.Offset, i.Offset + i.Bytes})
}

// bounded is items without what is invalid or said twice, cut off at a number of
// items and a sum of bytes. What comes first stays.
func bounded(items []Item, maxItems int, maxBytes int64) (kept []Item) {
	seen := map[place]*spans{}
	for _, i := range items {
		if check(i) != nil {
			continue
		}
		for _, s := range covered(seen, i) {
			if len(kept) == maxItems || maxBytes <= 0 {
				return kept
			}
			i.Offset, i.Bytes = s.from, min(s.to-s.from, maxBytes)
			maxBytes -= i.Bytes
			kept = append(kept, i)
		}
	}
	return kept
}

// Union is first's items, then what the others add, in their order, within the
// bounds. The rest is first's.
func Union(first accel.Profile, others ...accel.Profile) accel.Profile {
	all := append([]Item(nil), first.Items...)
	for _, p := range others {
		all = append(all, p.Items...)
	}
	first.Items = bounded(all, MaxItems, MaxHotBytes)
	return first
}
