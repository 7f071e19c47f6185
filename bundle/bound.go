package bundle

// LayerSize is what an image's mapping says of a layer's blob.
type LayerSize struct {
	Bytes, TOCOffset int64
}

// untrustedBytes of content may be in any bundle.
const untrustedBytes = 16 << 20

// Bounds of a bundle.
type Bounds struct {
	ContentBytes, SizeBytes int64
}

// Bound is how much an image's bundle may have: as much content as the blobs have bytes, which
// is less than half of what they inflate to as a rule, and half of the blobs beside their TOCs. Whoever can push to the
// repository can attach one, and should not make nodes fetch more than a pull would. Bundles of small images may be
// larger.
func Bound(layers []LayerSize) Bounds {
	var blobs, tocs int64
	for _, l := range layers {
		blobs += l.Bytes
		tocs += l.Bytes - l.TOCOffset
	}
	return Bounds{max(blobs, untrustedBytes), min(tocs+max(blobs/2, untrustedBytes), maxBytes)}
}
