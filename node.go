package accel

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Node is one machine that runs `accel node`, as it tells of itself.
type Node struct {
	Name    string            `json:"name"`
	Labels  map[string]string `json:"labels,omitempty"`
	Version string            `json:"version"`
	// StartedAt is when the daemon started; SeenAt, set by the server, when it was
	// heard of last.
	StartedAt time.Time  `json:"startedAt"`
	SeenAt    time.Time  `json:"seenAt,omitzero"`
	Cache     CacheUsage `json:"cache"`
	// DroppedPulls counts pull reports that the node had to drop, since its start.
	DroppedPulls int64 `json:"droppedPulls,omitempty"`
}

// CacheUsage is how full a node's cache is. Bytes are allocated blocks on disk.
type CacheUsage struct {
	BudgetBytes int64 `json:"budgetBytes"` // 0: bounded by the free-space floor alone
	UsedBytes   int64 `json:"usedBytes"`
	PinnedBytes int64 `json:"pinnedBytes"`
	FreeBytes   int64 `json:"freeBytes"` // of the file system
	Blobs       int   `json:"blobs"`
}

// WarmState is how far a Warm has come.
type WarmState string

// The states of a Warm. Only the node moves one on; the server makes it Pending.
const (
	WarmPending  WarmState = "Pending"  // the node has not taken it up yet
	WarmFetching WarmState = "Fetching" // the node is at it
	WarmDone     WarmState = "Warm"     // all is there, also where it was before
	WarmFailed   WarmState = "Failed"   // Reason says why
)

// Warm is one image that one node is to have ahead of its first start.
type Warm struct {
	ID   string `json:"id"`
	Node string `json:"node"`
	// Image is what is fetched, "host/path:tag", "host/path@digest" or with both; Digest is
	// what it was resolved to, empty while that is not known.
	Image  string        `json:"image"`
	Digest digest.Digest `json:"digest,omitempty"`
	// Rule names the configured rule that asked for it; empty for a person's wish.
	Rule   string    `json:"rule,omitempty"`
	State  WarmState `json:"state"`
	Reason string    `json:"reason,omitempty"`
	// TotalBytes are the image's compressed layers, FetchedBytes those of them that
	// had to be brought.
	TotalBytes   int64     `json:"totalBytes,omitempty"`
	FetchedBytes int64     `json:"fetchedBytes,omitempty"`
	CreatedAt    time.Time `json:"createdAt"`
	UpdatedAt    time.Time `json:"updatedAt"`
}

// Ended reports whether the node is through with w.
func (w Warm) Ended() bool { return w.State == WarmDone || w.State == WarmFailed }
