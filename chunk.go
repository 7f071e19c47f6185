package accel

// Bounds of an eStargz layer's TOC, for all who read one: MaxTOCBytes as JSON, some 600,000 entries, and
// MaxPackedTOCBytes as it is in the blob. A layer beyond them is not mounted lazily.
const (
	MaxTOCBytes       = 256 << 20
	MaxPackedTOCBytes = 64 << 20
)

// Bounds of what is mounted lazily: package lazyfs refuses a layer beyond them, and package prefetch, which takes memory by them,
// relies on that. A layer of 32 GiB has 8,192 chunks of the usual 4 MiB, and 16 MiB is the most that package convert makes of one.
const (
	MaxLayerChunks = 1 << 21
	// MaxChunkBytes: a read that meets a hole waits for a whole chunk, and its digest is of all its bytes, which are in
	// memory until then.
	MaxChunkBytes = 16 << 20
	// MaxMemberBytes bounds the gzip members that hold a chunk, compressed.
	MaxMemberBytes = 32 << 20
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
