package convert

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// DiffOptions of one comparison. The zero value compares everything.
type DiffOptions struct {
	// SampleBytes, where it is not zero, compares only what lies in about the
	// first so many uncompressed bytes of each layer. It is for images whose
	// entries are in the same order, as a source's and its conversion's are; a
	// layer that seems to differ is compared in full before it is said to.
	SampleBytes int64
	// MaxDifferences ends the comparison. Zero: 1000.
	MaxDifferences int
}

const defaultMaxDifferences = 1000

// Difference is one thing in which two images differ.
type Difference struct {
	Layer int    // from 0; -1 for what is not in one layer
	Path  string // from the root, bytes as in the tar; empty for the root itself
	What  string // "mode", "content", "config", ...; "missing" and "extra" for a whole entry
	A, B  string // what it is on either side, in words
}

// String says it in a line.
func (d Difference) String() string {
	where := "image"
	if d.Layer >= 0 {
		where = fmt.Sprintf("layer %d", d.Layer+1)
	}
	switch d.What {
	case whatMissing:
		return fmt.Sprintf("%s: %q (%s) is only in the first", where, "/"+d.Path, d.A)
	case whatExtra:
		return fmt.Sprintf("%s: %q (%s) is only in the second", where, "/"+d.Path, d.B)
	case whatConfig:
		return fmt.Sprintf("image config: %q is %s in the first, %s in the second", d.Path, d.A, d.B)
	default:
		return fmt.Sprintf("%s: %q: %s is %s in the first, %s in the second", where, "/"+d.Path, d.What, d.A, d.B)
	}
}

// Diff compares two images as file trees, layer by layer where they have equally
// many and flattened otherwise: names as bytes, types, modes, owners, times in
// whole seconds, extended attributes, hard links with their identity, devices,
// whiteouts, sizes and content; and their configs but for the diff IDs. The
// files that eStargz adds to a layer do not count. Memory is a few hundred bytes
// for each entry of one layer (of all layers when flattened); content is
// streamed.
func Diff(ctx context.Context, a, b v1.Image, o DiffOptions) ([]Difference, error) {
	if o.MaxDifferences <= 0 {
		o.MaxDifferences = defaultMaxDifferences
	}
	out, err := diffConfigs(a, b)
	if err != nil {
		return nil, err
	}
	la, err := a.Layers()
	if err != nil {
		return nil, fmt.Errorf("layers of the first image: %w", err)
	}
	lb, err := b.Layers()
	if err != nil {
		return nil, fmt.Errorf("layers of the second image: %w", err)
	}
	if len(la) != len(lb) {
		d, err := diffFlattened(ctx, la, lb, o.MaxDifferences)
		return append(out, d...), err
	}
	for i := range la {
		d, err := diffLayers(ctx, la[i], lb[i], o)
		if err != nil {
			return out, fmt.Errorf("layer %d: %w", i+1, err)
		}
		for _, one := range d {
			one.Layer = i
			out = append(out, one)
		}
		if len(out) >= o.MaxDifferences {
			break
		}
	}
	return out, nil
}

func diffConfigs(a, b v1.Image) ([]Difference, error) {
	read := func(img v1.Image) (map[string]any, error) {
		raw, err := img.RawConfigFile()
		if err != nil {
			return nil, err
		}
		var m map[string]any
		if err := json.Unmarshal(raw, &m); err != nil {
			return nil, accel.Permanent(err)
		}
		delete(m, "rootfs")
		return m, nil
	}
	ca, err := read(a)
	if err != nil {
		return nil, fmt.Errorf("config of the first image: %w", err)
	}
	cb, err := read(b)
	if err != nil {
		return nil, fmt.Errorf("config of the second image: %w", err)
	}
	var out []Difference
	for _, k := range sortedKeys(ca, cb) {
		if !reflect.DeepEqual(ca[k], cb[k]) {
			out = append(out, Difference{Layer: -1, Path: k, What: whatConfig, A: inJSON(ca[k]), B: inJSON(cb[k])})
		}
	}
	return out, nil
}

func inJSON(v any) string {
	raw, _ := json.Marshal(v) // it was JSON
	if len(raw) > 200 {
		return string(raw[:200]) + "..."
	}
	return string(raw)
}

