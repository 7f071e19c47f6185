package testbed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/auth/token"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Account is somebody that a registry's token service knows.
type Account struct {
	Name, Password string
	// Pull are the repositories that may be read, as path.Match patterns; Push
	// those that may be written, too.
	Pull, Push []string
}

const (
	tokenIssuer = "testbed token service"
	audience    = "testbed registry"
	tokenLife   = 5 * time.Minute
)

// tokenService hands out the signed tokens of the distribution project's
// specification, by GET with basic authentication and by POST as OAuth 2 does.
type tokenService struct {
	realm    string
	accounts []Account
	public   jose.JSONWebKey
	signer   jose.Signer

	mu    sync.Mutex
	given int
}

func newTokenService(address string, accounts []Account) (*tokenService, error) {
	// Clients refuse a realm by address that is not the registry's own; also a
	// mirror's is another.
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	const id = "testbed"
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, nil)
	return &tokenService{
		realm:    "http://localhost:" + port + "/token",
		accounts: accounts,
		public:   jose.JSONWebKey{Key: key.Public(), KeyID: id, Algorithm: string(jose.ES256), Use: "sig"},
		signer:   signer,
	}, err
}

// configuration has the registry trust this service.
func (s *tokenService) configuration(dir string) (configuration.Auth, error) {
	raw, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{s.public}})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "jwks.json")
	return configuration.Auth{"token": {"realm": s.realm, "service": audience, "issuer": tokenIssuer, "jwks": file}}, os.WriteFile(file, raw, 0o600)
}

// ServeHTTP implements http.Handler.
func (s *tokenService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	name, password, given := r.BasicAuth()
	if r.Method == http.MethodPost {
		if grant := r.PostForm.Get("grant_type"); grant != "password" {
			http.Error(w, "no such grant type here: "+grant, http.StatusBadRequest)
			return
		}
		name, password, given = r.PostForm.Get("username"), r.PostForm.Get("password"), true
	}
	i := slices.IndexFunc(s.accounts, func(a Account) bool { return a.Name == name && a.Password == password })
	if given && i < 0 {
		http.Error(w, "wrong name or password", http.StatusUnauthorized)
		return
	}
	var account Account // nobody in particular, who may do nothing
	if given {
		account = s.accounts[i]
	}
	signed, err := s.sign(account, strings.Fields(strings.Join(r.Form["scope"], " ")))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	answer := map[string]any{"token": signed, "access_token": signed, "expires_in": int(tokenLife.Seconds()), "issued_at": time.Now().UTC()}
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		return // the client went away
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.given++
}

// sign makes a token with what account may do of what scopes ask for.
func (s *tokenService) sign(account Account, scopes []string) (string, error) {
	access := []*token.ResourceActions{}
	for _, scope := range scopes {
		kind, rest, _ := strings.Cut(scope, ":")
		at := strings.LastIndexByte(rest, ':')
		if kind != "repository" || at < 0 {
			continue
		}
		actions := account.allowed(rest[:at], strings.Split(rest[at+1:], ","))
		if len(actions) > 0 {
			access = append(access, &token.ResourceActions{Type: kind, Name: rest[:at], Actions: actions})
		}
	}
	now := time.Now()
	return jwt.Signed(s.signer).Claims(token.ClaimSet{
		Issuer: tokenIssuer, Subject: account.Name, Audience: token.AudienceList{audience},
		IssuedAt: now.Unix(), NotBefore: now.Unix(), Expiration: now.Add(tokenLife).Unix(), Access: access,
	}).Serialize()
}

func (a Account) allowed(repository string, wanted []string) []string {
	matches := func(pattern string) bool {
		ok, err := path.Match(pattern, repository)
		return err == nil && ok
	}
	var actions []string
	for _, w := range wanted {
		switch {
		case w == "pull" && (slices.ContainsFunc(a.Pull, matches) || slices.ContainsFunc(a.Push, matches)),
			w == "push" && slices.ContainsFunc(a.Push, matches):
			actions = append(actions, w)
		}
	}
	return actions
}

// Tokens is how many tokens were handed out.
func (r *Registry) Tokens() int {
	if r.tokens == nil {
		return 0
	}
	r.tokens.mu.Lock()
	defer r.tokens.mu.Unlock()
	return r.tokens.given
}
