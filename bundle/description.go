package bundle

import (
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// maxDescriptionBytes bounds an annotation.
const maxDescriptionBytes = 64 << 10

// Description is what a profile's artifact says of the bundle beside it (accel.AnnotationBundle): enough to know, before it
// is asked for, whether it is worth that.
type Description struct {
	Digest    digest.Digest      `json:"digest"`
	SizeBytes int64              `json:"size"`
	Layers    []LayerDescription `json:"layers"`
}

// LayerDescription is one layer of the image.
type LayerDescription struct {
	TOCDigest    digest.Digest `json:"toc"`
	ContentBytes int64         `json:"content"` // of its chunks in the bundle
}

func describe(h *head, content []byte) Description {
	d := Description{Digest: digest.FromBytes(content), SizeBytes: int64(len(content))}
	for _, l := range h.layers {
		d.Layers = append(d.Layers, LayerDescription{TOCDigest: l.TOCDigest})
	}
	for _, f := range h.frames {
		for _, c := range f.Chunks {
			d.Layers[c.Layer].ContentBytes += c.Bytes
		}
	}
	return d
}

// Encode gives the annotation's value.
func (d Description) Encode() (string, error) {
	b, err := json.Marshal(d)
	if err == nil && len(b) > maxDescriptionBytes {
		err = fmt.Errorf("%w: a description of %d bytes", ErrTooLarge, len(b))
	}
	return string(b), err
}

// ParseDescription reads an annotation's value. The error wraps accel.ErrInvalid.
func ParseDescription(text string) (d Description, err error) {
	if len(text) > maxDescriptionBytes {
		return d, formatError("a description of %d bytes", len(text))
	}
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		return d, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if _, err := rawDigest(d.Digest); err != nil {
		return d, err
	}
	if d.SizeBytes <= prefixBytes || d.SizeBytes > maxBytes || len(d.Layers) == 0 || len(d.Layers) > maxLayers {
		return d, formatError("a description of %d bytes and %d layers", d.SizeBytes, len(d.Layers))
	}
	for _, l := range d.Layers {
		if _, err := rawDigest(l.TOCDigest); err != nil {
			return d, err
		}
		if l.ContentBytes < 0 || l.ContentBytes > maxBytes {
			return d, formatError("%d bytes of a layer", l.ContentBytes)
		}
	}
	return d, nil
}
