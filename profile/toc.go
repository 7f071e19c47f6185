package profile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode/utf8"

	"accel"

	"github.com/opencontainers/go-digest"
)

const (
	// maxTOCBytes bounds the TOCs of an image, added up: some 700,000 files.
	maxTOCBytes = 256 << 20
	// maxValueBytes is the largest value in a TOC, such as an entry with its extended attributes.
	maxValueBytes = 4 << 20
)

// tocEntry is what matters here of an entry of an eStargz layer's TOC.
type tocEntry struct {
	Name        string        `json:"name"`
	Type        string        `json:"type"`
	Size        int64         `json:"size"`
	LinkName    string        `json:"linkName"`
	Mode        int64         `json:"mode"`
	Digest      digest.Digest `json:"digest"`
	Offset      int64         `json:"offset"`
	InnerOffset int64         `json:"innerOffset"`
	ChunkOffset int64         `json:"chunkOffset"`
	ChunkSize   int64         `json:"chunkSize"`
	ChunkDigest digest.Digest `json:"chunkDigest"`
}

// Names that the format has at a layer's root, which are no files of the image.
var ownNames = map[string]bool{"stargz.index.json": true, ".prefetch.landmark": true, ".no.prefetch.landmark": true}

// errTOCTooLarge is the reader's that ends a TOC beyond a bound.
var errTOCTooLarge = fmt.Errorf("%w: it is too large, or one of its values is", accel.ErrInvalid)

// guard lets a decoder read no more than ctx and the bounds allow: it would gather a value of any size.
type guard struct {
	ctx  context.Context
	r    io.Reader
	d    *json.Decoder
	left int64 // of the TOC
	read int64
}

func (g *guard) Read(p []byte) (int, error) {
	if g.ctx.Err() != nil {
		return 0, context.Cause(g.ctx)
	}
	if g.left <= 0 || g.read-g.d.InputOffset() > maxValueBytes {
		return 0, errTOCTooLarge
	}
	n, err := g.r.Read(p[:min(int64(len(p)), g.left)])
	g.left -= int64(n)
	g.read += int64(n)
	return n, err
}

// eachEntry calls do for every entry of a TOC of at most maxBytes with its clean name, "" for the
// root, and adds what was read to total. The error is an accel.ErrInvalid, toc's, ctx's or do's.
func eachEntry(ctx context.Context, toc io.Reader, maxBytes int64, do func(name string, e *tocEntry) error, total *int64) error {
	g := &guard{ctx: ctx, r: toc, left: maxBytes + 1}
	g.d = json.NewDecoder(g)
	err := eachIn(g.d, do)
	*total += g.read
	return err
}

func eachIn(d *json.Decoder, do func(name string, e *tocEntry) error) error {
	bad := func(err error) error {
		var syntax *json.SyntaxError
		var kind *json.UnmarshalTypeError
		if errors.As(err, &syntax) || errors.As(err, &kind) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: %w", accel.ErrInvalid, err)
		}
		return fmt.Errorf("TOC at byte %d: %w", d.InputOffset(), err)
	}
	if t, err := d.Token(); err != nil {
		return bad(err)
	} else if t != json.Delim('{') {
		return fmt.Errorf("%w: TOC is no object", accel.ErrInvalid)
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return bad(err)
		}
		if key != "entries" {
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return bad(err)
			}
			continue
		}
		t, err := d.Token()
		if err == nil && t == nil {
			continue // null: no entries
		}
		if err != nil {
			return bad(err)
		}
		if t != json.Delim('[') {
			return fmt.Errorf("%w: TOC's entries are no list", accel.ErrInvalid)
		}
		for d.More() {
			var e tocEntry
			if err := d.Decode(&e); err != nil {
				return bad(err)
			}
			name, counts, err := entryName(e.Name)
			if err != nil {
				return err
			}
			if !counts {
				continue
			}
			if err := do(name, &e); err != nil {
				return err
			}
		}
		if _, err := d.Token(); err != nil {
			return bad(err)
		}
	}
	if _, err := d.Token(); err != nil {
		return bad(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		if err == nil {
			err = fmt.Errorf("%w: there is more behind its end", accel.ErrInvalid)
		}
		return bad(err)
	}
	return nil
}

// entryName is an entry's clean name; the format's own entries do not count.
func entryName(given string) (name string, counts bool, err error) {
	name = cleanName(given)
	if ownNames[name] {
		return "", false, nil
	}
	if len(name) > MaxPathBytes || strings.ContainsRune(name, 0) || !utf8.ValidString(name) {
		return "", false, fmt.Errorf("%w: TOC: name %.100q", accel.ErrInvalid, name)
	}
	return name, true, nil
}

// cleanName is name below the root, "" for the root itself.
func cleanName(name string) string { return path.Clean("/" + name)[1:] }
