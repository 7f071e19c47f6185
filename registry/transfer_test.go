package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"accel"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// stallFor makes hangs end soon in the tests that have one, and never in others.
func stallFor(name string) func(*registry.Options) {
	return func(o *registry.Options) {
		o.StallTimeout = time.Minute
		if strings.Contains(name, "hang") || strings.Contains(name, "deaf") {
			o.StallTimeout = 3 * time.Second // more than a busy machine takes for a few bytes
		}
	}
}

const layerBytes = 3 << 20

// fronted is a registry that holds one image, behind something that breaks.
func fronted(t *testing.T, next http.Handler) (front *faulty, host string, img v1.Image) {
	t.Helper()
	front = &faulty{next: next}
	host = serve(t, front)
	img = newImage(t, layerBytes, 1)
	if err := newClient(t, host).PushImage(context.Background(), host+"/app", img); err != nil {
		t.Fatal(err)
	}
	return front, host, img
}

func TestDownloadSurvives(t *testing.T) {
	for name, c := range map[string]struct {
		fault   func(blob string) fault
		resumed bool // the second request asks for the rest alone
	}{
		"500 twice":             {func(b string) fault { return on(http.MethodGet, b, 2, status(500)) }, false},
		"429 with Retry-After":  {func(b string) fault { return on(http.MethodGet, b, 1, status(429, "Retry-After", "0")) }, false},
		"reset before any byte": {func(b string) fault { return on(http.MethodGet, b, 1, cut(0)) }, false},
		"reset in the middle":   {func(b string) fault { return on(http.MethodGet, b, 3, cut(500_000)) }, true},
		"hang before headers":   {func(b string) fault { return on(http.MethodGet, b, 1, hang(0)) }, false},
		"hang in the middle":    {func(b string) fault { return on(http.MethodGet, b, 1, hang(500_000)) }, true},
		"short Content-Length":  {func(b string) fault { return on(http.MethodGet, b, 1, truncate(500_000)) }, false},
		"401 once":              {func(b string) fault { return on(http.MethodGet, b, 1, status(401)) }, false},
		"403 once":              {func(b string) fault { return on(http.MethodGet, b, 1, status(403)) }, false},
		"reset, then 403 for the rest": {func(b string) fault {
			reset, refused := on(http.MethodGet, b, 1, cut(500_000)), on(http.MethodGet, b, 1, status(403))
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				return reset(w, r, next) || refused(w, r, next)
			}
		}, true},
		"reset without Range support": {func(b string) fault {
			reset := on(http.MethodGet, b, 1, cut(500_000))
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				r.Header.Del("Range")
				return reset(w, r, next)
			}
		}, true},
		"reset and ranges refused": {func(b string) fault {
			reset := on(http.MethodGet, b, 1, cut(500_000))
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if r.Header.Get("Range") != "" {
					w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
					return true
				}
				return reset(w, r, next)
			}
		}, true},
		"reset with wrong ranges": {func(b string) fault {
			reset := on(http.MethodGet, b, 1, cut(500_000))
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if r.Header.Get("Range") != "" {
					w.Header().Set("Content-Range", "bytes 0-9/10")
					w.WriteHeader(http.StatusPartialContent)
					return true
				}
				return reset(w, r, next)
			}
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			front, host, img := fronted(t, newGGCR())
			m, err := newClient(t, host, stallFor(name)).Pull(ctx, host+"/app", digestOf(t, img))
			if err != nil {
				t.Fatal(err)
			}
			source := layersOf(t, img)[0]
			blob := digestOf(t, source).String()
			front.set(c.fault(blob))
			got, err := content(layersOf(t, m.Image)[0])
			if err != nil || !bytes.Equal(got, mustContent(t, source)) {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
			if ranged := len(front.requests("bytes=")) > 0; ranged != c.resumed {
				t.Errorf("requests %q, resumed %v, want %v", front.requests(blob), ranged, c.resumed)
			}
		})
	}
}

