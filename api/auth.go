package api

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"

	"accel"

	"github.com/danielgtaylor/huma/v2"
)

// Scope says what a token permits.
type Scope string

const (
	// ScopeRead: ask, list, wait.
	ScopeRead Scope = "read"
	// ScopeWrite: submit, retry and delete too. Not: speak for a node.
	ScopeWrite Scope = "write"
	// ScopeNode: speak for the nodes of Token.Nodes (heartbeats, pulls, starts), ask what is said of them, and for the
	// signed mappings and the profiles of manifests whose digest is known; nothing else.
	ScopeNode Scope = "node"
)

// Token is a bearer token that is accepted. Only its hash is kept.
type Token struct {
	Name  string // for the log and error messages
	Scope Scope
	// Nodes are patterns (path.Match) of the names of nodes that the token speaks for; at least one
	// with ScopeNode, none with others.
	Nodes  []string
	SHA256 string // of the token, in hex
}

// HashToken is the SHA256 of a Token for its text.
func HashToken(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// Validate says what is wrong with t.
func (t Token) Validate() error {
	switch t.Scope {
	case ScopeRead, ScopeWrite:
		if len(t.Nodes) > 0 {
			return fmt.Errorf("%w: token %q: nodes go with scope node, not %s", accel.ErrInvalid, t.Name, t.Scope)
		}
	case ScopeNode:
		if len(t.Nodes) == 0 {
			return fmt.Errorf("%w: token %q: scope node needs nodes: the names that it speaks for, such as [worker-1] or [worker-*]", accel.ErrInvalid, t.Name)
		}
	default:
		return fmt.Errorf("%w: token %q: scope %q: want read, write or node", accel.ErrInvalid, t.Name, t.Scope)
	}
	for _, pattern := range t.Nodes {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return fmt.Errorf("%w: token %q: nodes: %q is no pattern of names; want such as worker-1 or worker-*", accel.ErrInvalid, t.Name, pattern)
		}
	}
	if raw, err := hex.DecodeString(t.SHA256); err != nil || len(raw) != sha256.Size {
		return fmt.Errorf("%w: token %q: sha256 must be the 64 hex digits of the token's hash", accel.ErrInvalid, t.Name)
	}
	return nil
}

// covers reports whether the token speaks for a node.
func (t Token) covers(node string) bool {
	return slices.ContainsFunc(t.Nodes, func(pattern string) bool {
		ok, err := path.Match(pattern, node)
		return ok && err == nil
	})
}

// secured marks an operation as one that asks for a token of one of the scopes; ScopeWrite does
// where ScopeRead does.
func secured(scopes ...Scope) []map[string][]string {
	all := make([]map[string][]string, 0, len(scopes))
	for _, s := range scopes {
		all = append(all, map[string][]string{"bearer": {string(s)}})
	}
	return all
}

// authorize refuses requests to secured operations that lack a good token.
func (s *server) authorize(routes huma.API) func(huma.Context, func(huma.Context)) {
	return func(ctx huma.Context, next func(huma.Context)) {
		if s.Open || len(ctx.Operation().Security) == 0 {
			next(ctx)
			return
		}
		if err := s.permit(ctx.Header("Authorization"), ctx.Operation().Security); err != nil {
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

func (s *server) permit(authorization string, security []map[string][]string) error {
	t, err := s.token(authorization)
	if err != nil {
		return err
	}
	wanted := make([]string, 0, len(security))
	for _, one := range security {
		scope := Scope(one["bearer"][0])
		if t.Scope == scope || t.Scope == ScopeWrite && scope == ScopeRead {
			return nil
		}
		wanted = append(wanted, string(scope))
	}
	what := strings.Join(wanted, " or ")
	if what == string(ScopeNode) {
		what += ", the scope of tokens that speak for nodes"
	}
	return fmt.Errorf("%w: token %q has scope %s, this asks for %s", accel.ErrForbidden, t.Name, t.Scope, what)
}

// token compares every token in constant time, so that an answer's time tells
// nothing.
func (s *server) token(authorization string) (*Token, error) {
	scheme, text, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") || text == "" {
		return nil, fmt.Errorf("%w: send Authorization: Bearer TOKEN", accel.ErrUnauthenticated)
	}
	given := []byte(HashToken(strings.TrimSpace(text)))
	var found *Token
	for i := range s.Tokens {
		if subtle.ConstantTimeCompare(given, []byte(strings.ToLower(s.Tokens[i].SHA256))) == 1 {
			found = &s.Tokens[i]
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%w: the token is not known", accel.ErrUnauthenticated)
	}
	return found, nil
}

// speaks refuses a token of ScopeNode that is not the node's; what other scopes may do is
// settled by then.
func (s *server) speaks(authorization, node string) error {
	if s.Open {
		return nil
	}
	t, err := s.token(authorization)
	switch {
	case err != nil:
		return err
	case t.Scope != ScopeNode:
		return nil
	case node == "":
		return fmt.Errorf("%w: say which node this is of", accel.ErrInvalid)
	case !t.covers(node):
		return fmt.Errorf("%w: token %q does not speak for node %.253q, only for %s", accel.ErrForbidden, t.Name, node, strings.Join(t.Nodes, ", "))
	default:
		return nil
	}
}
