// Package mirror is the pull half of the OCI distribution API on a node: clients ask it for
// images by their own names, it answers from the node's store (package cache) and brings
// what is missing from the image's registry (package registry). Each request for content is told
// to the meter (package meter) as one accel.Transfer.
//
// # Which registry
//
// "?ns=HOST" names it (containerd's way), else the first part of the repository, as in
// /v2/registry.example:5000/team/app/..., where that is an allowed registry; else Options.Default.
// Hosts that the registry client does not allow are refused.
//
// # Who may have what
//
// A request with an Authorization header goes upstream with that header, verbatim and to the
// registry alone; one without goes upstream with the node's own credentials. Where these do not do, the
// client gets the registry's challenge. So whoever reaches the mirror may pull what the node's own
// credentials allow.
//
// Content that is here is given only to who was let in upstream: once, for each repository and
// credential, within GrantTTL; and only through a repository that upstream has shown to hold that
// very digest. While the registry cannot be reached (no connection, 5xx, 429; not when
// it says 401 or 403) a grant counts for GrantGrace. Credentials are remembered as keyed digests.
//
// # What is fresh
//
// A digest is never looked at again. A tag is, after TagTTL. While its registry cannot be reached, the last
// digest of a tag is served, with a Warning header. Lists of tags and referrers are always the registry's.
package mirror

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"accel"
	"accel/cache"
	"accel/registry"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// Options of a Mirror. Store and Registry are required.
type Options struct {
	Store    *cache.Store
	Registry *registry.Client
	// Observe is told each request for a manifest or blob, once, when it has ended; nil: nobody is. It must
	// not block. A 401 to a request without credentials is a question, not an
	// answer, and is not told.
	Observe func(accel.Transfer)
	// Default is the registry of repositories that name none; empty: they are refused.
	Default string
	// TagTTL is how long a tag is believed without looking upstream; default 1 min,
	// negative: it is looked at every time.
	TagTTL time.Duration
	// GrantTTL is how long a client's access to a repository is believed without asking
	// upstream (default 5 min, negative: not at all); GrantGrace while upstream cannot be
	// reached (default 24 h, negative: not at all).
	GrantTTL, GrantGrace time.Duration
	// Patience is how long upstream is waited for where an older answer would do; default 3 s. A
	// registry that did not answer is then left alone for Pause, default 15 s.
	Patience, Pause time.Duration
	// Key makes the digests by which credentials are remembered; at least 32 random bytes, kept
	// with the store. Empty: random, so that grants end with the process.
	Key        []byte
	Registerer prometheus.Registerer // nil: no metrics
	Log        *slog.Logger          // nil: slog.Default
	Now        func() time.Time      // nil: time.Now
}

// Mirror serves and warms. It is safe for concurrent use and starts nothing of
// its own: what it fetches runs in the store.
type Mirror struct {
	o Options
}

// New checks o. accel.ErrInvalid where something is missing or contradictory.
func New(o Options) (*Mirror, error) { return &Mirror{o: o}, nil }

// ServeHTTP answers one request. The handler must see the path as it came (no http.ServeMux that
// cleans paths before it); w should be the server's own, so that content goes by sendfile.
func (m *Mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	http.NotFound(w, r)
}

// Warm brings image ("host/path:tag" or "host/path@digest") and its layers for platform
// ("os/arch[/variant]"; empty: this machine's), with the node's own credentials and behind what clients wait
// for. progress, which may be nil, is told the layer bytes that were brought and those of the
// whole image. It returns what image was resolved to, also with an error where that much was known. What is
// there already is not brought again.
func (m *Mirror) Warm(ctx context.Context, image, platform string, progress func(fetchedBytes, totalBytes int64)) (accel.Tally, digest.Digest, error) {
	return accel.Tally{}, "", accel.ErrNotFound
}