func TestDownloadFails(t *testing.T) {
	for name, c := range map[string]struct {
		fault  fault
		reason string
		want   error
	}{
		"corrupt bytes": {corrupt, "its content has digest", nil},
		"always resets": {cut(1000), "gave up after 4 attempts", nil},
		"always hangs":  {hang(1000), "the transfer stalled", nil},
		"too long": {func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			rec := answered(r, next)
			rec.Header().Del("Content-Length")
			send(w, rec, append([]byte("x"), rec.Body.Bytes()...))
			return true
		}, "its content has digest", nil},
		"gone": {status(404), "", accel.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			front, host, img := fronted(t, newGGCR())
			client := newClient(t, host, stallFor(name))
			m, err := client.Pull(ctx, host+"/app", digestOf(t, img))
			if err != nil {
				t.Fatal(err)
			}
			blob := digestOf(t, layersOf(t, img)[0]).String()
			front.set(on(http.MethodGet, blob, 0, func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				r.Header.Del("Range")
				return c.fault(w, r, next)
			}))
			got, err := content(layersOf(t, m.Image)[0])
			if err == nil || !strings.Contains(err.Error(), c.reason) || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %q, %v", err, c.reason, c.want)
			}
			if len(got) >= layerBytes {
				t.Errorf("all %d bytes were handed out", len(got))
			}
			if err := client.Verify(ctx, host+"/app", digestOf(t, img), true); err == nil {
				t.Error("Verify accepts it")
			}
		})
	}
}

func TestVerifyFindsWrongSizes(t *testing.T) {
	ctx := context.Background()
	front, host, img := fronted(t, newGGCR())
	blob := digestOf(t, layersOf(t, img)[0]).String()
	front.set(on(http.MethodHead, blob, 0, status(200, "Content-Length", "7")))
	if err := newClient(t, host).Verify(ctx, host+"/app", digestOf(t, img), false); err == nil || !strings.Contains(err.Error(), "7 bytes") {
		t.Errorf("got %v", err)
	}
	front.set(on(http.MethodHead, blob, 0, status(404)))
	if err := newClient(t, host).Verify(ctx, host+"/app", digestOf(t, img), false); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

func TestManifestDownloadSurvives(t *testing.T) {
	for name, fault := range map[string]fault{
		"corrupted once": corrupt,
		"reset":          cut(10),
		"hang":           hang(10),
		"503":            status(503),
		"401":            status(401),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			front, host, img := fronted(t, newGGCR())
			front.set(on(http.MethodGet, "/manifests/", 1, fault))
			m, err := newClient(t, host, stallFor(name)).Pull(context.Background(), host+"/app", digestOf(t, img))
			if err != nil {
				t.Fatal(err)
			}
			if len(front.requests("/manifests/")) != 2 || m.Image == nil {
				t.Errorf("requests: %q", front.requests("/manifests/"))
			}
		})
	}
	front, host, img := fronted(t, newGGCR())
	front.set(on(http.MethodGet, "/manifests/", 0, corrupt))
	if _, err := newClient(t, host).Pull(context.Background(), host+"/app", digestOf(t, img)); err == nil {
		t.Error("a manifest with other bytes than its digest was accepted")
	}
}

func TestUploadSurvives(t *testing.T) {
	for name, f := range map[string]func(t *testing.T) fault{
		"500 at the start":       func(*testing.T) fault { return on(http.MethodPost, "/blobs/", 2, status(500)) },
		"429 at the content":     func(*testing.T) fault { return on(http.MethodPatch, "", 1, status(429, "Retry-After", "0")) },
		"reset in the content":   func(*testing.T) fault { return on(http.MethodPatch, "", 1, reset) },
		"401 at the content":     func(*testing.T) fault { return on(http.MethodPatch, "", 1, status(401)) },
		"403 at the content":     func(*testing.T) fault { return on(http.MethodPatch, "", 1, status(403)) },
		"deaf at the content":    func(t *testing.T) fault { return on(http.MethodPatch, "", 1, deaf(t)) },
		"no answer to content":   func(*testing.T) fault { return on(http.MethodPatch, "", 1, lost) },
		"503 at the commit":      func(*testing.T) fault { return on(http.MethodPut, "/blobs/", 2, status(503)) },
		"401 at the commit":      func(*testing.T) fault { return on(http.MethodPut, "/blobs/", 1, status(401)) },
		"commit's answer lost":   func(*testing.T) fault { return on(http.MethodPut, "/blobs/", 1, lost) },
		"upload forgotten":       func(*testing.T) fault { return on(http.MethodPut, "/blobs/", 1, code(404, "BLOB_UPLOAD_UNKNOWN")) },
		"content damaged":        func(*testing.T) fault { return on(http.MethodPut, "/blobs/", 1, code(400, "DIGEST_INVALID")) },
		"502 at the manifest":    func(*testing.T) fault { return on(http.MethodPut, "/manifests/", 2, status(502)) },
		"manifest's answer lost": func(*testing.T) fault { return on(http.MethodPut, "/manifests/", 1, lost) },
		"hang at HEAD":           func(*testing.T) fault { return on(http.MethodHead, "/blobs/", 1, hang(0)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			front := &faulty{next: newDistribution(t, nil)}
			host := serve(t, front)
			c := newClient(t, host, stallFor(name))
			size := int64(2 << 20)
			if strings.HasPrefix(name, "deaf") {
				size = 16 << 20 // more than the sockets' buffers hold
			}
			img := newImage(t, size, 1)
			front.set(f(t))
			if err := c.PushImage(ctx, host+"/app", img); err != nil {
				t.Fatal(err)
			}
			front.set(nil)
			if err := c.Verify(ctx, host+"/app", digestOf(t, img), true); err != nil {
				t.Error(err)
			}
		})
	}
}

