package accel

// Bounds of an eStargz layer's TOC, for all who read one: MaxTOCBytes as JSON, some 600,000 entries, and
// MaxPackedTOCBytes as it is in the blob. A layer beyond them is not mounted lazily.
const (
	MaxTOCBytes       = 256 << 20
	MaxPackedTOCBytes = 64 << 20
)

// Chunk is one piece of a lazily loaded layer: where its bytes are in the
// layer's blob, and where they belong in the file that holds the layer's content
// on a node. The TOC of an eStargz layer tells the first, package lazyfs decides
// on the second.
type Chunk struct {
	// BlobOffset and BlobBytes are the gzip members that hold it.
	BlobOffset, BlobBytes int64
	// InnerOffset is where it begins in what these inflate to: small files may share
	// a member.
	InnerOffset int64
	// DataOffset is its place in the data file, Bytes its size there.
	DataOffset, Bytes int64
	// Digest is the SHA-256 of its bytes (chunkDigest in the TOC).
	Digest [32]byte
}
