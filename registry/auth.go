package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"accel"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// maxSessions bounds the tokens kept for one host; the oldest idea of which
// repositories are in use is forgotten as a whole beyond it.
const maxSessions = 1024

// authority gets the Authorization headers for one host.
type authority struct {
	host     *host
	keychain authn.Keychain
	timeout  time.Duration // for one look-up with its requests

	mu       sync.Mutex
	sessions map[string]*session  // by scopes
	last     *transport.Challenge // that the registry gave; nil: none is known
}

// session is the outcome of one look-up of credentials and token exchange.
type session struct {
	done   chan struct{} // closed when the fields below are set
	header string        // empty: the registry asks for nothing
	renew  time.Time     // when a token nears its end; zero: unknown
	err    error
}

// current returns the session for scopes, made anew where there is none and
// where its token nears its end. challenge is the registry's WWW-Authenticate
// answer, nil where it is not known. guess: a refusal is no loss, so that the
// registry is not asked first how it wants to be authenticated to.
func (a *authority) current(ctx context.Context, path string, scopes []string, challenge *transport.Challenge, guess bool) (*session, error) {
	key := strings.Join(scopes, " ")
	for {
		a.mu.Lock()
		s := a.sessions[key]
		if s == nil || s.expired() {
			if len(a.sessions) >= maxSessions {
				clear(a.sessions)
			}
			s = &session{done: make(chan struct{})}
			a.sessions[key] = s
			a.mu.Unlock()
			a.open(ctx, s, path, scopes, challenge, guess)
			return s, s.err
		}
		a.mu.Unlock()
		select {
		case <-s.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		// Another caller's end is not ours: open a session of our own then.
		if s.err == nil || !errors.Is(s.err, errAbandoned) {
			return s, s.err
		}
	}
}

// errAbandoned: the caller that was opening a session gave up.
var errAbandoned = errors.New("the look-up of credentials was abandoned")

func (a *authority) open(ctx context.Context, s *session, path string, scopes []string, challenge *transport.Challenge, guess bool) {
	defer close(s.done)
	s.header, s.renew, s.err = a.authorize(ctx, path, scopes, challenge, guess)
	if s.err == nil {
		return
	}
	if ctx.Err() != nil {
		s.err = fmt.Errorf("%w: %w", errAbandoned, context.Cause(ctx))
	}
	a.drop(s)
}

// drop forgets a session that the registry refuses, so that the next call of
// current looks the credentials up again.
func (a *authority) drop(s *session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.sessions, func(_ string, other *session) bool { return other == s })
}

// expired reports, without waiting, whether a finished session's token nears its end.
func (s *session) expired() bool {
	select {
	case <-s.done:
		return !s.renew.IsZero() && time.Now().After(s.renew)
	default:
		return false
	}
}

// authorize looks credentials up and gets the header for them. A registry is asked once how it wants that, and not
// at all before a guess where there are no credentials: most of those let anybody read, and the others' refusal says how.
func (a *authority) authorize(ctx context.Context, path string, scopes []string, challenge *transport.Challenge, guess bool) (header string, renew time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	defer func() {
		if err != nil {
			a.learn(nil)
		}
	}()
	if challenge == nil && guess {
		challenge = a.learned()
		if challenge == nil {
			if config, err := lookUp(ctx, a.keychain, resource{a.host.wire, path}); err == nil && *config == (authn.AuthConfig{}) {
				return "", time.Time{}, nil
			}
		}
	}
	if challenge == nil {
		if challenge, err = a.ping(ctx); err != nil {
			return "", time.Time{}, err
		}
	}
	a.learn(challenge)
	if challenge.Scheme == "" {
		return "", time.Time{}, nil
	}
	config, err := lookUp(ctx, a.keychain, resource{a.host.wire, path})
	if err != nil {
		return "", time.Time{}, err
	}
	switch {
	case config.RegistryToken != "":
		return "Bearer " + config.RegistryToken, time.Time{}, nil
	case strings.EqualFold(challenge.Scheme, "basic"):
		return basic(config), time.Time{}, nil
	case strings.EqualFold(challenge.Scheme, "bearer"):
		return a.exchange(ctx, config, scopes, challenge)
	default:
		return "", time.Time{}, fmt.Errorf("%w: %s asks for authentication scheme %q; only Basic and Bearer are known", accel.ErrUnauthenticated, a.host.name, challenge.Scheme)
	}
}

func (a *authority) learn(c *transport.Challenge) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = c
}

