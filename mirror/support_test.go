package mirror_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"accel"
	"accel/cache"
	"accel/mirror"
	"accel/registry"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
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

// upstream is a distribution registry behind its token service, behind something
// that breaks.
type upstream struct {
	host string
	srv  *httptest.Server
	next http.Handler

	mu    sync.Mutex
	fault fault
	seen  []string // "METHOD path"
	given map[string]string
	// tokens is a fault of the token service.
	tokens fault
	// blobBytes that were sent in answers to GET, by path.
	blobBytes map[string]int64
}

// The users of the token service. Everybody, also without a name, may read
// what is below public/; admin may do anything, others what is below their name.
var users = map[string]string{"admin": "root", "alice": "a", "bob": "b"}

func may(user, repository string) bool {
	return user == "admin" || strings.HasPrefix(repository, "public/") || user != "" && strings.HasPrefix(repository, user+"/")
}

func newUpstream(t testing.TB) *upstream {
	t.Helper()
	config := &configuration.Configuration{}
	config.Log.AccessLog.Disabled = true
	config.HTTP.Secret = "for tests"
	config.Storage = configuration.Storage{"filesystem": {"rootdirectory": t.TempDir()}, "delete": {"enabled": true}, "maintenance": {"uploadpurging": map[any]any{"enabled": false}}}
	app := handlers.NewApp(t.Context(), config)
	u := &upstream{next: app, given: map[string]string{}, blobBytes: map[string]int64{}}
	u.srv = httptest.NewServer(u)
	u.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	u.host = strings.TrimPrefix(u.srv.URL, "http://")
	t.Cleanup(func() {
		u.srv.Close()
		app.Shutdown()
	})
	return u
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		u.mu.Lock()
		x := u.tokens
		u.mu.Unlock()
		if x == nil || !x(w, r, http.HandlerFunc(u.token)) {
			u.token(w, r)
		}
		return
	}
	u.mu.Lock()
	u.seen = append(u.seen, r.Method+" "+r.URL.Path)
	x := u.fault
	u.mu.Unlock()
	if strings.Contains(r.URL.Path, "/blobs/sha256:") && r.Method == http.MethodGet {
		w = &meteredWriter{w, func(n int) {
			u.mu.Lock()
			defer u.mu.Unlock()
			u.blobBytes[r.URL.Path] += int64(n)
		}}
	}
	guarded := http.HandlerFunc(u.guard)
	if x == nil || !x(w, r, guarded) {
		guarded(w, r)
	}
}

// meteredWriter counts the body. It hides io.ReaderFrom, so that all is seen.
type meteredWriter struct {
	http.ResponseWriter
	count func(int)
}

func (m *meteredWriter) Write(p []byte) (int, error) {
	n, err := m.ResponseWriter.Write(p)
	m.count(n)
	return n, err
}

func (m *meteredWriter) Flush() { m.ResponseWriter.(http.Flusher).Flush() }

