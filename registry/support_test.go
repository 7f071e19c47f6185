package registry_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"accel/registry"

	"github.com/distribution/distribution/v3/configuration"
	_ "github.com/distribution/distribution/v3/registry/auth/htpasswd"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	logrus.SetOutput(io.Discard) // distribution's
	// distribution's App.Shutdown leaves its event broadcaster running.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

// The kinds of registry that the tests run against, in process.
var kinds = map[string]func(t *testing.T) http.Handler{
	"ggcr":                func(*testing.T) http.Handler { return newGGCR() },
	"ggcr with referrers": func(*testing.T) http.Handler { return newGGCR(ggcr.WithReferrersSupport(true)) },
	"distribution":        func(t *testing.T) http.Handler { return newDistribution(t, nil) },
	"distribution with htpasswd": func(t *testing.T) http.Handler {
		file := filepath.Join(t.TempDir(), "htpasswd")
		if err := os.WriteFile(file, []byte(user+":"+passwordHash+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return newDistribution(t, configuration.Auth{"htpasswd": {"realm": "test", "path": file}})
	},
	"distribution with tokens": func(t *testing.T) http.Handler { return &tokens{next: newDistribution(t, nil)} },
}

const (
	user, password = "alice", "secret"
	passwordHash   = "$2a$04$kKbQDCf5liMZR2FtEBkqQe2il0aWUfkx4aySMBb2Rm1ActxXbObIq" // bcrypt
)

func newGGCR(opts ...ggcr.Option) http.Handler {
	return ggcr.New(append(opts, ggcr.Logger(log.New(io.Discard, "", 0)))...)
}

func newDistribution(t *testing.T, auth configuration.Auth) http.Handler {
	config := &configuration.Configuration{Auth: auth}
	config.Log.AccessLog.Disabled = true
	config.HTTP.Secret = "for tests"
	config.Catalog.MaxEntries = 200 // 0 would list nothing
	config.Storage = configuration.Storage{
		"filesystem":  {"rootdirectory": t.TempDir()},
		"delete":      {"enabled": true},
		"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
	}
	app := handlers.NewApp(t.Context(), config)
	t.Cleanup(func() { app.Shutdown() })
	return app
}

// serve runs h on loopback and returns its host.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	return strings.TrimPrefix(srv.URL, "http://")
}

// newClient makes a client for one plain-HTTP host with the test credentials.
func newClient(t *testing.T, host string, change ...func(*registry.Options)) *registry.Client {
	t.Helper()
	o := registry.Options{
		Hosts:   []registry.Host{{Name: host, PlainHTTP: true, Username: user, Password: password}},
		Backoff: time.Millisecond,
	}
	for _, f := range change {
		f(&o)
	}
	c, err := registry.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// fault answers a request instead of the registry, or changes what it answers;
// it reports whether it has.
type fault func(w http.ResponseWriter, r *http.Request, next http.Handler) bool

// faulty is a registry behind something that breaks.
type faulty struct {
	next http.Handler

	mu    sync.Mutex
	fault fault
	seen  []string // "METHOD path Range", of requests since the fault was set
}

func (f *faulty) set(x fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault, f.seen = x, nil
}

func (f *faulty) requests(part string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []string
	for _, s := range f.seen {
		if strings.Contains(s, part) {
			found = append(found, s)
		}
	}
	return found
}

func (f *faulty) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.seen = append(f.seen, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
	x := f.fault
	f.mu.Unlock()
	if x == nil || !x(w, r, f.next) {
		f.next.ServeHTTP(w, r)
	}
}

// on limits a fault to requests of a method whose path has part, and to the
// first n of them (all, where n is 0).
func on(method, part string, n int, x fault) fault {
	var mu sync.Mutex
	var done int
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method != method || !strings.Contains(r.URL.Path, part) {
			return false
		}
		mu.Lock()
		if n > 0 && done == n {
			mu.Unlock()
			return false
		}
		done++
		mu.Unlock()
		return x(w, r, next)
	}
}

func status(code int, headers ...string) fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		io.Copy(io.Discard, r.Body)
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		return true
	}
}

