package profile

import (
	"accel"

	"github.com/opencontainers/go-digest"
)

// maxGuessBytes bounds what Inherit takes of files whose content has changed.
const maxGuessBytes = 64 << 20

// Inherit is the profile of a changed image as far as its predecessor's tells it. Of a
// file that is unchanged, under its old name or another, it keeps the parts; of one
// with other content under the same name it takes the same range, up to a bound; what has
// vanished is left out.
func Inherit(old accel.Profile, tree *Tree, manifest digest.Digest) accel.Profile {
	p := accel.Profile{Manifest: manifest, Origin: accel.ProfileInherited, Items: []Item{}}
	guessLeft := int64(maxGuessBytes)
	var items []Item
	for _, i := range old.Items[:min(len(old.Items), MaxItems)] {
		if check(i) != nil {
			continue
		}
		e := tree.same(i.Path, i.Content)
		if e == nil {
			if e, _ = tree.Resolve(i.Path); e == nil || !e.Regular() {
				continue
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
	return t.byContent()[content]
}