// token gives one for a user, or for nobody.
func (u *upstream) token(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet { // containerd tries OAuth first
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	user, password, named := r.BasicAuth()
	if named && (users[user] == "" || users[user] != password) {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	token := "token-" + rand.Text()
	u.given[token] = user
	json.NewEncoder(w).Encode(map[string]any{"token": token, "expires_in": 300})
}

func (u *upstream) guard(w http.ResponseWriter, r *http.Request) {
	repository := strings.TrimPrefix(r.URL.Path, "/v2/")
	for _, part := range []string{"/manifests/", "/blobs/", "/tags/", "/referrers/"} {
		if i := strings.LastIndex(repository, part); i >= 0 {
			repository = repository[:i]
		}
	}
	u.mu.Lock()
	user, known := u.given[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
	u.mu.Unlock()
	if !known || repository != "" && !may(user, repository) {
		challenge := u.challenge()
		if repository != "" {
			challenge += fmt.Sprintf(`,scope="repository:%s:pull"`, repository)
		}
		w.Header().Set("WWW-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	r.Header.Del("Authorization")
	u.next.ServeHTTP(w, r)
}

// challenge names the token service by a name: crane follows no realm at a private address.
func (u *upstream) challenge() string {
	return fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, strings.Replace(u.host, "127.0.0.1", "localhost", 1))
}

// requests that had part in them, since the last set.
func (u *upstream) requests(part string) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var found []string
	for _, s := range u.seen {
		if strings.Contains(s, part) {
			found = append(found, s)
		}
	}
	return found
}

func (u *upstream) bearer(t *testing.T, user string) string {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	token := "token-" + rand.Text()
	u.given[token] = user
	return "Bearer " + token
}

// client is the administrator's.
func (u *upstream) client(t testing.TB, change ...func(*registry.Options)) *registry.Client {
	t.Helper()
	o := registry.Options{Hosts: []registry.Host{{Name: u.host, PlainHTTP: true, Username: "admin", Password: users["admin"]}}, Backoff: time.Millisecond}
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

// push stores an image or index in a repository under tags.
func (u *upstream) push(t testing.TB, repository string, what interface{ Digest() (v1.Hash, error) }, tags ...string) digest.Digest {
	t.Helper()
	ctx := context.Background()
	c := u.client(t)
	var err error
	switch what := what.(type) {
	case v1.Image:
		err = c.PushImage(ctx, u.host+"/"+repository, what)
	case v1.ImageIndex:
		err = c.PushIndex(ctx, u.host+"/"+repository, what)
	}
	if err != nil {
		t.Fatal(err)
	}
	d := digestOf(t, what)
	for _, tag := range tags {
		if err := c.Tag(ctx, u.host+"/"+repository, tag, d); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// node is a mirror as it runs on one.
type node struct {
	up     *upstream
	url    string
	store  *cache.Store
	mirror *mirror.Mirror
	late   atomic.Int64 // how far its clock is ahead, in nanoseconds
	stop   func()

	mu        sync.Mutex
	transfers []accel.Transfer
}

func (n *node) wait(d time.Duration) { n.late.Add(int64(d)) }

func (n *node) seen() []accel.Transfer {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.transfers)
}

// own makes the node's own credentials those of a user; "": none.
func own(user string) func(*registry.Options) {
	return func(o *registry.Options) { o.Hosts[0].Username, o.Hosts[0].Password = user, users[user] }
}

// newNode starts a mirror in front of up. What changes options is a
// func(*registry.Options), a func(*mirror.Options) or a func(*cache.Options).
func newNode(t testing.TB, up *upstream, changes ...any) *node {
	t.Helper()
	n := &node{up: up}
	now := func() time.Time { return time.Now().Add(time.Duration(n.late.Load())) }
	log := slog.New(slog.DiscardHandler)
	var err error
	content := cache.Options{Dir: t.TempDir(), Log: log, Now: now}
	for _, c := range changes {
		if c, ok := c.(func(*cache.Options)); ok {
			c(&content)
		}
	}
	n.store, err = cache.Open(content)
	if err != nil {
		t.Fatal(err)
	}
	var client []func(*registry.Options)
	o := mirror.Options{Store: n.store, Log: log, Now: now, Observe: func(x accel.Transfer) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.transfers = append(n.transfers, x)
	}}
	client = append(client, own(""))
	for _, c := range changes {
		switch c := c.(type) {
		case func(*registry.Options):
			client = append(client, c)
		case func(*mirror.Options):
			c(&o)
		}
	}
	o.Registry = up.client(t, client...)
	if n.mirror, err = mirror.New(o); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- n.store.Run(ctx) }()
	srv := httptest.NewServer(n.mirror)
	n.url = srv.URL
	n.stop = sync.OnceFunc(func() {
		srv.Close()
		cancel()
		if err := <-ran; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("the store ended with %v", err)
		}
		n.store.Close()
	})
	t.Cleanup(n.stop)
	return n
}

// reply is an answer, read whole; err: it broke off.
type reply struct {
	status int
	header http.Header
	body   []byte
	err    error
}

// ask sends a request to the mirror; headers are pairs.
func (n *node) ask(method, path string, headers ...string) reply {
	req, err := http.NewRequestWithContext(context.Background(), method, n.url+path, nil)
	if err != nil {
		return reply{err: err}
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return reply{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, body, err}
}

// get is a GET by containerd's way of naming the registry.
func (n *node) get(path string, headers ...string) reply {
	return n.ask(http.MethodGet, "/v2/"+path+"?ns="+n.up.host, headers...)
}

// pull does what a client does: resolve, manifests, config and layers, all checked.
func (n *node) pull(repository, tag string, headers ...string) error {
	head := n.ask(http.MethodHead, "/v2/"+repository+"/manifests/"+tag+"?ns="+n.up.host, headers...)
	if head.err != nil || head.status != http.StatusOK {
		return fmt.Errorf("HEAD %s: %d, %w", tag, head.status, head.err)
	}
	get := func(what, d string) ([]byte, error) {
		r := n.get(repository+"/"+what+"/"+d, headers...)
		if r.err != nil || r.status != http.StatusOK {
			return nil, fmt.Errorf("GET %s %s: %d %.200s, %w", what, d, r.status, r.body, r.err)
		}
		if got := digest.FromBytes(r.body).String(); got != d {
			return nil, fmt.Errorf("GET %s %s: content has digest %s", what, d, got)
		}
		return r.body, nil
	}
	raw, err := get("manifests", head.header.Get("Docker-Content-Digest"))
	if err != nil {
		return err
	}
	var m struct {
		Manifests, Layers []v1.Descriptor
		Config            *v1.Descriptor
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	if len(m.Manifests) > 0 {
		if raw, err = get("manifests", m.Manifests[0].Digest.String()); err != nil {
			return err
		}
		if err := json.Unmarshal(raw, &m); err != nil {
			return err
		}
	}
	var wg sync.WaitGroup
	errs := make([]error, len(m.Layers)+1)
	for i, d := range append(m.Layers, *m.Config) {
		wg.Go(func() { _, errs[i] = get("blobs", d.Digest.String()) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// image makes one of layers of random bytes.
func image(t testing.TB, sizes ...int) v1.Image {
	t.Helper()
	var added []v1.Layer
	for _, n := range sizes {
		b := make([]byte, n)
		rand.Read(b)
		added = append(added, static.NewLayer(b, types.OCILayer))
	}
	img, err := mutate.AppendLayers(mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1), added...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func index(t testing.TB, images ...v1.Image) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for i, img := range images {
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: []string{"amd64", "arm64"}[i]}}})
	}
	return idx
}

func digestOf(t testing.TB, m interface{ Digest() (v1.Hash, error) }) digest.Digest {
	t.Helper()
	h, err := m.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest.Digest(h.String())
}

// layer is the digest and the content of an image's layer.
func layer(t testing.TB, img v1.Image, i int) (digest.Digest, []byte) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	rc, err := layers[i].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	content, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return digestOf(t, layers[i]), content
}
