package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/readiness"
	"accel/readiness/boltstore"
	"accel/trust"
	"accel/webhook"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	host       = "registry.test:5000"
	hookSecret = "hook-secret"
	patience   = 30 * time.Second
)

// bed is a real handler over a real store; only package worker's removal of
// targets is played.
type bed struct {
	t       *testing.T
	ctx     context.Context
	url     string
	tracker *readiness.Tracker
	client  *api.Client
	http    *http.Client
	drain   context.CancelFunc
	life    *lifecycle
}

type lifecycle struct{ deleted []string }

func (l *lifecycle) DeleteTarget(_ context.Context, rec accel.Record) error {
	l.deleted = append(l.deleted, rec.ID)
	return nil
}

func (l *lifecycle) GC(_ context.Context, dryRun bool) ([]api.Orphan, error) {
	return []api.Orphan{{ID: "x", Removed: !dryRun}}, nil
}

func newBed(t *testing.T, change ...func(*api.Options)) *bed {
	t.Helper()
	store, err := boltstore.Open(filepath.Join(t.TempDir(), "readiness.db"))
	must(t, err)
	t.Cleanup(func() { must(t, store.Close()) })
	keys, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	source, err := webhook.New(webhook.Config{Kind: webhook.Distribution, Secret: hookSecret})
	must(t, err)
	draining, drain := context.WithCancel(context.Background())
	b := &bed{t: t, tracker: readiness.New(store, readiness.Options{Params: "p"}), http: &http.Client{Transport: &http.Transport{}}, drain: drain, life: &lifecycle{}}
	o := api.Options{
		Tracker: b.tracker, Webhooks: []*webhook.Source{source}, Keys: keys, Lifecycle: b.life, Open: true, Draining: draining, MaxBodyBytes: 64 << 10,
		Version: "test", Log: slog.New(slog.DiscardHandler),
		Canonical: func(h string) (string, error) {
			if h != host {
				return "", fmt.Errorf("%w: %s", accel.ErrRegistryNotAllowed, h)
			}
			return h, nil
		},
	}
	for _, c := range change {
		c(&o)
	}
	handler, err := api.New(o)
	must(t, err)
	server := httptest.NewServer(handler)
	t.Cleanup(func() { drain(); b.http.CloseIdleConnections(); server.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	b.ctx, b.url = ctx, server.URL
	b.client, err = api.NewClient(server.URL, api.WithHTTPClient(b.http))
	must(t, err)
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// do sends a request and returns status, header and body.
func (b *bed) do(method, path, body string, header ...string) (int, http.Header, string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.ctx, method, b.url+path, strings.NewReader(body))
	must(b.t, err)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := b.http.Do(req)
	must(b.t, err)
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	must(b.t, err)
	return res.StatusCode, res.Header, string(raw)
}

func event(registry, repository, tag string, d digest.Digest) string {
	return fmt.Sprintf(`{"events":[{"id":"1","timestamp":"2026-01-02T03:04:05Z","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":9,"repository":%q,"tag":%q},"request":{"host":%q}}]}`, d, repository, tag, registry)
}

// becomeReady works the next image off as a worker would.
func (b *bed) becomeReady() readiness.Work {
	b.t.Helper()
	w, err := b.tracker.Claim(b.ctx)
	must(b.t, err)
	must(b.t, b.tracker.Finish(b.ctx, w, accel.Target{Repository: w.Repository, Digest: digest.FromString("target" + w.ID), Tags: []string{"v1-esgz"}},
		accel.Result{SourceBytes: 10, TargetBytes: 11, Total: time.Second}, map[digest.Digest][]byte{w.Digest: []byte(`{"payload":"x"}`)}))
	return w
}

func TestWebhookAnswers(t *testing.T) {
	b := newBed(t)
	d := digest.FromString("image")
	good := event(host, "team/app", "v1", d)
	for name, c := range map[string]struct {
		path, body, auth string
		status           int
		says             string
	}{
		"accepted":          {"/v1/webhooks/distribution", good, hookSecret, 202, `"state":"Pending"`},
		"no credential":     {"/v1/webhooks/distribution", good, "", 401, "urn:accel:problem:unauthenticated"},
		"wrong credential":  {"/v1/webhooks/distribution", good, "no", 401, "urn:accel:problem:unauthenticated"},
		"unknown source":    {"/v1/webhooks/nobody", good, hookSecret, 404, "urn:accel:problem:not-found"},
		"foreign registry":  {"/v1/webhooks/distribution", event("evil.test", "a", "b", d), hookSecret, 403, "registry-not-allowed"},
		"malformed":         {"/v1/webhooks/distribution", `{"events":3}`, hookSecret, 400, "urn:accel:problem:invalid"},
		"too large":         {"/v1/webhooks/distribution", `{"events":"` + strings.Repeat("x", 70<<10) + `"}`, hookSecret, 413, ""},
		"layer is ignored":  {"/v1/webhooks/distribution", strings.Replace(good, "application/vnd.oci.image.manifest.v1+json", "application/octet-stream", 1), hookSecret, 200, `"ignored"`},
		"referrers ignored": {"/v1/webhooks/distribution", event(host, "team/app", "sha256-"+strings.Repeat("a", 64), d), hookSecret, 200, `"ignored"`},
	} {
		t.Run(name, func(t *testing.T) {
			b.t = t
			header := []string{"Content-Type", "application/vnd.docker.distribution.events.v2+json"}
			if c.auth != "" {
				header = append(header, "Authorization", c.auth)
			}
			status, h, body := b.do(http.MethodPost, c.path, c.body, header...)
			if status != c.status || !strings.Contains(body, c.says) {
				t.Errorf("%d %s, want %d with %q", status, body, c.status, c.says)
			}
			if status >= 400 && h.Get("Content-Type") != "application/problem+json" {
				t.Errorf("error comes as %q", h.Get("Content-Type"))
			}
		})
	}
}

func TestOwnPushIsIgnored(t *testing.T) {
	b := newBed(t)
	_, err := b.client.Submit(b.ctx, host+"/app:v1")
	must(t, err)
	w, err := b.tracker.Claim(b.ctx)
	must(t, err)
	own := digest.FromString("ours")
	must(t, b.tracker.Announce(b.ctx, w, own))
	status, _, body := b.do(http.MethodPost, "/v1/webhooks/distribution", event(host, "app", "v1-esgz", own), "Authorization", hookSecret)
	if status != 200 || !strings.Contains(body, "own push") {
		t.Errorf("%d %s", status, body)
	}
}

func TestReadinessOverHTTP(t *testing.T) {
	b := newBed(t)
	if _, err := b.client.Readiness(b.ctx, host+"/app:v1", 0); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("unknown image: %v", err)
	}
	if _, err := b.client.Readiness(b.ctx, "not a reference", 0); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("malformed reference: %v", err)
	}
	if _, err := b.client.Readiness(b.ctx, "elsewhere.test/app", 0); !errors.Is(err, accel.ErrRegistryNotAllowed) {
		t.Errorf("foreign registry: %v", err)
	}
	d := digest.FromString("one")
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: d})
	must(t, err)
	img, err := b.client.Readiness(b.ctx, host+"/app:v1", time.Millisecond) // not final: answers all the same
	must(t, err)
	if img.State != accel.Pending || img.Final {
		t.Errorf("after the push it is %+v", img)
	}
	b.becomeReady()
	img, err = b.client.Readiness(b.ctx, host+"/app@"+d.String(), 0)
	must(t, err)
	if img.State != accel.Ready || img.Target == nil || img.Sizes.TargetBytes != 11 || img.Timings.TotalSeconds != 1 {
		t.Errorf("ready image is told as %+v", img)
	}
	_, err = b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: digest.FromString("two")})
	must(t, err)
	img, err = b.client.Readiness(b.ctx, host+"/app:v1", 0)
	must(t, err)
	if img.State != accel.Pending || img.Previous == nil || img.Previous.Digest != d.String() {
		t.Errorf("while a newer push is in work the answer is %+v", img)
	}
}

