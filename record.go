package accel

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Record is one image's way to readiness: one for each repository, source
// digest and conversion parameters. It is also the queue entry that a worker
// claims. Only package readiness changes State.
type Record struct {
	// ID is derived from Repository, Digest (or the tag while the digest is
	// unknown) and Params, so that a repeated push finds the same record.
	ID string `json:"id"`
	// Repository is the registry's host and the path: "host:5000/team/app".
	Repository string `json:"repository"`
	// Digest is the source manifest's or index's; empty while only a tag is
	// known, until a worker has resolved it.
	Digest digest.Digest `json:"digest,omitempty"`
	// Tags that point to Digest now, sorted.
	Tags []string `json:"tags,omitempty"`
	// MediaType of the source manifest; empty while unknown.
	MediaType string `json:"mediaType,omitempty"`
	// Params is the fingerprint of the conversion parameters.
	Params string `json:"params"`
	// Origin names what brought it first: a webhook source or an Origin constant.
	Origin string `json:"origin"`

	State State `json:"state"`
	// Reason says in one line why the record is in State; empty where the state
	// says it all.
	Reason string `json:"reason,omitempty"`
	// Rule is the policy rule that a Rejected image broke.
	Rule string `json:"rule,omitempty"`
	// Attempts counts conversions begun since the last push or retry.
	Attempts int `json:"attempts"`
	// SuccessorID is the record that took over: the newer push of a Superseded
	// one's last tag, or the index that a child manifest was folded into.
	SuccessorID string `json:"successorId,omitempty"`

	CreatedAt time.Time `json:"createdAt"`
	// UpdatedAt is the time of the last change of State.
	UpdatedAt time.Time `json:"updatedAt"`
	// DueAt is when it needs work next: Pending and Failed, the earliest claim;
	// Converting, the end of the lease; Ready, the next check of the target.
	// Zero: never.
	DueAt time.Time `json:"dueAt,omitzero"`
	// Lease is non-zero while Converting; a worker that holds an older one has
	// lost the record.
	Lease uint64 `json:"lease,omitempty"`
	// CheckedAt is when the target was last seen whole in the registry.
	CheckedAt time.Time `json:"checkedAt,omitzero"`

	// Target is where the converted image is; set when Ready and kept after.
	Target Target `json:"target,omitzero"`
	// Result has the sizes, times and remarks of the conversion that made Target.
	Result Result `json:"result,omitzero"`
}

// Target names a converted image.
type Target struct {
	Repository string        `json:"repository"`
	Digest     digest.Digest `json:"digest"`
	// Tags under which it was pushed, sorted; empty for a push by digest alone.
	Tags []string `json:"tags,omitempty"`
}

// Result is what a finished conversion measured.
type Result struct {
	// SourceBytes and TargetBytes are the compressed layers of all platforms.
	SourceBytes int64 `json:"sourceBytes"`
	TargetBytes int64 `json:"targetBytes"`
	// UncompressedBytes is the largest platform's, the one that policy limits.
	UncompressedBytes int64 `json:"uncompressedBytes"`
	// Times in nanoseconds. Queued: from intake to claim; the others are the
	// phases after it, Total their sum with the queueing.
	Queued  time.Duration `json:"queuedNs"`
	Convert time.Duration `json:"convertNs"`
	Push    time.Duration `json:"pushNs"`
	Verify  time.Duration `json:"verifyNs"`
	Total   time.Duration `json:"totalNs"`
	// Platforms converted, "os/arch[/variant]".
	Platforms []string `json:"platforms,omitempty"`
	// Notes list what was carried over or dropped, and by which rule.
	Notes []string `json:"notes,omitempty"`
}

// Final reports whether nothing more will happen to r by itself, so that a
// waiter can be answered. A Superseded record is final; waiters follow
// SuccessorID first.
func (r Record) Final() bool {
	switch r.State {
	case Ready, Rejected, Superseded:
		return true
	case Failed:
		return r.DueAt.IsZero()
	default:
		return false
	}
}

// Image is the reference that a person would type for r: by digest where it is
// known, else by tag.
func (r Record) Image() string {
	if r.Digest != "" {
		return r.Repository + "@" + r.Digest.String()
	}
	if len(r.Tags) > 0 {
		return r.Repository + ":" + r.Tags[0]
	}
	return r.Repository
}
