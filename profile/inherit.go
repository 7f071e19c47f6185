package profile

import (
	"accel"

	"github.com/opencontainers/go-digest"
)

// maxGuessBytes bounds what Inherit takes of files whose content has changed.
const maxGuessBytes = 64 << 20

// Inherit is the profile of a changed image as far as its predecessor's tells it. Of a
// file that is unchanged, under its old name or another, it keeps the parts; of one
// with other content under the same name it takes the same range, or all of it where all
// was read before, up to a bound; what has vanished is left out. oldTree may be nil:
// then the items' own content ids alone say what is the same.
func Inherit(old accel.Profile, oldTree, newTree *Tree, manifest digest.Digest) accel.Profile {
	p := accel.Profile{Manifest: manifest, Origin: accel.ProfileInherited, Items: []Item{}}
	guessLeft := int64(maxGuessBytes)
	var items []Item
	for _, i := range old.Items[:min(len(old.Items), MaxItems)] {
		if check(i) != nil {
			continue
		}
		content, oldSize := i.Content, int64(-1)
		if oldTree != nil {
			e, _ := oldTree.Lookup(i.Path)
			if e == nil || e.Layer != i.Layer || e.Path != i.Path || !e.Regular() {
				continue // hidden by a layer above
			}
			content, oldSize = e.Content, e.Size
		}
		e := newTree.same(i.Path, content)
		if e == nil {
			if e, _ = newTree.Resolve(i.Path); e == nil || !e.Regular() {
				continue
			}
			if i.Offset == 0 && i.Bytes == oldSize {
				i.Bytes = min(e.Size, 2*i.Bytes)
			}
			i.Bytes = min(i.Bytes, guessLeft)
			guessLeft -= max(0, min(i.Bytes, e.Size-i.Offset))
		}
		i.Layer, i.Path, i.Content = e.Layer, e.Path, e.Content
		i.Bytes = min(i.Bytes, e.Size-i.Offset)
		items = append(items, i)
	}
	p.Items = append(p.Items, bounded(items, MaxItems, MaxHotBytes)...)
	return p
}

// same is the file with that content, by the name where it can be; nil where there is
// none, or nobody knows.
func (t *Tree) same(name string, content accel.ContentID) *Entry {
	if content.IsZero() {
		return nil
	}
	if e, _ := t.Resolve(name); e != nil && e.Regular() && e.Content == content {
		return e
	}
	if other, ok := t.byContent[content]; ok {
		return t.node(other).entry
	}
	return nil
}
