package webhook_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/webhook"

	"github.com/coreos/go-oidc/v3/oidc/oidctest"
)

// issuer is an OpenID Connect provider whose keys can be replaced.
type issuer struct {
	*httptest.Server
	mu       sync.Mutex
	provider oidctest.Server
	key      *rsa.PrivateKey
	keyID    string
	down     bool
	requests int
}

func newIssuer(t *testing.T) *issuer {
	i := &issuer{}
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.requests++
		if i.down {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
		i.provider.ServeHTTP(w, r)
	}))
	t.Cleanup(i.Close)
	i.provider.SetIssuer(i.URL)
	i.rotate(t, "first")
	return i
}

// rotate replaces the signing key; the old one is no longer published.
func (i *issuer) rotate(t *testing.T, id string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.key, i.keyID = key, id
	i.provider.PublicKeys = []oidctest.PublicKey{{PublicKey: key.Public(), KeyID: id, Algorithm: "RS256"}}
}

func (i *issuer) setDown(down bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.down = down
}

const garEmail = "push@my-project.iam.gserviceaccount.com"

// claims of a good token, changed by changes ("name", value, ...); a nil value
// removes the claim.
func (i *issuer) claims(changes ...any) string {
	claims := map[string]any{
		"iss": i.URL, "aud": "accel", "sub": "1", "azp": "1", "email": garEmail, "email_verified": true,
		"iat": time.Now().Add(-time.Minute).Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	}
	for n := 0; n < len(changes); n += 2 {
		claims[changes[n].(string)] = changes[n+1]
		if changes[n+1] == nil {
			delete(claims, changes[n].(string))
		}
	}
	return marshal(claims)
}

func (i *issuer) token(changes ...any) string {
	return oidctest.SignIDToken(i.key, i.keyID, "RS256", i.claims(changes...))
}

func (i *issuer) source(t *testing.T) *webhook.Source {
	c := configOf(webhook.GAR)
	c.OIDC = webhook.OIDC{Issuer: i.URL, Audience: "accel", Email: garEmail}
	return newSource(t, c, webhook.WithHTTPClient(i.Client()))
}

func authenticate(t *testing.T, s *webhook.Source, token string) error {
	t.Helper()
	return s.Authenticate(t.Context(), headers("Authorization", "Bearer "+token), "", nil)
}

func TestOIDC(t *testing.T) {
	i := newIssuer(t)
	s := i.source(t)
	for _, f := range fixtures {
		if f.kind != webhook.GAR {
			continue
		}
		if err := s.Authenticate(t.Context(), headers("Authorization", "Bearer "+i.token()), "", f.body(t)); err != nil {
			t.Errorf("%s: good token: %v", f.file, err)
		}
		if err := s.Authenticate(t.Context(), http.Header{}, "", f.body(t)); !errors.Is(err, accel.ErrUnauthenticated) {
			t.Errorf("%s: no token: %v, want ErrUnauthenticated", f.file, err)
		}
		if err := s.Authenticate(t.Context(), headers("Authorization", "Bearer x.y.z"), "", f.body(t)); !errors.Is(err, accel.ErrUnauthenticated) {
			t.Errorf("%s: wrong token: %v, want ErrUnauthenticated", f.file, err)
		}
	}

	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := i.token()
	parts := strings.Split(good, ".")
	other := strings.Split(i.token("email", "evil@example.com"), ".")
	for name, test := range map[string]struct {
		token string
		want  error
	}{
		"other key, known id":   {oidctest.SignIDToken(stranger, i.keyID, "RS256", i.claims()), accel.ErrUnauthenticated},
		"other key, new id":     {oidctest.SignIDToken(stranger, "stranger", "RS256", i.claims()), accel.ErrUnauthenticated},
		"other algorithm":       {oidctest.SignIDToken(curve, i.keyID, "ES256", i.claims()), accel.ErrUnauthenticated},
		"no algorithm":          {"eyJhbGciOiJub25lIn0." + parts[1] + ".", accel.ErrUnauthenticated},
		"payload exchanged":     {parts[0] + "." + other[1] + "." + parts[2], accel.ErrUnauthenticated},
		"no signature":          {parts[0] + "." + parts[1] + ".", accel.ErrUnauthenticated},
		"no JWT":                {"x", accel.ErrUnauthenticated},
		"empty":                 {"", accel.ErrUnauthenticated},
		"huge":                  {strings.Repeat("x", 1<<20), accel.ErrUnauthenticated},
		"other audience":        {i.token("aud", "another"), accel.ErrUnauthenticated},
		"no audience":           {i.token("aud", nil), accel.ErrUnauthenticated},
		"other issuer":          {i.token("iss", "https://accounts.example"), accel.ErrUnauthenticated},
		"expired":               {i.token("exp", time.Now().Add(-time.Minute).Unix()), accel.ErrUnauthenticated},
		"no expiry":             {i.token("exp", nil), accel.ErrUnauthenticated},
		"other e-mail":          {i.token("email", "evil@example.com"), accel.ErrForbidden},
		"no e-mail":             {i.token("email", nil), accel.ErrForbidden},
		"e-mail not verified":   {i.token("email_verified", false), accel.ErrForbidden},
		"e-mail not said to be": {i.token("email_verified", nil), accel.ErrForbidden},
		"one of the audiences":  {i.token("aud", []string{"x", "accel"}), nil},
	} {
		if err := authenticate(t, s, test.token); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v, want %v", name, err, test.want)
		}
	}
}