func (a *authority) learned() *transport.Challenge {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

// exchange has the registry's token service give a token for the credentials.
func (a *authority) exchange(ctx context.Context, config *authn.AuthConfig, scopes []string, challenge *transport.Challenge) (string, time.Time, error) {
	registry, err := a.registry()
	if err != nil {
		return "", time.Time{}, err
	}
	auth := authn.Anonymous
	if *config != (authn.AuthConfig{}) {
		auth = authn.FromConfig(*config)
	}
	asked := time.Now()
	token, err := transport.Exchange(ctx, registry, auth, a.host.transport, scopes, challenge)
	if err != nil {
		var status *transport.Error
		if errors.As(err, &status) {
			err = refusal(&responseError{answer: status})
		}
		return "", time.Time{}, fmt.Errorf("get a token for %s: %w", a.host.name, err)
	}
	secret := token.Token
	if token.AccessToken != "" {
		secret = token.AccessToken
	}
	if token.ExpiresIn > 0 {
		// A little early, so that the request that carries it still arrives in time.
		return "Bearer " + secret, asked.Add(time.Duration(token.ExpiresIn) * time.Second * 9 / 10), nil
	}
	return "Bearer " + secret, time.Time{}, nil
}

// ping asks how the registry wants to be authenticated to. An empty scheme
// means not at all.
func (a *authority) ping(ctx context.Context) (*transport.Challenge, error) {
	resp, err := a.bare(ctx)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
		// Drained so that the connection is used again.
		_, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorBytes))
		return &transport.Challenge{}, err
	case http.StatusUnauthorized:
		if c := a.challenge(resp); c != nil {
			return c, nil
		}
		return nil, fmt.Errorf("%w: %s answers 401 without saying how to authenticate", accel.ErrUnauthenticated, a.host.name)
	default:
		return nil, refusal(statusError(resp))
	}
}

// bare asks for /v2/ without credentials.
func (a *authority) bare(ctx context.Context) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.host.scheme+"://"+a.host.wire+"/v2/", nil)
	if err != nil {
		cancel()
		return nil, err
	}
	req.Header.Set("User-Agent", userAgent)
	resp, err := a.host.client().Do(req)
	if err != nil {
		cancel()
		return nil, err
	}
	resp.Body = cancelOnClose{resp.Body, cancel}
	return resp, nil
}

type cancelOnClose struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b cancelOnClose) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// challenge reads a 401's WWW-Authenticate; nil where it has none that can be met.
func (a *authority) challenge(resp *http.Response) *transport.Challenge {
	var found *transport.Challenge
	for _, header := range resp.Header.Values("WWW-Authenticate") {
		c := parseChallenge(header)
		c.Insecure = a.host.scheme == "http"
		if strings.EqualFold(c.Scheme, "bearer") && c.Parameters["realm"] != "" {
			return c
		}
		if strings.EqualFold(c.Scheme, "basic") || (found == nil && c.Scheme != "") {
			found = c
		}
	}
	return found
}

func (a *authority) registry() (name.Registry, error) {
	opts := []name.Option{name.WeakValidation}
	if a.host.scheme == "http" {
		opts = append(opts, name.Insecure)
	}
	return name.NewRegistry(a.host.wire, opts...)
}

// basic is the header for a user and password, empty where there are none.
func basic(config *authn.AuthConfig) string {
	if config.Username == "" && config.Password == "" {
		if config.Auth == "" {
			return ""
		}
		return "Basic " + config.Auth
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(config.Username+":"+config.Password))
}

// withScope adds the scope that a challenge asks for, unless scopes has it. It
// goes first: some token services look at the first one alone.
func withScope(scopes []string, challenge *transport.Challenge) []string {
	if challenge == nil {
		return scopes
	}
	wanted := challenge.Parameters["scope"]
	if wanted == "" || slices.ContainsFunc(scopes, func(s string) bool { return covers(s, wanted) }) {
		return scopes
	}
	return append([]string{wanted}, scopes...)
}

// covers reports whether scope has, TYPE:NAME:ACTION[,ACTION...], everything
// that wanted has.
func covers(scope, wanted string) bool {
	i, j := strings.LastIndexByte(scope, ':'), strings.LastIndexByte(wanted, ':')
	if i < 0 || j < 0 || scope[:i] != wanted[:j] {
		return false
	}
	actions := strings.Split(scope[i+1:], ",")
	for action := range strings.SplitSeq(wanted[j+1:], ",") {
		if !slices.Contains(actions, action) {
			return false
		}
	}
	return true
}

// parseChallenge reads one WWW-Authenticate header (RFC 9110 section 11.6.1);
// what is malformed ends it.
func parseChallenge(header string) *transport.Challenge {
	scheme, rest, _ := strings.Cut(strings.TrimSpace(header), " ")
	c := &transport.Challenge{Scheme: scheme, Parameters: map[string]string{}}
	for {
		rest = strings.TrimLeft(rest, " \t,")
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			return c
		}
		after = strings.TrimLeft(after, " \t")
		var value string
		if quoted, isQuoted := strings.CutPrefix(after, `"`); isQuoted {
			var b strings.Builder
			i := 0
			for ; i < len(quoted) && quoted[i] != '"'; i++ {
				if quoted[i] == '\\' && i+1 < len(quoted) {
					i++
				}
				b.WriteByte(quoted[i])
			}
			value, rest = b.String(), quoted[min(i+1, len(quoted)):]
		} else {
			value, rest, _ = strings.Cut(after, ",")
			value = strings.TrimSpace(value)
		}
		c.Parameters[strings.ToLower(strings.TrimSpace(key))] = value
	}
}
