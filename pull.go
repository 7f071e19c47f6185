package accel

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// PullMode says how a node delivered an image.
type PullMode string

// The ways an image reaches a container.
const (
	PullFull   PullMode = "full"   // downloaded and unpacked as a whole, not through the node
	PullLazy   PullMode = "lazy"   // mounted before its content was there
	PullMirror PullMode = "mirror" // downloaded as a whole through the node's mirror
)

// Outcome says where the layer bytes of a pull came from.
type Outcome string

// Outcomes of a pull. Only layer bytes decide; manifests and configs do not.
const (
	OutcomeHit     Outcome = "hit"     // nothing from the registry
	OutcomePartial Outcome = "partial" // some from the registry
	OutcomeMiss    Outcome = "miss"    // all from the registry
	OutcomeError   Outcome = "error"   // the client did not get what it asked for
)

// Pull is one measured pull of one image on one node, from the first request to
// the last byte that the client needed.
type Pull struct {
	// ID is unique in the fleet and makes reporting idempotent (26 characters, a
	// ULID: its first 48 bits are the start in milliseconds).
	ID string `json:"id"`
	// Image is "host/path:tag", or "host/path@digest" where no tag was asked for.
	Image  string        `json:"image"`
	Digest digest.Digest `json:"digest"` // the platform manifest, or what is known of it
	Node   string        `json:"node"`
	Mode   PullMode      `json:"mode"`
	// Tenant and MemoryBytes are what the platform said; empty and 0 where it did not.
	Tenant      string    `json:"tenant,omitempty"`
	MemoryBytes int64     `json:"memoryBytes,omitempty"`
	Start       time.Time `json:"start"`
	// Duration is from Start to the last byte; the quiet time that ended the
	// measurement is not in it. Nanoseconds in JSON.
	Duration time.Duration `json:"durationNs"`
	// Layer bytes by where they came from. A byte that another client's pull was
	// fetching just then counts as from the cache, so that the sum of RegistryBytes
	// over all pulls is what the registry delivered; such a pull is no hit.
	RegistryBytes int64   `json:"registryBytes"`
	PeerBytes     int64   `json:"peerBytes"`
	CacheBytes    int64   `json:"cacheBytes"`
	Outcome       Outcome `json:"outcome"`
	// Reason says in words why an outcome is error, or what was unusual ("the
	// registry knows no ranges").
	Reason string `json:"reason,omitempty"`
	// Lazy says more of a pull whose Mode is PullLazy; zero for others. Its Duration ends when containerd has
	// the image's topmost layer, mounted or there already, and its bytes are those that came until the image was complete, or
	// for two minutes, or until a further pull of it began.
	Lazy LazyPull `json:"lazy,omitzero"`
}

// LazyPull is how an image's content came after it was mounted. Times are counted from the
// pull's Start.
type LazyPull struct {
	// FirstByte is when the first read that had to wait was answered; 0 where none had to.
	FirstByte time.Duration `json:"firstByteNs,omitempty"`
	// Complete is when all content was there; 0 where it was not within two minutes.
	Complete time.Duration `json:"completeNs,omitempty"`
	// Misses are the reads that had to wait, Waited how long all of them did.
	Misses int64         `json:"misses,omitempty"`
	Waited time.Duration `json:"waitedNs,omitempty"`
}

// Tally counts the bytes that one reader was given, by where they came from.
type Tally struct {
	CacheBytes    int64 // were there when the reader came
	RegistryBytes int64 // fetched from the registry because of this reader
	PeerBytes     int64 // fetched from another node because of this reader
	SharedBytes   int64 // fetched because of another reader, while this one waited
}

// Add adds another reader's bytes.
func (t *Tally) Add(o Tally) {
	t.CacheBytes += o.CacheBytes
	t.RegistryBytes += o.RegistryBytes
	t.PeerBytes += o.PeerBytes
	t.SharedBytes += o.SharedBytes
}

// Transfer is one request of one client as the mirror saw it, for the meter.
type Transfer struct {
	// Client tells the clients of one node apart, as well as a request shows:
	// address without port, user agent, and a digest of the credential.
	Client     string
	Repository string        // "host/path"
	Tag        string        // asked for by tag; else empty
	Digest     digest.Digest // what was asked for, or what the tag was resolved to
	Tenant     string
	// MemoryBytes is the container's memory where the platform passes it.
	MemoryBytes int64
	// Manifest is set when the body was a manifest or index (also by HEAD).
	Manifest *ManifestContent
	Tally    Tally
	// Complete is false when the client was not given all that it asked for.
	Complete bool
	Err      error  // why not; nil when the client itself hung up
	Note     string // for Pull.Reason: what was unusual
}

// ManifestContent is what a manifest or index names, with compressed sizes.
type ManifestContent struct {
	MediaType string
	Config    digest.Digest    // zero for an index
	Layers    []BlobDescriptor // empty for an index
	Manifests []digest.Digest  // the members of an index
}

// BlobDescriptor names one blob.
type BlobDescriptor struct {
	Digest    digest.Digest
	SizeBytes int64
}