func TestWaitIsAnsweredAtOnceWhenFinal(t *testing.T) {
	b := newBed(t)
	got := make(chan api.Image, 1)
	go func() {
		img, err := b.client.Wait(b.ctx, host+"/app:v1", patience) // before anybody pushed it
		if err != nil {
			t.Error(err)
		}
		got <- img
	}()
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: digest.FromString("one")})
	must(t, err)
	b.becomeReady()
	if img := <-got; img.State != accel.Ready {
		t.Errorf("the waiter got %+v", img)
	}
}

func TestWaitTimesOut(t *testing.T) {
	b := newBed(t)
	_, err := b.client.Wait(b.ctx, host+"/app:v1", 50*time.Millisecond)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestDrainAnswersWaiters(t *testing.T) {
	b := newBed(t)
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: digest.FromString("one")})
	must(t, err)
	got := make(chan api.Image, 1)
	go func() {
		img, err := b.client.Readiness(b.ctx, host+"/app:v1", 10*time.Minute)
		if err != nil {
			t.Error(err)
		}
		got <- img
	}()
	b.drain()
	if img := <-got; img.State != accel.Pending {
		t.Errorf("the long poll was answered with %+v", img)
	}
	if status, _, _ := b.do(http.MethodGet, "/readyz", ""); status != http.StatusServiceUnavailable {
		t.Errorf("/readyz while draining: %d", status)
	}
}