// reset breaks the connection while the body is being sent.
func reset(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
	io.CopyN(io.Discard, r.Body, 1<<20)
	panic(http.ErrAbortHandler)
}

// lost has the registry do the work, and its answer never arrive.
func lost(_ http.ResponseWriter, r *http.Request, next http.Handler) bool {
	answered(r, next)
	panic(http.ErrAbortHandler)
}

// code answers in the registries' own form.
func code(httpStatus int, name string) fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		w.WriteHeader(httpStatus)
		fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"said so"}]}`, name)
		return true
	}
}

// TestTokensThatEnd: each token is good for five requests only, and is refused
// with 401 or 403 then, in the middle of uploads and downloads.
func TestTokensThatEnd(t *testing.T) {
	for _, refusal := range []int{401, 403} {
		t.Run(fmt.Sprint(refusal), func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			guard := &tokens{next: newDistribution(t, nil), uses: 5, refusal: refusal}
			front := &faulty{next: guard}
			host := serve(t, front)
			c := newClient(t, host)
			repository := host + "/team/app"
			idx := newIndex(t, newImage(t, 100_000, 1), newImage(t, 100_000, 1), newImage(t, 100_000, 1))
			if err := c.PushIndex(ctx, repository, idx); err != nil {
				t.Fatal(err)
			}
			front.set(on(http.MethodGet, "/blobs/", 3, cut(50_000)))
			if err := c.Verify(ctx, repository, digestOf(t, idx), true); err != nil {
				t.Error(err)
			}
			if guard.given < 5 || guard.denied < 5 {
				t.Errorf("%d tokens, %d refusals: nothing was put to the test", guard.given, guard.denied)
			}
		})
	}
}

// TestOneTokenServesManyRequests: sessions are kept while they hold.
func TestOneTokenServesManyRequests(t *testing.T) {
	guard := &tokens{next: newGGCR()}
	host := serve(t, guard)
	c := newClient(t, host)
	img := newImage(t, 1000, 8)
	if err := c.PushImage(context.Background(), host+"/app", img); err != nil {
		t.Fatal(err)
	}
	if guard.given > 2 { // one to pull, one to push
		t.Errorf("%d tokens for one push", guard.given)
	}
}

func TestRedirectsCarryNoCredentials(t *testing.T) {
	ctx := context.Background()
	var authorization atomic.Value
	registryHandler := newGGCR()
	store := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		authorization.Store(r.Header.Get("Authorization"))
		registryHandler.ServeHTTP(w, r)
	}))
	front := &faulty{next: &tokens{next: registryHandler}}
	host := serve(t, front)
	c := newClient(t, host)
	img := newImage(t, 1000, 1)
	if err := c.PushImage(ctx, host+"/app", img); err != nil {
		t.Fatal(err)
	}
	redirect := func(to string) fault {
		return on(http.MethodGet, "/blobs/", 0, func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			http.Redirect(w, r, to+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		})
	}
	front.set(redirect("http://" + store))
	if err := c.Verify(ctx, host+"/app", digestOf(t, img), true); err != nil {
		t.Fatal(err)
	}
	if got := authorization.Load(); got != "" {
		t.Errorf("the blob store got Authorization %q", got)
	}
	for _, to := range []string{"http://169.254.169.254", "http://[fe80::1]", "http://0.0.0.0", "ftp://x.example", "file:///etc"} {
		front.set(redirect(to))
		err := c.Verify(ctx, host+"/app", digestOf(t, img), true)
		if err == nil || !strings.Contains(err.Error(), "redirects to") {
			t.Errorf("redirect to %s: %v", to, err)
		}
	}
	// From HTTPS there is no way to plain HTTP.
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+store+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	t.Cleanup(secure.Close)
	https := strings.TrimPrefix(secure.URL, "https://")
	sc := newClient(t, https, func(o *registry.Options) { o.Hosts[0].PlainHTTP, o.Hosts[0].CAFile = false, caFile(t, secure) })
	if _, err := sc.Tags(ctx, https+"/app"); err == nil || !strings.Contains(err.Error(), "redirects to") {
		t.Errorf("HTTPS to HTTP: %v", err)
	}
}

func TestContextEndsATransfer(t *testing.T) {
	front, host, img := fronted(t, newGGCR())
	blob := digestOf(t, layersOf(t, img)[0]).String()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	front.set(on(http.MethodGet, blob, 0, func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		cancel(accel.ErrLeaseLost)
		return hang(1000)(w, r, next)
	}))
	err := newClient(t, host).Verify(ctx, host+"/app", digestOf(t, img), true)
	if !errors.Is(err, accel.ErrLeaseLost) && !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's end", err)
	}
	if n := len(front.requests("GET /v2/app/blobs/" + blob)); n > 1 {
		t.Errorf("tried %d times after the end", n)
	}
}

// bare is a layer that is known by its digest alone.
type bare struct {
	v1.Layer
	from []string
	err  error
}

func (b bare) MountFrom() []string                { return b.from }
func (b bare) Compressed() (io.ReadCloser, error) { return nil, b.err }

func TestMount(t *testing.T) {
	for kind, start := range map[string]func(t *testing.T) http.Handler{
		"distribution":             kinds["distribution"],
		"distribution with tokens": kinds["distribution with tokens"],
	} {
		t.Run(kind, func(t *testing.T) {
			ctx := context.Background()
			host := serve(t, start(t))
			c := newClient(t, host)
			l := static.NewLayer([]byte("content"), types.OCILayer)
			if err := c.PushLayer(ctx, host+"/memo", l); err != nil {
				t.Fatal(err)
			}
			gone := fmt.Errorf("%w: only the digest is known", accel.ErrNotFound)
			if err := c.PushLayer(ctx, host+"/one", bare{l, []string{"other.example/x", host + "/empty", host + "/memo"}, gone}); err != nil {
				t.Errorf("mount: %v", err)
			}
			if err := c.PushLayer(ctx, host+"/two", bare{l, []string{host + "/empty"}, gone}); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("a mount that fails: %v, want ErrNotFound", err)
			}
			if err := c.PushLayer(ctx, host+"/two", bare{l, nil, gone}); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("no content and nothing to mount from: %v, want ErrNotFound", err)
			}
			if err := c.PushLayer(ctx, host+"/one", bare{l, nil, gone}); err != nil {
				t.Errorf("there already: %v", err)
			}
		})
	}
}

// TestPulledLayersAreMounted: what goes from one repository of a registry to
// another is not downloaded.
func TestPulledLayersAreMounted(t *testing.T) {
	ctx := context.Background()
	front, host, img := fronted(t, newDistribution(t, nil))
	c := newClient(t, host)
	m, err := c.Pull(ctx, host+"/app", digestOf(t, img))
	if err != nil {
		t.Fatal(err)
	}
	front.set(nil)
	if err := c.PushImage(ctx, host+"/copy", m.Image); err != nil {
		t.Fatal(err)
	}
	if got := front.requests("GET /v2/app/blobs/" + digestOf(t, layersOf(t, img)[0]).String()); len(got) > 0 {
		t.Errorf("the layer was downloaded: %q", got)
	}
	if err := c.Verify(ctx, host+"/copy", digestOf(t, img), true); err != nil {
		t.Error(err)
	}
}

func TestUploadReportsItsSourcesErrors(t *testing.T) {
	ctx := context.Background()
	broken := errors.New("the disk is broken")
	l := static.NewLayer(bytes.Repeat([]byte("x"), 1000), types.OCILayer)
	for name, open := range map[string]func() (io.ReadCloser, error){
		"open": func() (io.ReadCloser, error) { return nil, broken },
		"read": func() (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(strings.NewReader("x"), failing{broken})), nil
		},
		"short": func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("x")), nil },
	} {
		t.Run(name, func(t *testing.T) {
			// Each its own server: one may hear of a request after the client gave it up.
			front := &faulty{next: newGGCR()}
			host := serve(t, front)
			err := newClient(t, host).PushLayer(ctx, host+"/app", opened{l, open})
			if err == nil || name != "short" && !errors.Is(err, broken) {
				t.Errorf("got %v", err)
			}
			if n := len(front.requests("PATCH")); n > 1 {
				t.Errorf("tried %d times", n)
			}
		})
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type opened struct {
	v1.Layer
	open func() (io.ReadCloser, error)
}

func (o opened) Compressed() (io.ReadCloser, error) { return o.open() }
