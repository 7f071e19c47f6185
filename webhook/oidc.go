package webhook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"accel"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/time/rate"
)

const (
	issuerTimeout      = 10 * time.Second // one request to the issuer
	maxIssuerBodyBytes = 1 << 20          // its metadata or its key set; Google's are under 10 KiB
	maxTokenBytes      = 16 << 10         // Google's are about 1 KiB
	issuerBurst        = 8
)

// issuerInterval is the pause between requests to the issuer once a burst is
// used up. Every token with an unknown key has the key set fetched again, and
// anybody can send such a token.
const issuerInterval = time.Second

// oidcToken authenticates Pub/Sub's pushes by the OpenID Connect token of the
// subscription's service account.
type oidcToken struct {
	issuer, audience, email string
	client                  *http.Client
	// verifier holds nil until the issuer's metadata have been fetched; who took
	// it out is the one to fetch, the others wait for it to be put back.
	verifier chan *oidc.IDTokenVerifier
}

// newOIDC checks c. The issuer is asked at the first push, not here, so that a
// start does not depend on it.
func newOIDC(c OIDC, client *http.Client) (_ authenticator, key string, _ error) {
	if c.Issuer == "" {
		c.Issuer = DefaultIssuer
	}
	switch {
	case !secureURL(c.Issuer):
		return nil, "oidc.issuer", fmt.Errorf("%q is no https URL", c.Issuer)
	case c.Audience == "":
		return nil, "oidc.audience", errors.New("missing; want the audience that the push subscription was configured with")
	case c.Email == "":
		return nil, "oidc.email", errors.New("missing; want the service account that the push subscription signs as")
	}
	if client == nil {
		client = &http.Client{}
	}
	limited := *client
	if limited.Timeout <= 0 || limited.Timeout > issuerTimeout {
		limited.Timeout = issuerTimeout
	}
	base := limited.Transport
	if base == nil {
		base = http.DefaultTransport
	}
	limited.Transport = &limitedTransport{base: base, limiter: rate.NewLimiter(rate.Every(issuerInterval), issuerBurst)}
	a := &oidcToken{
		issuer: c.Issuer, audience: c.Audience, email: c.Email,
		client:   &limited,
		verifier: make(chan *oidc.IDTokenVerifier, 1),
	}
	a.verifier <- nil
	return a, "", nil
}

// secureURL reports whether nobody can stand between us and raw: by TLS, or
// because it is this machine.
func secureURL(raw string) bool {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return u.Scheme == "https" || u.Scheme == "http" && ip != nil && ip.IsLoopback()
}

func (a *oidcToken) check(ctx context.Context, header http.Header, _ string, _ []byte) error {
	token, ok := bearer(header.Get("Authorization"))
	switch {
	case !ok:
		return refuse("no bearer token in the Authorization header (is authentication enabled on the push subscription?)")
	case len(token) > maxTokenBytes:
		return refuse("a token of %d bytes, more than %d", len(token), maxTokenBytes)
	}
	verifier, err := a.discovered(ctx)
	if err != nil {
		return fmt.Errorf("OIDC issuer %s: %w", a.issuer, err)
	}
	// Signature, issuer, audience and expiry.
	verified, err := verifier.Verify(ctx, token)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("OIDC issuer %s: %w", a.issuer, ctx.Err())
		}
		return refuse("token: %.300v", err)
	}
	var claims struct {
		Email    string `json:"email"`
		Verified bool   `json:"email_verified"`
	}
	if err := verified.Claims(&claims); err != nil {
		return refuse("claims of the token: %.300v", err)
	}
	if claims.Email != a.email || !claims.Verified {
		return fmt.Errorf("%w: the token is of %.200q (e-mail verified: %t), not of %s", accel.ErrForbidden, claims.Email, claims.Verified, a.email)
	}
	return nil
}

// discovered is the verifier, made from the issuer's metadata the first time. An
// error is not kept: the next request asks again. The verifier fetches the
// issuer's keys whenever it meets one that it does not know.
func (a *oidcToken) discovered(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	var verifier *oidc.IDTokenVerifier
	select {
	case verifier = <-a.verifier:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { a.verifier <- verifier }()
	if verifier != nil {
		return verifier, nil
	}
	ctx = oidc.ClientContext(ctx, a.client)
	provider, err := oidc.NewProvider(ctx, a.issuer)
	if err != nil {
		return nil, err
	}
	verifier = provider.Verifier(&oidc.Config{ClientID: a.audience})
	return verifier, nil
}

// limitedTransport bounds how often the issuer is asked and how much is read of
// an answer.
type limitedTransport struct {
	base    http.RoundTripper
	limiter *rate.Limiter
}

func (t *limitedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := t.limiter.Wait(r.Context()); err != nil {
		return nil, fmt.Errorf("asked too often: %w", err)
	}
	response, err := t.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	response.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(response.Body, maxIssuerBodyBytes), response.Body}
	return response, nil
}
