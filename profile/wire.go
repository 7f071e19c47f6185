package profile

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"accel"
)

// The encoding is JSON made compact: the files sorted, each path without the
// beginning that it shares with the one before it, and the items as numbers. What
// is equal is encoded equally, so that the encoding's digest is a version.
const (
	wireVersion = 1
	// maxPathsBytes bounds the sum of the paths, which the encoding does not: each is
	// made from the one before it.
	maxPathsBytes = 8 << 20
	// MaxEncodedBytes bounds a profile and a report. 2,000 items take some 80 kB.
	MaxEncodedBytes = 2 << 20
)

// file is what items refer to.
type file struct {
	place
	content accel.ContentID
}

func fileOf(i Item) file { return file{placeOf(i), i.Content} }

func (f file) compare(o file) int {
	return cmp.Or(f.place.compare(o.place), bytes.Compare(f.content[:], o.content[:]))
}

// wireLayer is one layer's files.
type wireLayer struct {
	Layer int `json:"layer"`
	// Keep is how many bytes of the name before each shares, Names the rest of it.
	Keep  []int    `json:"keep"`
	Names []string `json:"names"`
	// Content is the files' content ids one after the other, in base64.
	Content string `json:"content"`
}

// table is the files of some items.
type table struct {
	files []file
	index map[file]int
}

func tableOf(lists ...[]Item) *table {
	t := &table{index: map[file]int{}}
	for _, list := range lists {
		for _, i := range list {
			if f := fileOf(i); t.index[f] == 0 {
				t.index[f] = 1
				t.files = append(t.files, f)
			}
		}
	}
	slices.SortFunc(t.files, file.compare)
	for n, f := range t.files {
		t.index[f] = n
	}
	return t
}

func (t *table) encode() []wireLayer {
	layers := []wireLayer{}
	for rest := t.files; len(rest) > 0; {
		n := slices.IndexFunc(rest, func(f file) bool { return f.layer != rest[0].layer })
		if n < 0 {
			n = len(rest)
		}
		w := wireLayer{Layer: rest[0].layer}
		var ids []byte
		before := ""
		for _, f := range rest[:n] {
			keep := sharedPrefix(before, f.path)
			w.Keep, w.Names = append(w.Keep, keep), append(w.Names, f.path[keep:])
			ids = append(ids, f.content[:]...)
			before = f.path
		}
		w.Content = base64.StdEncoding.EncodeToString(ids)
		layers, rest = append(layers, w), rest[n:]
	}
	return layers
}

// sharedPrefix ends where a character does: JSON would change half of one.
func sharedPrefix(a, b string) (n int) {
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	for n > 0 && n < len(b) && !utf8.RuneStart(b[n]) {
		n--
	}
	return n
}

// decodeFiles reads what encode wrote.
func decodeFiles(layers []wireLayer, maxPathsBytes int) (files []file, err error) {
	pathBytes := 0
	for _, w := range layers {
		ids, err := base64.StdEncoding.DecodeString(w.Content)
		if err != nil {
			return nil, fmt.Errorf("%w: layer %d: content ids: %w", accel.ErrInvalid, w.Layer, err)
		}
		if len(w.Keep) != len(w.Names) || len(ids) != len(w.Names)*len(accel.ContentID{}) {
			return nil, fmt.Errorf("%w: layer %d: %d names, %d shared beginnings, %d bytes of content ids", accel.ErrInvalid, w.Layer, len(w.Names), len(w.Keep), len(ids))
		}
		before := ""
		for n, name := range w.Names {
			keep := w.Keep[n]
			if keep < 0 || keep > len(before) || keep+len(name) > MaxPathBytes {
				return nil, fmt.Errorf("%w: layer %d: name %d shares %d bytes with the one before", accel.ErrInvalid, w.Layer, n, keep)
			}
			f := file{place: place{w.Layer, before[:keep] + name}}
			if pathBytes += len(f.path); pathBytes > maxPathsBytes {
				return nil, fmt.Errorf("%w: paths of more than %d bytes", accel.ErrInvalid, maxPathsBytes)
			}
			copy(f.content[:], ids[n*len(f.content):])
			before = f.path
			files = append(files, f)
		}
	}
	return files, nil
}

// numbers are items as file, offset and bytes, one after the other.
func (t *table) numbers(items []Item) []int64 {
	n := make([]int64, 0, 3*len(items))
	for _, i := range items {
		n = append(n, int64(t.index[fileOf(i)]), i.Offset, i.Bytes)
	}
	return n
}

func itemsOf(files []file, n []int64, maxItems int) ([]Item, error) {
	if len(n)%3 != 0 || len(n)/3 > maxItems {
		return nil, fmt.Errorf("%w: %d numbers: want three for each item, and at most %d items", accel.ErrInvalid, len(n), maxItems)
	}
	items := make([]Item, 0, len(n)/3)
	for ; len(n) > 0; n = n[3:] {
		if n[0] < 0 || n[0] >= int64(len(files)) {
			return nil, fmt.Errorf("%w: item %d: file %d of %d", accel.ErrInvalid, len(items), n[0], len(files))
		}
		f := files[n[0]]
		items = append(items, Item{Layer: f.layer, Path: f.path, Offset: n[1], Bytes: n[2], Content: f.content})
	}
	return items, nil
}

// marshal is json.Marshal for types that cannot fail.
func marshal(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil // never: numbers and strings alone
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// unmarshal reads b into v.
func unmarshal(b []byte, maxBytes int, v any) error {
	if len(b) > maxBytes {
		return fmt.Errorf("%w: %d bytes are more than %d", accel.ErrInvalid, len(b), maxBytes)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	return nil
}

// canonical refuses b where it is not what its meaning encodes to.
func canonical(b, again []byte) error {
	if !bytes.Equal(b, again) {
		at := 0
		for at < len(b) && at < len(again) && b[at] == again[at] {
			at++
		}
		return fmt.Errorf("%w: not in canonical form at byte %d", accel.ErrInvalid, at)
	}
	return nil
}

// validName bounds what is stored beside the items.
func validName(s string, maxBytes int) bool {
	return len(s) <= maxBytes && utf8.ValidString(s) && !strings.ContainsAny(s, "\x00\n")
}