func TestImagesRoundTrip(t *testing.T) {
	b := newBed(t)
	for i := range 7 {
		_, err := b.client.Submit(b.ctx, fmt.Sprintf("%s/app:v%d", host, i))
		must(t, err)
	}
	seen := 0
	for path := "/v1/images?limit=3"; path != ""; {
		status, _, body := b.do(http.MethodGet, path, "")
		var page api.ImagePage
		must(t, json.Unmarshal([]byte(body), &page))
		if status != 200 || len(page.Images) > 3 {
			t.Fatalf("%d %s", status, body)
		}
		seen += len(page.Images)
		path = ""
		if page.Next != "" {
			path = "/v1/images?limit=3&cursor=" + page.Next
		}
	}
	if seen != 7 {
		t.Errorf("pages have %d images, want 7", seen)
	}
	var first api.Image
	for img, err := range b.client.Images(b.ctx, api.ListOptions{State: accel.Pending, Repository: host + "/app"}) {
		must(t, err)
		first = img
		break
	}
	got, err := b.client.Image(b.ctx, first.ID)
	must(t, err)
	if got.Tags[0] != "v6" {
		t.Errorf("newest first: %v", got.Tags)
	}
	if _, err := b.client.Retry(b.ctx, first.ID); err != nil {
		t.Errorf("retry of a pending image: %v", err)
	}
	if _, err := b.client.Delete(b.ctx, first.ID, true); err != nil {
		t.Error(err)
	}
	if len(b.life.deleted) != 1 || b.life.deleted[0] != first.ID {
		t.Errorf("targets removed: %v", b.life.deleted)
	}
	if _, err := b.client.Image(b.ctx, first.ID); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("deleted image: %v", err)
	}
	for img, err := range b.client.Images(b.ctx, api.ListOptions{}) {
		must(t, err)
		if _, err := b.client.Delete(b.ctx, img.ID, false); err != nil {
			t.Error(err)
		}
	}
	_, err = b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: digest.FromString("one")})
	must(t, err)
	w := b.becomeReady()
	if _, err := b.client.Retry(b.ctx, w.ID); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("retry of a ready image: %v", err)
	}
	if status, _, body := b.do(http.MethodGet, "/v1/images?cursor=garbage!", ""); status != 400 {
		t.Errorf("bad cursor: %d %s", status, body)
	}
}

