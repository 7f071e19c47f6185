package webhook

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"accel"
)

// authenticator says whether a request holds the credential of one source. It
// answers nil, a refusal, or an error of its own that is neither of them (the
// OIDC issuer does not answer).
type authenticator interface {
	check(ctx context.Context, header http.Header, pathSecret string, body []byte) error
}

// newAuthenticator makes the one that c's kind is authenticated by. With an
// error comes the key of the configuration that is at fault.
func newAuthenticator(c Config, o options) (_ authenticator, key string, _ error) {
	if c.Kind == GAR {
		if c.Secret != "" || len(c.PreviousSecrets) > 0 {
			return nil, "secret", fmt.Errorf("kind %s is authenticated by Google's token; set oidc.audience and oidc.email instead", c.Kind)
		}
		return newOIDC(c.OIDC, o.client)
	}
	if c.OIDC != (OIDC{}) {
		return nil, "oidc", fmt.Errorf("kind %s is authenticated by its secret; only %s takes oidc", c.Kind, GAR)
	}
	if c.Secret == "" {
		return nil, "secret", fmt.Errorf("missing; kind %s is authenticated by it (%s)", c.Kind, whereSecret(c.Kind))
	}
	accepted := []string{c.Secret}
	for i, s := range c.PreviousSecrets {
		if s == "" {
			return nil, fmt.Sprintf("previous_secrets[%d]", i), errors.New("empty")
		}
		accepted = append(accepted, s)
	}
	switch c.Kind {
	case DockerHub, Quay, Aliyun:
		for _, s := range accepted {
			if strings.ContainsAny(s, "/?#%") {
				return nil, "secret", fmt.Errorf("kind %s sends it as the last segment of the path; want one without '/', '?', '#' and '%%'", c.Kind)
			}
		}
		return pathSecret{newSecrets(accepted)}, "", nil
	case GitHub:
		return signature{header: "X-Hub-Signature-256", secrets: newSecrets(accepted)}, "", nil
	case Generic:
		secrets := newSecrets(accepted)
		return signature{header: "X-Signature", secrets: secrets, otherwise: authorization{secrets}}, "", nil
	case Artifactory:
		return eventAuth{newSecrets(accepted)}, "", nil
	default: // Distribution, Harbor, Azure, ECR, Zot
		return authorization{newSecrets(accepted)}, "", nil
	}
}

func whereSecret(k Kind) string {
	switch k {
	case DockerHub, Quay, Aliyun:
		return "last segment of the path"
	case GitHub:
		return "HMAC in X-Hub-Signature-256"
	case Generic:
		return "Authorization: Bearer, or HMAC in X-Signature"
	case Artifactory:
		return "X-JFrog-Event-Auth, itself or as HMAC"
	default:
		return "Authorization header"
	}
}

// Authenticate checks that a request comes from s's sender: by its headers, by
// pathSecret (what followed the source in the path; the kinds that can send
// nothing else use it), and for signatures by the exact body. Secrets are
// compared in constant time.
//
// Errors: accel.ErrUnauthenticated where the credential is absent or does not
// hold; accel.ErrForbidden where a token is genuine but another account's; for
// gar any other error means that the issuer could not be asked, and the sender
// should try again.
func (s *Source) Authenticate(ctx context.Context, header http.Header, pathSecret string, body []byte) error {
	if err := s.auth.check(ctx, header, pathSecret, body); err != nil {
		return fmt.Errorf("webhook %s: %w", s.name, err)
	}
	return nil
}

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %s", accel.ErrUnauthenticated, fmt.Sprintf(format, args...))
}

// secrets are the accepted ones: the current and those before it.
type secrets []secret

// secret keeps the bytes for HMAC, and a digest for comparison, which makes all
// comparisons equally long.
type secret struct {
	raw []byte
	sum [sha256.Size]byte
}

func newSecrets(accepted []string) secrets {
	s := make(secrets, 0, len(accepted))
	for _, a := range accepted {
		s = append(s, secret{raw: []byte(a), sum: sha256.Sum256([]byte(a))})
	}
	return s
}

// hold reports whether presented is one of s. It looks at all of them, so that
// the time tells nothing.
func (s secrets) hold(presented string) bool {
	sum, found := sha256.Sum256([]byte(presented)), 0
	for i := range s {
		found |= subtle.ConstantTimeCompare(sum[:], s[i].sum[:])
	}
	return found == 1
}

// signed reports whether hexMAC is body's HMAC-SHA256 under one of s.
func (s secrets) signed(hexMAC string, body []byte) bool {
	presented, err := hex.DecodeString(hexMAC)
	if err != nil || len(presented) != sha256.Size {
		return false
	}
	found := 0
	for i := range s {
		mac := hmac.New(sha256.New, s[i].raw)
		mac.Write(body)
		found |= subtle.ConstantTimeCompare(presented, mac.Sum(nil))
	}
	return found == 1
}

// pathSecret is for registries whose notifications carry no credential: the
// address that they are sent to is one.
type pathSecret struct{ secrets }

func (a pathSecret) check(_ context.Context, _ http.Header, presented string, _ []byte) error {
	switch {
	case presented == "":
		return refuse("no secret in the path (want .../SOURCE/SECRET)")
	case !a.hold(presented):
		return refuse("wrong secret in the path")
	}
	return nil
}

// authorization is for registries that send a header as configured there: the
// secret is its exact value, or a Bearer token, or a Basic password under any
// user name.
type authorization struct{ secrets }

func (a authorization) check(_ context.Context, header http.Header, _ string, _ []byte) error {
	value := header.Get("Authorization")
	if value == "" {
		return refuse("no Authorization header")
	}
	held := a.hold(value)
	if token, ok := bearer(value); ok {
		held = a.hold(token) || held
	}
	request := http.Request{Header: http.Header{"Authorization": {value}}}
	if _, password, ok := request.BasicAuth(); ok {
		held = a.hold(password) || held
	}
	if !held {
		return refuse("wrong credential in the Authorization header")
	}
	return nil
}

// bearer is the token of an Authorization header of that scheme.
func bearer(value string) (string, bool) {
	scheme, token, ok := strings.Cut(value, " ")
	token = strings.TrimSpace(token)
	return token, ok && token != "" && strings.EqualFold(scheme, "Bearer")
}

// signature is for senders that sign the body, "sha256=HEX" or HEX. Where the
// header is absent, otherwise decides, if it is set.
type signature struct {
	header string
	secrets
	otherwise authenticator
}

func (a signature) check(ctx context.Context, header http.Header, pathSecret string, body []byte) error {
	value := header.Get(a.header)
	if value == "" {
		if a.otherwise != nil {
			return a.otherwise.check(ctx, header, pathSecret, body)
		}
		return refuse("no %s header", a.header)
	}
	if !a.signed(strings.TrimPrefix(value, "sha256="), body) {
		return refuse("the signature in %s does not fit the body", a.header)
	}
	return nil
}

// eventAuth is Artifactory's: the secret itself, or, with "use secret for
// payload signing", the body's HMAC in hex.
type eventAuth struct{ secrets }

func (a eventAuth) check(_ context.Context, header http.Header, _ string, body []byte) error {
	const name = "X-JFrog-Event-Auth"
	value := header.Get(name)
	if value == "" {
		return refuse("no %s header", name)
	}
	held := a.hold(value)
	if !a.signed(value, body) && !held {
		return refuse("%s is neither the secret nor the body's signature", name)
	}
	return nil
}