func diffLayers(ctx context.Context, a, b v1.Layer, o DiffOptions) ([]Difference, error) {
	ha, err := a.Digest()
	if err != nil {
		return nil, err
	}
	hb, err := b.Digest()
	if err != nil {
		return nil, err
	}
	if ha == hb {
		return nil, nil
	}
	if o.SampleBytes > 0 {
		ta, cut, err := readTree(ctx, a, prefix{bytes: o.SampleBytes})
		if err != nil {
			return nil, fmt.Errorf("of the first image: %w", err)
		}
		tb, _, err := readTree(ctx, b, cut)
		if err != nil {
			return nil, fmt.Errorf("of the second image: %w", err)
		}
		if len(diffTrees(ta, tb, comparison{max: 1})) == 0 {
			return nil, nil
		}
	}
	ta, _, err := readTree(ctx, a, prefix{})
	if err != nil {
		return nil, fmt.Errorf("of the first image: %w", err)
	}
	tb, _, err := readTree(ctx, b, prefix{})
	if err != nil {
		return nil, fmt.Errorf("of the second image: %w", err)
	}
	return diffTrees(ta, tb, comparison{max: o.MaxDifferences}), nil
}

func diffFlattened(ctx context.Context, la, lb []v1.Layer, most int) ([]Difference, error) {
	flatten := func(layers []v1.Layer) (*tree, error) {
		all := newTree()
		for i, l := range layers {
			t, _, err := readTree(ctx, l, prefix{})
			if err != nil {
				return nil, fmt.Errorf("layer %d: %w", i+1, err)
			}
			all.root.overlay(t.root)
		}
		return all, nil
	}
	ta, err := flatten(la)
	if err != nil {
		return nil, fmt.Errorf("first image: %w", err)
	}
	tb, err := flatten(lb)
	if err != nil {
		return nil, fmt.Errorf("second image: %w", err)
	}
	return diffTrees(ta, tb, comparison{max: most}), nil
}

// Whiteouts, as image layers name them.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// overlay lays an upper layer's directory over n.
func (n *node) overlay(upper *node) {
	if !upper.inode.implicit {
		n.inode, n.own = upper.inode, upper.own
	}
	if upper.children[whiteoutOpaque] != nil {
		n.children = nil
	}
	for name := range upper.children {
		if hidden, ok := strings.CutPrefix(name, whiteoutPrefix); ok {
			delete(n.children, hidden)
		}
	}
	for name, c := range upper.children {
		if strings.HasPrefix(name, whiteoutPrefix) {
			continue
		}
		old := n.children[name]
		if !c.isDir() {
			n.add(name, c.inode, c.own)
			continue
		}
		if old == nil || !old.isDir() {
			old = n.add(name, c.inode, c.own)
		}
		old.overlay(c)
	}
}

// prefix is a part of a layer from its beginning. Zero: all of it.
type prefix struct {
	bytes   int64 // about so many of the tar stream; or
	entries int   // so many entries,
	last    int64 // of the last of which so many bytes of content
}

// readTree reads a layer's entries with their content's digests. cut says where
// a prefix of p.bytes really ended; it is zero where that was the layer's end.
func readTree(ctx context.Context, l v1.Layer, p prefix) (_ *tree, cut prefix, err error) {
	mediaType, err := l.MediaType()
	if err != nil {
		return nil, cut, err
	}
	if !mediaType.IsDistributable() {
		h, err := l.Digest()
		if err != nil {
			return nil, cut, err
		}
		return nil, cut, accel.Permanent(fmt.Errorf("foreign layer %s cannot be compared", h))
	}
	rc, err := l.Compressed()
	if err != nil {
		return nil, cut, err
	}
	stop := context.AfterFunc(ctx, func() { rc.Close() })
	defer func() {
		stop()
		rc.Close()
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	stream, err := newSource(rc, nil).tarStream()
	if err != nil {
		return nil, cut, err
	}
	defer stream.Close()
	in := &countingReader{r: stream}
	t := newTree()
	tr := tar.NewReader(in)
	for seq := 0; ; seq++ {
		if ctx.Err() != nil {
			return nil, cut, context.Cause(ctx)
		}
		if seq > maxEntries {
			return nil, cut, accel.Permanent(fmt.Errorf("more than %d entries", maxEntries))
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, cut, fmt.Errorf("tar: %w", err)
		}
		e, err := newEntry(h, seq)
		if err != nil {
			return nil, cut, err
		}
		if e == nil || reserved[clean(e.name)] {
			continue
		}
		cut.entries++
		cut.last = e.size
		switch {
		case p.entries > 0 && cut.entries == p.entries:
			cut.last = min(cut.last, p.last)
		case p.bytes > 0:
			cut.last = min(cut.last, max(0, p.bytes-in.n))
		}
		sum := sha256.New()
		if _, err := io.CopyN(sum, tr, cut.last); err != nil {
			return nil, cut, fmt.Errorf("tar: content of %q: %w", e.name, err)
		}
		sum.Sum(e.content[:0])
		if err := t.add(e); err != nil {
			return nil, cut, err
		}
		if (p.entries > 0 && cut.entries == p.entries) || (p.bytes > 0 && in.n >= p.bytes) {
			return t, cut, nil // links may still lack their targets, on both sides
		}
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return nil, cut, err // the digest does not hold
	}
	return t, prefix{}, t.finish()
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
