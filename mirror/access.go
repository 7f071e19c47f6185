package mirror

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"accel"
	"accel/cache"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// refusalTTL is how long the node's own credentials are not tried again at a repository
// that refused them: clients with credentials of their own make the first request of every
// pull without.
const refusalTTL = 30 * time.Second

// OwnClient stands for the node's own credentials where the store keeps grants.
const OwnClient = "node"

// access is one repository as one credential sees it.
type access struct {
	m      *Mirror
	source *registry.Source
	client string // what grants are kept by: OwnClient, or a keyed digest of the credential
	// arrived is when the request came, zero where it is none of a client: one that waited while
	// the registry failed others does not try by itself.
	arrived time.Time
}

// access opens a repository for the bearer of an Authorization header.
func (m *Mirror) access(host, path, authorization string) (access, error) {
	source, err := m.o.Registry.Source(host+"/"+path, authorization)
	if err != nil {
		return access{}, err
	}
	return access{m: m, source: source, client: m.clientOf(host, authorization)}, nil
}

func (m *Mirror) clientOf(host, authorization string) string {
	if authorization == "" {
		return OwnClient
	}
	h := hmac.New(sha256.New, m.o.Key)
	h.Write([]byte(host + "\x00" + authorization))
	return hex.EncodeToString(h.Sum(nil)[:16])
}

func (a access) repository() string { return a.source.Repository() }

// granted says whether the client was let in lately enough to be served without a
// question, and lately enough to be served while upstream cannot be asked. What would be given then to
// who shows no credential is given to everybody.
func (a access) granted() (fresh, graced bool) {
	fresh, graced = a.grantOf(a.client)
	if !graced && a.client != OwnClient {
		_, graced = a.grantOf(OwnClient)
	}
	return fresh, graced
}

func (a access) grantOf(client string) (fresh, graced bool) {
	at, known := a.m.o.Store.Granted(a.repository(), client)
	if !known {
		return false, false
	}
	age := a.m.o.Now().Sub(at)
	return age < a.m.o.GrantTTL, age < max(a.m.o.GrantGrace, a.m.o.GrantTTL)
}

// admit remembers that upstream gave d, or said that it has it, to this client.
func (a access) admit(d digest.Digest) {
	err := errors.Join(
		a.m.o.Store.Grant(a.repository(), a.client, a.m.o.Now()),
		a.m.o.Store.Link(a.repository(), d))
	if err != nil && !errors.Is(err, cache.ErrClosed) {
		a.m.o.Log.Warn("access cannot be remembered", "repository", a.repository(), "error", err)
	}
}

func (a access) linked(d digest.Digest) bool { return a.m.o.Store.Linked(a.repository(), d) }

// ask puts a question to upstream, whose answer is waited for as Options.AnswerPatience says. Where an older
// answer would do, it is given up earlier, and not asked at all while the host is left alone.
func (a access) ask(ctx context.Context, olderWillDo bool, question func(ctx context.Context) error) error {
	if a.source.Own() {
		if r, ok := a.m.refusals.Get(a.repository()); ok && a.m.within(r.at, refusalTTL) {
			return r.err
		}
	}
	p, failed := a.m.paused.Get(a.source.Host())
	if failed && a.m.within(p.at, a.m.o.Pause) && (olderWillDo || !a.arrived.IsZero() && p.at.After(a.arrived)) {
		return &pausedError{p.err}
	}
	patience := a.m.o.AnswerPatience
	if olderWillDo {
		patience = min(patience, a.m.o.Patience)
	}
	bounded, cancel := context.WithTimeoutCause(ctx, patience, errImpatient)
	defer cancel()
	err := question(bounded)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	a.learn(err)
	return err
}

// within reports whether at is less than ttl ago, and not in the future.
func (m *Mirror) within(at time.Time, ttl time.Duration) bool {
	age := m.o.Now().Sub(at)
	return age >= 0 && age < ttl
}

// Why upstream is not waited for any longer.
var (
	errImpatient = errors.New("the registry took too long to answer")
	errStalled   = errors.New("the registry sent nothing for too long")
)

// pausedError stands in for an error of a moment ago.
type pausedError struct{ error }

func (e *pausedError) Error() string { return "not asked again so soon: " + e.error.Error() }
func (e *pausedError) Unwrap() error { return e.error }

// learn draws the conclusions of one answer for the next requests.
func (a access) learn(err error) {
	switch {
	case registry.Unreachable(err):
		a.m.paused.Add(a.source.Host(), pause{err, a.m.o.Now()})
	case errors.Is(err, accel.ErrUnauthenticated), errors.Is(err, accel.ErrForbidden):
		if err := a.m.o.Store.Revoke(a.repository(), a.client); err != nil && !errors.Is(err, cache.ErrClosed) {
			a.m.o.Log.Warn("a refusal cannot be remembered", "repository", a.repository(), "error", err)
		}
		if a.source.Own() {
			a.m.refusals.Add(a.repository(), refusal{err, a.m.o.Now()})
		}
		fallthrough
	default:
		a.m.paused.Remove(a.source.Host())
	}
}

// challenge is what the client is told to authenticate with after err; none where the
// registry asks for nothing that would help.
func (a access) challenge(ctx context.Context, err error) []string {
	found := registry.ChallengeOf(err)
	known, _ := a.m.challenges.Get(a.source.Host())
	if len(found) == 0 && a.m.within(known.at, refusalTTL) {
		return known.values
	}
	if len(found) == 0 {
		// The token service said no, or the registry did without saying what it wants.
		ctx, cancel := context.WithTimeout(ctx, a.m.o.Patience)
		defer cancel()
		asked, err := a.m.o.Registry.Challenge(ctx, a.source.Host())
		if err != nil {
			return known.values
		}
		found = asked
	}
	if len(found) > 0 && a.source.Own() {
		a.m.challenges.Add(a.source.Host(), challenge{found, a.m.o.Now()})
	}
	return found
}

// basicChallenge is the challenge that brings a client's password here while upstream cannot be
// reached, so that its grant can be found; a token could not be had then.
func (a access) basicChallenge() []string {
	known, _ := a.m.challenges.Get(a.source.Host())
	if c := scheme(known.values, "basic"); c != "" {
		return []string{c}
	}
	return nil
}

// scheme is the first of the challenges that is for a scheme.
func scheme(challenges []string, want string) string {
	for _, c := range challenges {
		if got, _, _ := strings.Cut(c, " "); strings.EqualFold(got, want) {
			return c
		}
	}
	return ""
}

// warning is the header's value (distribution spec, "Warnings") where content was
// served without asking.
func (a access) warning(err error) string {
	text := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return ' '
		}
		return r
	}, fmt.Sprintf("%s could not be asked: %v", a.source.Host(), err))
	return `299 - "` + text[:min(len(text), 256)] + `"`
}