// A new key is fetched when a token names it; the old one stops working.
func TestOIDCKeyRotation(t *testing.T) {
	i := newIssuer(t)
	s := i.source(t)
	old := i.token()
	if err := authenticate(t, s, old); err != nil {
		t.Fatal(err)
	}
	i.mu.Lock()
	before := i.requests
	i.mu.Unlock()
	for range 20 {
		if err := authenticate(t, s, i.token()); err != nil {
			t.Fatal(err)
		}
	}
	i.mu.Lock()
	after := i.requests
	i.mu.Unlock()
	if before != after {
		t.Errorf("known keys were fetched again: %d requests, then %d", before, after)
	}
	i.rotate(t, "second")
	if err := authenticate(t, s, i.token()); err != nil {
		t.Errorf("the new key: %v", err)
	}
	// The library hands fetched keys to whoever waits before it keeps them, so the old ones may serve for an instant more.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		err := authenticate(t, s, old)
		if errors.Is(err, accel.ErrUnauthenticated) {
			return
		}
		if err != nil || time.Now().After(end) {
			t.Fatalf("a withdrawn key: %v, want ErrUnauthenticated", err)
		}
	}
}

// An issuer that is down is no refusal and is not remembered.
func TestOIDCIssuerDown(t *testing.T) {
	i := newIssuer(t)
	s := i.source(t)
	i.setDown(true)
	err := authenticate(t, s, i.token())
	if err == nil || errors.Is(err, accel.ErrUnauthenticated) || errors.Is(err, accel.ErrForbidden) {
		t.Errorf("issuer down: %v, want an error that is no refusal", err)
	}
	i.setDown(false)
	if err := authenticate(t, s, i.token()); err != nil {
		t.Errorf("issuer back: %v", err)
	}
}

func TestOIDCCancelled(t *testing.T) {
	i := newIssuer(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := i.source(t).Authenticate(ctx, headers("Authorization", "Bearer "+i.token()), "", nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

// Concurrent first pushes share one discovery; a stream of forged tokens does
// not become a stream of requests to the issuer.
func TestOIDCConcurrent(t *testing.T) {
	i := newIssuer(t)
	s := i.source(t)
	token := i.token()
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if err := authenticate(t, s, token); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.requests > 8 {
		t.Errorf("%d requests to the issuer", i.requests)
	}
}

// Each forged token names a key that is not known, for which the key set has to
// be fetched again.
func TestOIDCForgedTokensAreLimited(t *testing.T) {
	start := time.Now()
	i := newIssuer(t)
	s := i.source(t)
	if err := authenticate(t, s, i.token()); err != nil {
		t.Fatal(err)
	}
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	forge := func(id string) string { return oidctest.SignIDToken(stranger, id, "RS256", i.claims()) }
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	tried := make(chan struct{}, 1024)
	for n := range 16 {
		wg.Go(func() {
			for k := 0; ctx.Err() == nil && k < 64; k++ {
				header := headers("Authorization", "Bearer "+forge(fmt.Sprintf("forged-%d-%d", n, k)))
				if s.Authenticate(ctx, header, "", nil) == nil {
					t.Error("a forged token was accepted")
				}
				tried <- struct{}{}
			}
		})
	}
	for range 64 {
		<-tried
	}
	// Genuine tokens of known keys pass meanwhile.
	if err := authenticate(t, s, i.token()); err != nil {
		t.Errorf("a genuine token among forged ones: %v", err)
	}
	cancel()
	wg.Wait()
	// The last one joins or follows the request that is still under way.
	if err := authenticate(t, s, forge("last")); !errors.Is(err, accel.ErrUnauthenticated) {
		t.Errorf("forged: %v, want ErrUnauthenticated", err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if most := 8 + int(time.Since(start)/time.Second) + 1; i.requests > most {
		t.Errorf("%d requests to the issuer, want at most %d", i.requests, most)
	}
}
