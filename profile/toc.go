package profile

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode/utf8"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Bounds of a TOC, as package convert makes it.
const (
	maxTOCBytes = 1 << 30
	maxEntries  = 1 << 20 // of all layers of an image
	maxChunks   = 8 << 20
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
}

// Names that the format has at a layer's root, which are no files of the image.
var ownNames = map[string]bool{"stargz.index.json": true, ".prefetch.landmark": true, ".no.prefetch.landmark": true}

// eachEntry calls do for every entry of a TOC with its clean name, "" for the
// root. The error is an accel.ErrInvalid, or do's.
func eachEntry(toc []byte, do func(name string, e *tocEntry) error) error {
	if len(toc) > maxTOCBytes {
		return fmt.Errorf("%w: TOC of %d bytes", accel.ErrInvalid, len(toc))
	}
	d := json.NewDecoder(bytes.NewReader(toc))
	bad := func(err error) error {
		return fmt.Errorf("%w: TOC at byte %d: %w", accel.ErrInvalid, d.InputOffset(), err)
	}
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
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
		if err != nil || t != json.Delim('[') {
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
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("%w: TOC has more behind its end", accel.ErrInvalid)
	}
	return nil
}

// entryName is an entry's clean name; the format's own entries do not count.
func entryName(given string) (name string, counts bool, err error) {
	name = cleanName(given)
	if ownNames[name] {
		return "", false, nil
	}
	if len(name) > maxPathBytes || strings.ContainsRune(name, 0) || !utf8.ValidString(name) {
		return "", false, fmt.Errorf("%w: TOC: name %.100q", accel.ErrInvalid, name)
	}
	return name, true, nil
}

// cleanName is name below the root, "" for the root itself.
func cleanName(name string) string { return path.Clean("/" + name)[1:] }
