// Package mirror is the pull half of the OCI distribution API on a node: clients ask it for
// images by their own names, it answers from the node's store (package cache) and brings
// what is missing from the image's registry (package registry). Each request for content is told
// to the meter (package meter) as one accel.Transfer.
//
// # Which registry
//
// "?ns=HOST" names it (containerd's way), else the first part of the repository, as in
// /v2/registry.example:5000/team/app/..., where that is an allowed registry (a port may also be written
// as registry.example_5000, for clients that take no colon there); else Options.Default.
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
// very digest. While the registry or its token service cannot be reached (no connection, 5xx, 429; not when
// it says 401 or 403) a grant counts for GrantGrace, and that of the node's own credentials (where there are
// none: of nobody's) for every client, since each may come without a credential. Others get a 503 that says so.
// Credentials are remembered as keyed digests.
//
// # What is fresh
//
// A digest is never looked at again. A tag is, after TagTTL, and so is a list of referrers. While the registry
// cannot be reached, the last digest and list are served, with a Warning header. Lists of tags are always the
// registry's.
package mirror

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"accel"
	"accel/cache"
	"accel/internal/keylock"
	"accel/registry"

	lru "github.com/hashicorp/golang-lru/v2"
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
	// Begin is told each request for a manifest (zero digest where it is by tag) or blob when it
	// begins; what it returns is called once when the request has ended, with what Observe is told, or
	// with nil where that is told nothing. nil: nobody is. Neither may block.
	Begin func(client, repository string, d digest.Digest) (end func(*accel.Transfer))
	// Default is the registry of repositories that name none; empty: they are refused.
	Default string
	// TagTTL is how long a tag or a list of referrers is believed without looking upstream; default 1 min,
	// negative: it is looked at every time.
	TagTTL time.Duration
	// GrantTTL is how long a client's access to a repository is believed without asking
	// upstream (default 5 min, negative: not at all); GrantGrace while upstream cannot be
	// reached (default 24 h, negative: not at all).
	GrantTTL, GrantGrace time.Duration
	// Patience is how long upstream is waited for where an older answer would do; default 3 s. A
	// registry that did not answer is then left alone for Pause, default 15 s.
	Patience, Pause time.Duration
	// AnswerPatience is how long upstream is waited for where there is no older answer, all attempts
	// together: for what a manifest or a question takes, and for a blob's first byte; default 15 s.
	// StallPatience is how long a blob that has begun may bring nothing, attempts to resume it included;
	// default 30 s.
	AnswerPatience, StallPatience time.Duration
	// Key makes the digests by which credentials are remembered; at least 32 random bytes, kept
	// with the store. Empty: random, so that grants end with the process.
	Key []byte
	// ClientPatience is how long a client may take nothing of what is sent to it before
	// its connection is ended; default 2 min.
	ClientPatience time.Duration
	Registerer     prometheus.Registerer // nil: no metrics
	Log            *slog.Logger          // nil: slog.Default
	Now            func() time.Time      // nil: time.Now
}

// minKeyBytes of Options.Key; shorter ones could be guessed.
const minKeyBytes = 32

// The bounds of what is remembered in memory, in entries of about 200 bytes.
const (
	maxSizes    = 100_000 // blobs that a served manifest named
	maxRefusals = 4096    // repositories that the node's own credentials do not open
	maxHosts    = 256     // as many as registry.Client keeps
)

// Mirror serves and warms. It is safe for concurrent use and starts nothing of
// its own: what it fetches runs in the store.
type Mirror struct {
	o       Options
	metrics *metrics
	// asking lets one of several equal requests ask upstream; the others find its answer in the store.
	asking keylock.Mutex
	// sizes of blobs as the manifests of a repository tell them, which saves a HEAD.
	sizes *lru.Cache[sizeKey, int64]
	// refusals of the node's own credentials, for a short while, and what the
	// registry wanted instead.
	refusals   *lru.Cache[string, refusal]
	challenges *lru.Cache[string, challenge]
	paused     *lru.Cache[string, pause] // hosts that did not answer
}

type sizeKey struct {
	repository string
	digest     digest.Digest
}

// refusal, challenge and pause are what a registry said last, and when.
type (
	refusal struct {
		err error
		at  time.Time
	}
	challenge struct {
		values []string // of WWW-Authenticate
		at     time.Time
	}
	pause struct {
		err error
		at  time.Time
	}
)

// New checks o. accel.ErrInvalid where something is missing or contradictory.
func New(o Options) (*Mirror, error) {
	if o.Store == nil || o.Registry == nil {
		return nil, fmt.Errorf("%w: a mirror needs a store and a registry client", accel.ErrInvalid)
	}
	if o.Default != "" {
		host, err := o.Registry.Canonical(o.Default)
		if err != nil {
			return nil, fmt.Errorf("default registry of the mirror: %w", err)
		}
		o.Default = host
	}
	switch {
	case len(o.Key) == 0:
		o.Key = make([]byte, minKeyBytes)
		if _, err := rand.Read(o.Key); err != nil {
			return nil, fmt.Errorf("key of the mirror: %w", err)
		}
	case len(o.Key) < minKeyBytes:
		return nil, fmt.Errorf("%w: the mirror's key has %d bytes, want at least %d", accel.ErrInvalid, len(o.Key), minKeyBytes)
	}
	for _, d := range []struct {
		set   *time.Duration
		value time.Duration
	}{
		{&o.TagTTL, time.Minute}, {&o.GrantTTL, 5 * time.Minute}, {&o.GrantGrace, 24 * time.Hour},
		{&o.Patience, 3 * time.Second}, {&o.Pause, 15 * time.Second}, {&o.ClientPatience, 2 * time.Minute},
		{&o.AnswerPatience, 15 * time.Second}, {&o.StallPatience, 30 * time.Second},
	} {
		if *d.set == 0 {
			*d.set = d.value
		}
	}
	if min(o.Patience, o.Pause, o.ClientPatience, o.AnswerPatience, o.StallPatience) < 0 {
		return nil, fmt.Errorf("%w: neither a mirror's patience nor its Pause is negative", accel.ErrInvalid)
	}
	if o.Observe == nil {
		o.Observe = func(accel.Transfer) {}
	}
	if o.Begin == nil {
		o.Begin = func(string, string, digest.Digest) func(*accel.Transfer) { return func(*accel.Transfer) {} }
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	m := &Mirror{o: o}
	var errs [5]error
	m.metrics, errs[0] = newMetrics(o.Registerer)
	m.sizes, errs[1] = lru.New[sizeKey, int64](maxSizes)
	m.refusals, errs[2] = lru.New[string, refusal](maxRefusals)
	m.challenges, errs[3] = lru.New[string, challenge](maxHosts)
	m.paused, errs[4] = lru.New[string, pause](maxHosts)
	return m, errors.Join(errs[:]...)
}
