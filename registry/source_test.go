package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"accel"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

func source(t *testing.T, c *registry.Client, repository, authorization string) *registry.Source {
	t.Helper()
	s, err := c.Source(repository, authorization)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSource reads an index through every call, on every kind of registry.
func TestSource(t *testing.T) {
	for kind, start := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			host := serve(t, start(t))
			c := newClient(t, host)
			img := newImage(t, 100_000, 2)
			idx := newIndex(t, img)
			d := digestOf(t, idx)
			if err := c.PushIndex(ctx, host+"/team/app", idx); err != nil {
				t.Fatal(err)
			}
			for _, tag := range []string{"a", "b", "c"} {
				if err := c.Tag(ctx, host+"/team/app", tag, d); err != nil {
					t.Fatal(err)
				}
			}
			s := source(t, c, host+"/team/app", "")
			if s.Repository() != host+"/team/app" || s.Host() != host || !s.Own() {
				t.Errorf("source %s at %s, own %v", s.Repository(), s.Host(), s.Own())
			}
			desc, err := s.Head(ctx, "a")
			if err != nil || desc.Digest.String() != d.String() {
				t.Errorf("Head: %+v, %v", desc, err)
			}
			for _, ref := range []string{"a", d.String()} {
				raw, desc, err := s.Manifest(ctx, ref)
				if err != nil || digest.FromBytes(raw) != d || desc.MediaType != types.OCIImageIndex {
					t.Errorf("Manifest %s: %+v, %v", ref, desc, err)
				}
			}
			layer := layersOf(t, img)[1]
			want := mustContent(t, layer)
			if size, err := s.BlobSize(ctx, digestOf(t, layer)); err != nil || size != int64(len(want)) {
				t.Errorf("BlobSize: %d, %v", size, err)
			}
			if _, err := s.BlobSize(ctx, digest.FromString("nothing")); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("BlobSize of nothing: %v", err)
			}
			for _, r := range [][2]int64{{0, 100_000}, {0, 1}, {99_999, 1}, {5000, 70_000}, {99_990, 500}, {0, 0}} {
				got, err := s.Range(ctx, digestOf(t, layer), 100_000, r[0], r[1])
				if err != nil {
					t.Errorf("range %v: %v", r, err)
					continue
				}
				// What is sent may begin before and go on after what was asked for.
				body, err := io.ReadAll(got)
				end := min(r[0]+r[1], 100_000)
				if err != nil || got.From > r[0] || got.From+int64(len(body)) < end || !bytes.Equal(body, want[got.From:got.From+int64(len(body))]) {
					t.Errorf("range %v: %d bytes from %d, %v", r, len(body), got.From, err)
				}
				got.Close()
			}
			if _, err := s.Range(ctx, digestOf(t, layer), 50, 0, 50); err == nil {
				t.Error("another size than the registry's is taken")
			}
			var all []string
			n := "2"
			if strings.HasPrefix(kind, "ggcr") {
				n = "100" // it cuts the list without a link to the rest
			}
			for query := (url.Values{"n": {n}}); query != nil; {
				page, next, err := s.Tags(ctx, query)
				if err != nil || n == "2" && len(page) > 2 {
					t.Fatalf("Tags: %v, %v", page, err)
				}
				all, query = append(all, page...), next
			}
			if !reflect.DeepEqual(all, []string{"a", "b", "c"}) {
				t.Errorf("tags %v", all)
			}
			if found, err := s.Referrers(ctx, d, ""); err != nil || len(found) > 0 {
				t.Errorf("Referrers: %v, %v", found, err)
			}
		})
	}
}

