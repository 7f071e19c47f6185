package worker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/convert"
	"accel/readiness"
	"accel/readiness/boltstore"
	"accel/registry"
	"accel/trust"
	"accel/worker"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait of these tests; it is no measure of speed.
const patience = 60 * time.Second

// bed is a registry, a store and a running worker, all real; between worker and
// registry stands a switchboard for faults.
type bed struct {
	t        *testing.T
	ctx      context.Context
	host     string
	board    *switchboard
	tracker  *readiness.Tracker
	client   *registry.Client
	keys     *trust.Keyring
	options  worker.Options
	stopWork func()
}

type bedOption func(*bed, *readiness.Options, *registry.Options, *worker.Options)

func newBed(t *testing.T, opts ...bedOption) *bed {
	t.Helper()
	b := &bed{t: t, board: &switchboard{next: ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))}}
	server := httptest.NewServer(b.board)
	t.Cleanup(server.Close)
	b.host = strings.TrimPrefix(server.URL, "http://")
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	b.ctx = ctx

	ro := readiness.Options{Params: convert.DefaultParams().Fingerprint(), BackoffMin: 10 * time.Millisecond, BackoffMax: 100 * time.Millisecond, ChildHold: 50 * time.Millisecond}
	co := registry.Options{Hosts: []registry.Host{{Name: b.host, PlainHTTP: true}}, StallTimeout: 2 * time.Second, Backoff: 10 * time.Millisecond}
	wo := worker.Options{Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)), LeaseTime: 30 * time.Second, TagSettle: time.Second}
	for _, o := range opts {
		o(b, &ro, &co, &wo)
	}
	store, err := boltstore.Open(filepath.Join(t.TempDir(), "readiness.db"))
	must(t, err)
	t.Cleanup(func() { must(t, store.Close()) })
	b.tracker = readiness.New(store, ro)
	b.client, err = registry.New(co)
	must(t, err)
	t.Cleanup(b.client.Close)
	b.keys, err = trust.CreateKeyring(filepath.Join(t.TempDir(), "keys"))
	must(t, err)
	wo.Tracker, wo.Registry, wo.Keys = b.tracker, b.client, b.keys
	if wo.Converter == nil {
		wo.Converter = &convert.Converter{Params: convert.DefaultParams()}
	}
	wo.Converter.TempDir = t.TempDir()
	b.options = wo
	b.start()
	return b
}

// start runs a worker until stopWork or the test's end.
func (b *bed) start() {
	k, err := worker.New(b.options)
	must(b.t, err)
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	var once sync.Once
	b.stopWork = func() {
		once.Do(func() {
			cancel()
			must(b.t, <-done)
		})
	}
	b.t.Cleanup(b.stopWork)
}

// upload writes an image or index to the registry, past the faults.
func (b *bed) upload(ref string, what remote.Taggable) digest.Digest {
	b.t.Helper()
	r, err := name.ParseReference(b.host+"/"+ref, name.Insecure)
	must(b.t, err)
	client := remote.WithTransport(markedTransport{})
	switch w := what.(type) {
	case v1.ImageIndex:
		must(b.t, remote.WriteIndex(r, w, client))
		h, err := w.Digest()
		must(b.t, err)
		return digest.Digest(h.String())
	case v1.Image:
		must(b.t, remote.Write(r, w, client))
		h, err := w.Digest()
		must(b.t, err)
		return digest.Digest(h.String())
	}
	b.t.Fatalf("cannot upload a %T", what)
	return ""
}

// tell pushes the event of an upload to the tracker.
func (b *bed) tell(ref string, d digest.Digest, at time.Time, mediaType string) accel.Record {
	b.t.Helper()
	repository, tag, _ := strings.Cut(ref, ":")
	recs, err := b.tracker.Push(b.ctx, accel.PushEvent{
		Source: "distribution", Registry: b.host, Repository: repository, Tag: tag, Digest: d, OccurredAt: at, MediaType: mediaType,
	})
	must(b.t, err)
	return recs[0]
}