// answered has the registry answer into memory, for a fault to send a changed form.
func answered(r *http.Request, next http.Handler) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, r)
	return rec
}

func send(w http.ResponseWriter, rec *httptest.ResponseRecorder, body []byte) {
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	w.WriteHeader(rec.Code)
	w.Write(body)
}

// cut breaks the connection after n bytes of the answer.
func cut(n int) fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		rec := answered(r, next)
		body := rec.Body.Bytes()
		send(w, rec, body[:min(n, len(body))])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

// hang sends n bytes of the answer and then nothing until the client goes.
func hang(n int) fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if n > 0 {
			rec := answered(r, next)
			send(w, rec, rec.Body.Bytes()[:n])
			w.(http.Flusher).Flush()
		}
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// deaf neither reads a request's body nor answers until the test is over.
func deaf(t *testing.T) fault {
	return func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		select { // an unread body keeps the server from seeing the client go
		case <-r.Context().Done():
		case <-t.Context().Done():
		}
		panic(http.ErrAbortHandler)
	}
}

// corrupt changes one byte of the answer.
func corrupt(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
	rec := answered(r, next)
	body := bytes.Clone(rec.Body.Bytes())
	body[len(body)/2] ^= 1
	send(w, rec, body)
	return true
}

// truncate answers with the first n bytes as if they were all.
func truncate(n int) fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		rec := answered(r, next)
		rec.Header().Set("Content-Length", fmt.Sprint(n))
		send(w, rec, rec.Body.Bytes()[:n])
		return true
	}
}

// tokens is a token service and its guard in front of a registry: each token
// is good for uses requests (0: for ever), then refused with the status refusal.
type tokens struct {
	next    http.Handler
	uses    int
	refusal int // default 401

	mu     sync.Mutex
	given  int
	left   map[string]int
	denied int
}

func (k *tokens) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		k.mu.Lock()
		k.given++
		name := fmt.Sprintf("token-%d", k.given)
		if k.left == nil {
			k.left = map[string]int{}
		}
		k.left[name] = k.uses
		k.mu.Unlock()
		json.NewEncoder(w).Encode(map[string]any{"token": name, "expires_in": 300})
		return
	}
	name := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	k.mu.Lock()
	left, known := k.left[name]
	good := known && (k.uses == 0 || left > 0)
	if good {
		k.left[name]--
	} else {
		k.denied++
	}
	k.mu.Unlock()
	if good {
		r.Header.Del("Authorization")
		k.next.ServeHTTP(w, r)
		return
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, r.Host))
	if known && k.refusal != 0 {
		w.WriteHeader(k.refusal)
		return
	}
	w.WriteHeader(http.StatusUnauthorized)
}

// newImage makes an image of layers of random bytes.
func newImage(t *testing.T, layerBytes int64, layers int) v1.Image {
	t.Helper()
	var added []v1.Layer
	for range layers {
		b := make([]byte, layerBytes)
		rand.Read(b)
		added = append(added, static.NewLayer(b, types.OCILayer))
	}
	img, err := mutate.AppendLayers(mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1), added...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func newIndex(t *testing.T, images ...v1.Image) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for i, img := range images {
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: []string{"amd64", "arm64", "s390x"}[i]}}})
	}
	return idx
}

func digestOf(t *testing.T, m interface{ Digest() (v1.Hash, error) }) digest.Digest {
	t.Helper()
	h, err := m.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest.Digest(h.String())
}

func layersOf(t *testing.T, img v1.Image) []v1.Layer {
	t.Helper()
	ls, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	return ls
}

// content reads a layer whole.
func content(l v1.Layer) ([]byte, error) {
	rc, err := l.Compressed()
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

func mustContent(t *testing.T, l v1.Layer) []byte {
	t.Helper()
	b, err := content(l)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func descriptor(t *testing.T, c *registry.Client, repository string, d digest.Digest) v1.Descriptor {
	t.Helper()
	desc, err := c.Head(context.Background(), repository, d.String())
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

func digestsOf(ds []v1.Descriptor) []string {
	var out []string
	for _, d := range ds {
		out = append(out, d.Digest.String())
	}
	slices.Sort(out)
	return out
}