// TestSourceSendsTheClientsCredential as it is, nothing else, and nowhere else.
func TestSourceSendsTheClientsCredential(t *testing.T) {
	ctx := context.Background()
	front, host, img := fronted(t, &tokens{next: newGGCR()})
	blob := digestOf(t, layersOf(t, img)[0])
	var mu sync.Mutex
	var seen []string
	record := func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.Method+" "+r.URL.Path+" "+r.Header.Get("Authorization"))
		return false
	}
	front.set(record)
	c := newClient(t, host)

	_, err := source(t, c, host+"/app", "Bearer token-1").BlobSize(ctx, blob)
	if err != nil {
		t.Errorf("a good token: %v", err)
	}
	_, err = source(t, c, host+"/app", "Bearer nonsense").BlobSize(ctx, blob)
	challenge := registry.ChallengeOf(err)
	if !errors.Is(err, accel.ErrUnauthenticated) || len(challenge) != 1 || !strings.HasPrefix(challenge[0], `Bearer realm="http://`+host+`/token"`) || registry.StatusOf(err) != 401 || registry.Unreachable(err) {
		t.Errorf("a bad token: %v, challenge %q", err, challenge)
	}
	mu.Lock()
	want := []string{"HEAD /v2/app/blobs/" + blob.String() + " Bearer token-1", "HEAD /v2/app/blobs/" + blob.String() + " Bearer nonsense"}
	if !reflect.DeepEqual(seen, want) {
		t.Errorf("requests %q, want %q", seen, want)
	}
	mu.Unlock()

	if err := c.Ping(ctx, host, "Bearer token-1"); err != nil {
		t.Errorf("Ping: %v", err)
	}
	if err := c.Ping(ctx, host, "Bearer nonsense"); !errors.Is(err, accel.ErrUnauthenticated) || len(registry.ChallengeOf(err)) == 0 {
		t.Errorf("Ping with a bad token: %v", err)
	}
	if err := c.Ping(ctx, host, ""); err != nil {
		t.Errorf("Ping with our own credentials: %v", err)
	}
	if asked, err := c.Challenge(ctx, host); err != nil || !slices.Equal(asked, challenge) {
		t.Errorf("Challenge: %q, %v", asked, err)
	}

	var elsewhere string
	store := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		elsewhere = r.Header.Get("Authorization")
		mu.Unlock()
		w.Header().Set("Content-Length", "100")
		w.Write(make([]byte, 100))
	}))
	front.set(on(http.MethodGet, "/blobs/", 0, func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		http.Redirect(w, r, "http://"+store+r.URL.Path, http.StatusTemporaryRedirect)
		return true
	}))
	got, err := source(t, c, host+"/app", "Bearer token-1").Range(ctx, blob, 100, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if n, err := io.Copy(io.Discard, got); n != 100 || err != nil {
		t.Errorf("%d bytes by a redirect, %v", n, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if elsewhere != "" {
		t.Errorf("the blob store got %q", elsewhere)
	}
}

func TestHasCredentials(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		host registry.Host
		keys authn.Keychain
		want bool
	}{
		"none":     {host: registry.Host{Name: "r.example"}},
		"password": {host: registry.Host{Name: "r.example", Username: "u", Password: "p"}, want: true},
		"token":    {host: registry.Host{Name: "r.example", Token: "t"}, want: true},
		"keychain": {host: registry.Host{Name: "r.example"}, keys: identityTokens{}, want: true},
	} {
		client, err := registry.New(registry.Options{Hosts: []registry.Host{c.host}, Keychain: c.keys})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := client.HasCredentials(ctx, "r.example"); got != c.want || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if _, err := client.HasCredentials(ctx, "other.example"); !errors.Is(err, accel.ErrRegistryNotAllowed) {
			t.Errorf("%s: another host: %v", name, err)
		}
	}
}

type identityTokens struct{}

func (identityTokens) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig{IdentityToken: "refresh"}), nil
}