func TestTokensAndScopes(t *testing.T) {
	b := newBed(t, func(o *api.Options) {
		o.Open = false
		o.Tokens = []api.Token{{Name: "r", Scope: api.ScopeRead, SHA256: api.HashToken("reader")}, {Name: "w", Scope: api.ScopeWrite, SHA256: api.HashToken("writer")}}
	})
	for _, c := range []struct {
		method, path, token string
		status              int
	}{
		{"GET", "/v1/images", "", 401}, {"GET", "/v1/images", "nobody", 401}, {"GET", "/v1/images", "reader", 200}, {"GET", "/v1/images", "writer", 200},
		{"POST", "/v1/images", "reader", 403}, {"POST", "/v1/images", "writer", 202}, {"POST", "/v1/gc", "", 401}, {"POST", "/v1/gc", "reader", 403},
		{"GET", "/v1/readiness?image=" + host + "/a", "", 401}, {"GET", "/v1/events", "", 401}, {"DELETE", "/v1/images/x", "reader", 403},
		{"POST", "/v1/images/x/retry", "reader", 403}, {"GET", "/v1/keys", "", 200}, {"GET", "/healthz", "", 200}, {"GET", "/", "", 200},
	} {
		var header []string
		if c.token != "" {
			header = []string{"Authorization", "Bearer " + c.token, "Content-Type", "application/json"}
		}
		status, h, body := b.do(c.method, c.path, `{"image":"`+host+`/app:v1","dryRun":true}`, header...)
		if c.path == "/v1/gc" || c.method == "POST" && c.path == "/v1/images" {
			if status == 422 { // one body serves both: unknown fields do not matter to authentication
				status = c.status
			}
		}
		if status != c.status {
			t.Errorf("%s %s as %q: %d %s, want %d", c.method, c.path, c.token, status, body, c.status)
		}
		if status == 401 && h.Get("WWW-Authenticate") == "" {
			t.Errorf("%s %s: 401 without WWW-Authenticate", c.method, c.path)
		}
	}
	if _, err := api.New(api.Options{Log: slog.Default()}); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a handler without tokens that is not open: %v", err)
	}
}

func TestEventsResume(t *testing.T) {
	b := newBed(t)
	for i := range 3 {
		_, err := b.client.Submit(b.ctx, fmt.Sprintf("%s/app:v%d", host, i))
		must(t, err)
	}
	var seqs []uint64
	for e, err := range b.client.Events(b.ctx, 0) {
		must(t, err)
		if seqs = append(seqs, e.Seq); len(seqs) == 3 {
			break
		}
	}
	for e, err := range b.client.Events(b.ctx, seqs[0]) {
		must(t, err)
		if e.Seq != seqs[1] {
			t.Errorf("resumed after %d with %d, want %d", seqs[0], e.Seq, seqs[1])
		}
		break
	}
}

func TestMappingAndKeys(t *testing.T) {
	b := newBed(t)
	d := digest.FromString("one")
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: d})
	must(t, err)
	b.becomeReady()
	if status, _, body := b.do(http.MethodGet, "/v1/mappings/"+d.String(), ""); status != 200 || body != `{"payload":"x"}` {
		t.Errorf("mapping: %d %s", status, body)
	}
	if status, _, _ := b.do(http.MethodGet, "/v1/mappings/"+digest.FromString("other").String(), ""); status != 404 {
		t.Errorf("unknown mapping: %d", status)
	}
	if status, _, _ := b.do(http.MethodGet, "/v1/mappings/nonsense", ""); status != 400 {
		t.Errorf("malformed digest: %d", status)
	}
	keys, err := b.client.Keys(b.ctx)
	must(t, err)
	if _, err := trust.NewVerifier([]byte(keys.PEM)); err != nil || len(keys.Keys) != 1 {
		t.Errorf("keys %+v: %v", keys, err)
	}
}

