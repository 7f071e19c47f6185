package api

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"

	"accel"

	"github.com/danielgtaylor/huma/v2"
)

// Scope says what a token permits.
type Scope string

const (
	// ScopeRead: ask, list, wait.
	ScopeRead Scope = "read"
	// ScopeWrite: submit, retry and delete too.
	ScopeWrite Scope = "write"
)

// Token is a bearer token that is accepted. Only its hash is kept.
type Token struct {
	Name   string // for the log and error messages
	Scope  Scope
	SHA256 string // of the token, in hex
}

// HashToken is the SHA256 of a Token for its text.
func HashToken(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// Validate says what is wrong with t.
func (t Token) Validate() error {
	if t.Scope != ScopeRead && t.Scope != ScopeWrite {
		return fmt.Errorf("%w: token %q: scope %q: want read or write", accel.ErrInvalid, t.Name, t.Scope)
	}
	if raw, err := hex.DecodeString(t.SHA256); err != nil || len(raw) != sha256.Size {
		return fmt.Errorf("%w: token %q: sha256 must be the 64 hex digits of the token's hash", accel.ErrInvalid, t.Name)
	}
	return nil
}

// secured marks an operation as one that asks for a token of the scope.
func secured(scope Scope) []map[string][]string {
	return []map[string][]string{{"bearer": {string(scope)}}}
}

// authorize refuses requests to secured operations that lack a good token.
func (s *server) authorize(routes huma.API) func(huma.Context, func(huma.Context)) {
	return func(ctx huma.Context, next func(huma.Context)) {
		if s.Open || len(ctx.Operation().Security) == 0 {
			next(ctx)
			return
		}
		wanted := Scope(ctx.Operation().Security[0]["bearer"][0])
		if err := s.permit(ctx.Header("Authorization"), wanted); err != nil {
			p := s.problem(err)
			if p.GetStatus() == http.StatusUnauthorized {
				ctx.SetHeader("WWW-Authenticate", `Bearer realm="accel"`)
			}
			ctx.SetHeader("Content-Type", "application/problem+json")
			ctx.SetStatus(p.GetStatus())
			if err := routes.Marshal(ctx.BodyWriter(), "application/json", p); err != nil {
				s.Log.Debug("cannot answer", "error", err)
			}
			return
		}
		next(ctx)
	}
}

// permit compares every token in constant time, so that an answer's time tells
// nothing.
func (s *server) permit(authorization string, wanted Scope) error {
	scheme, text, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") || text == "" {
		return fmt.Errorf("%w: send Authorization: Bearer TOKEN", accel.ErrUnauthenticated)
	}
	given := []byte(HashToken(strings.TrimSpace(text)))
	var found *Token
	for i := range s.Tokens {
		if subtle.ConstantTimeCompare(given, []byte(strings.ToLower(s.Tokens[i].SHA256))) == 1 {
			found = &s.Tokens[i]
		}
	}
	switch {
	case found == nil:
		return fmt.Errorf("%w: the token is not known", accel.ErrUnauthenticated)
	case wanted == ScopeWrite && found.Scope != ScopeWrite:
		return fmt.Errorf("%w: token %q has scope read, this asks for write", accel.ErrForbidden, found.Name)
	default:
		return nil
	}
}