// TestRangeSurvives: bytes of a range come right through the faults of a registry.
func TestRangeSurvives(t *testing.T) {
	const offset, length = 1 << 20, 1 << 20
	noRange := func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		r.Header.Del("Range")
		return false
	}
	both := func(faults ...fault) fault {
		return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			return slices.ContainsFunc(faults, func(f fault) bool { return f(w, r, next) })
		}
	}
	wrong := func(header string) fault {
		return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			w.Header().Set("Content-Range", header)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(make([]byte, length))
			return true
		}
	}
	get := func(n int, x fault) fault { return on(http.MethodGet, "/blobs/", n, x) }
	for name, c := range map[string]struct {
		fault    fault
		unranged bool
	}{
		"nothing":                {fault: get(1, status(200)), unranged: true},
		"500 once":               {fault: get(1, status(500))},
		"429 once":               {fault: get(1, status(429, "Retry-After", "0"))},
		"401 once":               {fault: get(1, status(401))},
		"reset in the middle":    {fault: get(2, cut(300_000))},
		"hang in the middle":     {fault: get(1, hang(300_000))},
		"short Content-Length":   {fault: get(1, truncate(300_000)), unranged: true},
		"no ranges":              {fault: get(0, noRange), unranged: true},
		"no ranges, and a reset": {fault: both(get(0, noRange), get(1, cut(300_000))), unranged: true},
		"ranges refused": {fault: get(0, func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if r.Header.Get("Range") == "" {
				return false
			}
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return true
		}), unranged: true},
		"another range":              {fault: get(0, wrong(fmt.Sprintf("bytes 0-%d/%d", length-1, layerBytes))), unranged: true},
		"ranges without their place": {fault: get(0, wrong("")), unranged: true},
	} {
		if name == "nothing" {
			c.fault, c.unranged = nil, false
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			front, host, img := fronted(t, newDistribution(t, nil))
			layer := layersOf(t, img)[0]
			want := mustContent(t, layer)
			s := source(t, newClient(t, host, stallFor(name)), host+"/app", "")
			front.set(c.fault)
			r, err := s.Range(context.Background(), digestOf(t, layer), layerBytes, offset, length)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			from, end := int64(offset), int64(offset+length)
			if c.unranged {
				from, end = 0, layerBytes
			}
			if err != nil || r.From != from || r.Unranged != c.unranged || !bytes.Equal(got, want[from:end]) {
				t.Errorf("%d bytes from %d (unranged %v), %v; want %d to %d", len(got), r.From, r.Unranged, err, from, end)
			}
		})
	}
}

// TestRangeFails with a clear error, in time.
func TestRangeFails(t *testing.T) {
	for name, c := range map[string]struct {
		fault       fault
		want        error
		unreachable bool
		after       bool
	}{
		"gone":                {fault: status(404), want: accel.ErrNotFound},
		"401 for good":        {fault: status(401), want: accel.ErrUnauthenticated},
		"403 for good":        {fault: status(403), want: accel.ErrForbidden},
		"500 for good":        {fault: status(500), unreachable: true},
		"429 for a long time": {fault: status(429, "Retry-After", "600"), unreachable: true, after: true},
		"hang before headers": {fault: hang(0), unreachable: true},
		"resets for good":     {fault: cut(0), unreachable: true},
		"a range of a larger blob": {fault: func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			w.Header().Set("Content-Range", "bytes 10-19/99999999")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(make([]byte, 10))
			return true
		}, unreachable: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			front, host, img := fronted(t, newGGCR())
			s := source(t, newClient(t, host, stallFor(name)), host+"/app", "")
			front.set(on(http.MethodGet, "/blobs/", 0, c.fault))
			r, err := s.Range(context.Background(), digestOf(t, layersOf(t, img)[0]), layerBytes, 10, 10)
			if err == nil {
				_, err = io.ReadAll(r)
				r.Close()
			}
			if err == nil || c.want != nil && !errors.Is(err, c.want) || registry.Unreachable(err) != c.unreachable || (accel.RetryAfter(err) > 0) != c.after {
				t.Errorf("got %v (unreachable %v), want %v", err, registry.Unreachable(err), c.want)
			}
		})
	}
}

// TestBlobSizeWithoutLength: the answer to a HEAD need not tell it.
func TestBlobSizeWithoutLength(t *testing.T) {
	front, host, img := fronted(t, newDistribution(t, nil))
	front.set(on(http.MethodHead, "/blobs/", 0, func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		w.(http.Flusher).Flush()
		return true
	}))
	size, err := source(t, newClient(t, host), host+"/app", "").BlobSize(context.Background(), digestOf(t, layersOf(t, img)[0]))
	if err != nil || size != layerBytes {
		t.Errorf("%d, %v", size, err)
	}
}
