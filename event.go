package accel

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// PushEvent says that a manifest was pushed, as a registry's webhook, the API
// or a reconcile told it. Either Tag or Digest is set, mostly both.
type PushEvent struct {
	// Source names what told it: the configured name of a webhook source, or
	// one of the Origin constants.
	Source string
	// Registry is the host, with a port where it is not the default one.
	Registry string
	// Repository is the path below the host, such as "library/nginx".
	Repository string
	// Tag is empty for a push by digest.
	Tag string
	// Digest is empty where the registry does not tell it; a worker resolves
	// the tag then.
	Digest digest.Digest
	// MediaType is the manifest's, empty where unknown.
	MediaType string
	// OccurredAt is the registry's time of the push; zero where unknown. It
	// orders pushes of one tag that arrive out of order.
	OccurredAt time.Time
}

// Origins of events that no webhook brought.
const (
	OriginAPI       = "api"       // POST /v1/images
	OriginReconcile = "reconcile" // found by comparing a registry with the records
)
