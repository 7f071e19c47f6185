package accel

import "github.com/opencontainers/go-digest"

// Mapping says which converted image stands in for one source PLATFORM
// manifest (the digest that containerd hands to a node), layer by layer. It is
// believed only when signed by a trusted key or had from the authenticated API.
type Mapping struct {
	// SourceRepository and TargetRepository are "host/path".
	SourceRepository string        `json:"sourceRepository"`
	SourceManifest   digest.Digest `json:"sourceManifest"`
	// SourceIndex is the index that SourceManifest belongs to; empty for an image
	// that was pushed without one.
	SourceIndex      digest.Digest  `json:"sourceIndex,omitempty"`
	Platform         string         `json:"platform"`
	TargetRepository string         `json:"targetRepository"`
	TargetManifest   digest.Digest  `json:"targetManifest"`
	Params           string         `json:"params"`
	Layers           []LayerMapping `json:"layers"`
}

// LayerMapping pairs one source layer with its converted form. A layer that was
// passed through (foreign, or eStargz already) has Target equal to Source.
type LayerMapping struct {
	Source digest.Digest `json:"source"`
	// DiffID is the source layer's uncompressed digest, from the image config.
	DiffID digest.Digest `json:"diffId"`
	Target digest.Digest `json:"target"`
	// TargetBytes is the converted layer's compressed size.
	TargetBytes int64 `json:"targetBytes"`
	// TOCDigest and TOCOffset are zero for a layer without a TOC.
	TOCDigest digest.Digest `json:"tocDigest,omitempty"`
	TOCOffset int64         `json:"tocOffset,omitempty"`
}