func (b *bed) ref(s string) accel.Reference {
	b.t.Helper()
	r, err := accel.ParseReference(b.host + "/" + s)
	must(b.t, err)
	return r
}

// wait waits for a final state and requires it to be want.
func (b *bed) wait(ref string, want accel.State) accel.Record {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	s, err := b.tracker.Wait(ctx, b.ref(ref))
	if err != nil {
		b.t.Fatalf("wait for %s: %v; it is %s: %s", ref, err, s.State, s.Reason)
	}
	if s.State != want {
		b.t.Fatalf("%s is %s (%s %s), want %s", ref, s.State, s.Rule, s.Reason, want)
	}
	return s.Record
}

// eventually polls until ok says true.
func (b *bed) eventually(what string, ok func() bool) {
	b.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			b.t.Fatalf("never happened: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// standing is the digest that a tag has in the registry now, "" for none.
func (b *bed) standing(repository, tag string) digest.Digest {
	b.t.Helper()
	desc, err := b.client.Head(b.ctx, b.host+"/"+repository, tag)
	if err != nil {
		return ""
	}
	return digest.Digest(desc.Digest.String())
}

// history lists the states that a record has passed.
func (b *bed) history(id string) []accel.State {
	b.t.Helper()
	evs, _, err := b.tracker.Events(b.ctx, 0, readiness.EventsKept)
	must(b.t, err)
	var states []accel.State
	for _, e := range evs {
		if e.ID == id {
			states = append(states, e.To)
		}
	}
	return states
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// marked tells the test's own requests from the worker's.
const marked = "X-Test-Upload"

type markedTransport struct{}

func (markedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(marked, "1")
	return http.DefaultTransport.RoundTrip(r)
}

// fault may answer a request itself; it says false to let it pass.
type fault func(w http.ResponseWriter, r *http.Request, next http.Handler) bool

// switchboard passes requests on to the registry unless a fault takes them, and
// keeps what was put where.
type switchboard struct {
	next http.Handler

	mu    sync.Mutex
	fault fault
	puts  []string // paths of the manifests that the worker put, in order
}

func (s *switchboard) set(f fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

func (s *switchboard) manifestPuts() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.puts...)
}

func (s *switchboard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get(marked) == "" {
		s.mu.Lock()
		f := s.fault
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			s.puts = append(s.puts, r.URL.Path)
		}
		s.mu.Unlock()
		if f != nil && f(w, r, s.next) {
			return
		}
	}
	s.next.ServeHTTP(w, r)
}

// times lets a fault take effect n times.
func times(n int, match func(*http.Request) bool, do fault) fault {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		mu.Lock()
		hit := n > 0 && match(r)
		if hit {
			n--
		}
		mu.Unlock()
		return hit && do(w, r, next)
	}
}

func answer(status int, header ...string) fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"errors":[{"code":"UNKNOWN","message":"injected %d"}]}`, status)
		return true
	}
}

func blobGet(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:")
}

func blobUpload(r *http.Request) bool {
	return strings.Contains(r.URL.Path, "/blobs/uploads/")
}

func manifestPut(r *http.Request) bool {
	return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/")
}

// putManifest writes a manifest past the faults, and past the client.
func (b *bed) putManifest(repository, tag, mediaType string, m any) {
	b.t.Helper()
	raw, err := json.Marshal(m)
	must(b.t, err)
	r, err := http.NewRequest(http.MethodPut, "http://"+b.host+"/v2/"+repository+"/manifests/"+tag, bytes.NewReader(raw))
	must(b.t, err)
	r.Header.Set("Content-Type", mediaType)
	answer, err := markedTransport{}.RoundTrip(r)
	must(b.t, err)
	must(b.t, answer.Body.Close())
	if answer.StatusCode != http.StatusCreated {
		b.t.Fatalf("put %s: %s", tag, answer.Status)
	}
}