func TestDocumentPagesAndUnknownRoutes(t *testing.T) {
	b := newBed(t)
	_, _, spec := b.do(http.MethodGet, "/openapi.json", "")
	_, _, docs := b.do(http.MethodGet, "/docs", "")
	for _, path := range []string{
		"/v1/webhooks/{source}", "/v1/webhooks/{source}/{secret}", "/v1/readiness", "/v1/images", "/v1/images/{id}", "/v1/images/{id}/retry",
		"/v1/events", "/v1/keys", "/v1/mappings/{digest}", "/v1/gc",
	} {
		if !strings.Contains(spec, `"`+path+`"`) || !strings.Contains(docs, path) {
			t.Errorf("%s is not in the document or on the page", path)
		}
	}
	if strings.Contains(docs, "<script") || strings.Contains(docs, "https://") {
		t.Error("the page loads something from elsewhere")
	}
	if status, h, _ := b.do(http.MethodGet, "/nope", ""); status != 404 || h.Get("Content-Type") != "application/problem+json" {
		t.Errorf("unknown route: %d %s", status, h.Get("Content-Type"))
	}
	if status, h, _ := b.do(http.MethodPut, "/v1/images", ""); status != 405 || h.Get("Allow") == "" {
		t.Errorf("wrong method: %d, Allow %q", status, h.Get("Allow"))
	}
}

func TestHomePageEscapes(t *testing.T) {
	b := newBed(t)
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: digest.FromString("one")})
	must(t, err)
	w, err := b.tracker.Claim(b.ctx)
	must(t, err)
	must(t, b.tracker.Fail(b.ctx, w, errors.New(`<script>alert(1)</script>`)))
	_, h, body := b.do(http.MethodGet, "/", "")
	if strings.Contains(body, "<script>") || !strings.Contains(body, "&lt;script&gt;") || h.Get("Content-Security-Policy") == "" {
		t.Errorf("a registry's words reach the page as they are: %s", body)
	}
}

func TestMetrics(t *testing.T) {
	b := newBed(t)
	b.do(http.MethodPost, "/v1/webhooks/distribution", event(host, "app", "v1", digest.FromString("one")), "Authorization", hookSecret)
	b.do(http.MethodPost, "/v1/webhooks/distribution", "x")
	_, _, body := b.do(http.MethodGet, "/metrics", "")
	for _, want := range []string{
		`accel_intake_events_total{result="accepted",source="distribution"} 1`, `accel_intake_events_total{result="refused",source="distribution"} 1`,
		`accel_images{state="Pending"} 1`, `accel_images_oldest_seconds{state="Pending"}`, `accel_http_request_seconds_bucket{route="POST /v1/webhooks/{source}"`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
}

func TestClientSurvivesAServerRestart(t *testing.T) {
	b := newBed(t)
	d := digest.FromString("one")
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: d})
	must(t, err)
	b.becomeReady()
	failures := 2
	flaky := roundTripper(func(r *http.Request) (*http.Response, error) {
		if failures--; failures >= 0 {
			return nil, os.ErrDeadlineExceeded
		}
		return b.http.Transport.RoundTrip(r)
	})
	c, err := api.NewClient(b.url, api.WithHTTPClient(&http.Client{Transport: flaky}))
	must(t, err)
	if img, err := c.Wait(b.ctx, host+"/app:v1", patience); err != nil || img.State != accel.Ready {
		t.Errorf("wait over a restart: %v, %v", img.State, err)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func FuzzProblem(f *testing.F) {
	f.Add(404, []byte(`{"type":"urn:accel:problem:not-found","title":"Not Found","detail":"x"}`))
	f.Add(500, []byte(`<html>`))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		server := roundTripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 400 + (status&0x7fffffff)%200, Body: io.NopCloser(bytes.NewReader(body)), Header: http.Header{}}, nil
		})
		c, err := api.NewClient("http://x.test", api.WithHTTPClient(&http.Client{Transport: server}))
		must(t, err)
		if _, err := c.Image(t.Context(), "id"); err == nil {
			t.Error("an error answer was taken for a good one")
		}
	})
}
