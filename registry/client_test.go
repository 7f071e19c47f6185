package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"accel"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// TestRoundTrip takes an index through every call, on every kind of registry.
func TestRoundTrip(t *testing.T) {
	for kind, start := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			host := serve(t, start(t))
			c := newClient(t, host)
			repository := host + "/team/app"

			idx := newIndex(t, newImage(t, 100_000, 3), newImage(t, 1, 1))
			d := digestOf(t, idx)
			if _, err := c.Head(ctx, repository, "v1"); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("Head of nothing: %v, want ErrNotFound", err)
			}
			if _, err := c.Pull(ctx, repository, d); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("Pull of nothing: %v, want ErrNotFound", err)
			}
			for range 2 { // the second time it is there
				if err := c.PushIndex(ctx, repository, idx); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Tag(ctx, repository, "v1", d); err != nil {
				t.Fatal(err)
			}
			desc, err := c.Head(ctx, repository, "v1")
			if err != nil || desc.Digest.String() != d.String() || !desc.MediaType.IsIndex() || desc.Size == 0 {
				t.Errorf("Head: %+v, %v", desc, err)
			}
			pulled, err := c.Pull(ctx, repository, d)
			if err != nil {
				t.Fatal(err)
			}
			if pulled.Image != nil || pulled.Index == nil || digest.FromBytes(pulled.Raw) != d || pulled.Descriptor.Digest != desc.Digest {
				t.Errorf("Pull: %+v", pulled.Descriptor)
			}
			sameIndex(t, pulled.Index, idx)
			for _, full := range []bool{true, false} {
				if err := c.Verify(ctx, repository, d, full); err != nil {
					t.Errorf("Verify full=%v: %v", full, err)
				}
			}
			if tags, err := c.Tags(ctx, repository); err != nil || !slices.Contains(tags, "v1") {
				t.Errorf("Tags: %v, %v", tags, err)
			}
			if repos, err := c.Catalog(ctx, host); err != nil || !reflect.DeepEqual(repos, []string{"team/app"}) {
				t.Errorf("Catalog: %v, %v", repos, err)
			}
			for range 2 { // the second time it is gone
				if err := c.Delete(ctx, repository, d); err != nil {
					t.Fatalf("Delete: %v", err)
				}
			}
			if _, err := c.Head(ctx, repository, d.String()); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("Head after Delete: %v, want ErrNotFound", err)
			}
			if err := c.Verify(ctx, repository, d, false); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("Verify after Delete: %v, want ErrNotFound", err)
			}
		})
	}
}

func TestPulledImageKeepsLayerDescriptors(t *testing.T) {
	ctx := context.Background()
	host := serve(t, newGGCR())
	c := newClient(t, host)
	img := newImage(t, 1000, 1)
	img, err := mutate.Append(img, mutate.Addendum{Layer: layersOf(t, newImage(t, 500, 1))[0], MediaType: types.OCILayer,
		Annotations: map[string]string{accel.AnnotationTOCOffset: "7"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.PushImage(ctx, host+"/app", img); err != nil {
		t.Fatal(err)
	}
	m, err := c.Pull(ctx, host+"/app", digestOf(t, img))
	if err != nil {
		t.Fatal(err)
	}
	// Appending to the pulled image must carry the annotation along.
	again, err := mutate.AppendLayers(m.Image, layersOf(t, newImage(t, 10, 1))...)
	if err != nil {
		t.Fatal(err)
	}
	im, err := again.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if im.Layers[1].Annotations[accel.AnnotationTOCOffset] != "7" {
		t.Errorf("layer annotations are lost: %+v", im.Layers)
	}
}

func TestCanonical(t *testing.T) {
	c, err := registry.New(registry.Options{Hosts: []registry.Host{
		{Name: "127.0.0.1:5000", Aliases: []string{"localhost:5000", "registry:5000"}, PlainHTTP: true},
		{Name: "Registry.Example:443"},
		{Name: "index.docker.io"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"127.0.0.1:5000":       "127.0.0.1:5000",
		"localhost:5000":       "127.0.0.1:5000",
		"LOCALHOST:5000":       "127.0.0.1:5000",
		"registry:5000":        "127.0.0.1:5000",
		"registry.example":     "registry.example",
		"registry.example:443": "registry.example",
		"docker.io":            "docker.io",
		"index.docker.io":      "docker.io",
		"registry-1.docker.io": "docker.io",
	} {
		if got, err := c.Canonical(name); err != nil || got != want {
			t.Errorf("Canonical(%q) = %q, %v, want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"localhost:5001", "registry.example:80", "registry.example:5000", "169.254.169.254", "evil.example"} {
		if got, err := c.Canonical(name); !errors.Is(err, accel.ErrRegistryNotAllowed) {
			t.Errorf("Canonical(%q) = %q, %v, want ErrRegistryNotAllowed", name, got, err)
		}
	}
	for _, name := range []string{"", "http://x", "a/b", "user@host", "host name", "x\x00"} {
		if got, err := c.Canonical(name); err == nil {
			t.Errorf("Canonical(%q) = %q, want an error", name, got)
		}
	}
	open, err := registry.New(registry.Options{AllowAny: true})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := open.Canonical("Any.Example:443"); err != nil || got != "any.example" {
		t.Errorf("AllowAny: %q, %v", got, err)
	}
}

// TestStatuses holds what each answer means to the queue.
func TestStatuses(t *testing.T) {
	for _, c := range []struct {
		code      int
		body      string
		want      error
		permanent bool
		tries     int // requests that one call makes
	}{
		{code: 401, want: accel.ErrUnauthenticated, tries: 3},
		{code: 403, want: accel.ErrForbidden, tries: 2},
		{code: 404, want: accel.ErrNotFound, tries: 1},
		{code: 400, body: `{"errors":[{"code":"MANIFEST_INVALID","message":"no foreign layers here"}]}`, permanent: true, tries: 1},
		{code: 413, permanent: true, tries: 1},
		{code: 400, body: `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown"}]}`, tries: 1},
		{code: 409, tries: 1},
		{code: 500, tries: 4},
		{code: 404, body: strings.Repeat("<html>", 100_000), want: accel.ErrNotFound, tries: 1},
		{code: 502, tries: 4},
		{code: 503, tries: 4},
		{code: 429, tries: 4},
	} {
		t.Run(fmt.Sprintf("%d %.30s", c.code, c.body), func(t *testing.T) {
			front := &faulty{next: newGGCR()}
			host := serve(t, front)
			client := newClient(t, host)
			img := newImage(t, 100, 1)
			front.set(on(http.MethodPut, "/manifests/", 0, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
				w.WriteHeader(c.code)
				w.Write([]byte(c.body))
				return true
			}))
			err := client.PushImage(context.Background(), host+"/app", img)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || accel.IsPermanent(err) != c.permanent {
				t.Errorf("got %v (permanent: %v), want %v (%v)", err, accel.IsPermanent(err), c.want, c.permanent)
			}
			if n := len(front.requests("PUT /v2/app/manifests/")); n != c.tries {
				t.Errorf("sent %d times, want %d", n, c.tries)
			}
			if strings.Contains(c.body, "foreign") && !strings.Contains(err.Error(), "no foreign layers here") {
				t.Errorf("the registry's own words are lost: %v", err)
			}
		})
	}
}

// TestNotFoundIsTheRegistrysWord: a proxy without a backend answers 404 too, and
// that must not pass for an image that was removed.
func TestNotFoundIsTheRegistrysWord(t *testing.T) {
	ctx := context.Background()
	front, host, img := fronted(t, newGGCR())
	c := newClient(t, host)
	if _, err := c.Head(ctx, host+"/app", "v1"); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	front.set(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		http.NotFound(w, r)
		return true
	})
	d := digestOf(t, img)
	for name, call := range map[string]func(c *registry.Client) error{
		"Head":      func(c *registry.Client) error { _, err := c.Head(ctx, host+"/app", d.String()); return err },
		"Pull":      func(c *registry.Client) error { _, err := c.Pull(ctx, host+"/app", d); return err },
		"Verify":    func(c *registry.Client) error { return c.Verify(ctx, host+"/app", d, false) },
		"Referrers": func(c *registry.Client) error { _, err := c.Referrers(ctx, host+"/app", d, ""); return err },
	} {
		// Once where the session is there already, once where it is to be opened.
		for _, client := range []*registry.Client{c, newClient(t, host)} {
			if err := call(client); err == nil || errors.Is(err, accel.ErrNotFound) || accel.IsPermanent(err) {
				t.Errorf("%s: got %v", name, err)
			}
		}
	}
}

func TestRetryAfter(t *testing.T) {
	ctx := context.Background()
	front := &faulty{next: newGGCR()}
	host := serve(t, front)
	c := newClient(t, host)
	img := newImage(t, 100, 1)
	if err := c.PushImage(ctx, host+"/app", img); err != nil {
		t.Fatal(err)
	}
	// Longer than a call may wait: handed on at once.
	front.set(on(http.MethodHead, "/manifests/", 0, status(429, "Retry-After", "60")))
	_, err := c.Head(ctx, host+"/app", digestOf(t, img).String())
	if got := accel.RetryAfter(err); got != time.Minute || len(front.requests("HEAD")) != 1 {
		t.Errorf("Retry-After %v after %d requests (%v), want 1m0s after 1", got, len(front.requests("HEAD")), err)
	}
	front.set(on(http.MethodHead, "/manifests/", 0, status(503, "Retry-After", time.Now().Add(30*time.Minute).UTC().Format(http.TimeFormat))))
	_, err = c.Head(ctx, host+"/app", digestOf(t, img).String())
	if got := accel.RetryAfter(err); got < 20*time.Minute || got > 30*time.Minute {
		t.Errorf("Retry-After as a date: %v (%v), want about 30m", got, err)
	}
	// Short enough: waited for, and surfaced when the attempts are used up.
	front.set(on(http.MethodHead, "/manifests/", 1, status(429, "Retry-After", "1")))
	if _, err := c.Head(ctx, host+"/app", digestOf(t, img).String()); err != nil {
		t.Error(err)
	}
	once := newClient(t, host, func(o *registry.Options) { o.Attempts = 1 })
	front.set(on(http.MethodHead, "/manifests/", 0, status(429, "Retry-After", "1")))
	if _, err := once.Head(ctx, host+"/app", digestOf(t, img).String()); accel.RetryAfter(err) != time.Second {
		t.Errorf("Retry-After %v of %v, want 1s", accel.RetryAfter(err), err)
	}
}

func TestHostileManifests(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		body      []byte
		mediaType types.MediaType
	}{
		"too large":           {body: bytes.Repeat([]byte(" "), registry.MaxManifestBytes+1), mediaType: types.OCIManifestSchema1},
		"no JSON":             {body: []byte("<html>"), mediaType: types.OCIManifestSchema1},
		"two kinds at once":   {body: []byte(`{"layers":[],"manifests":[]}`), mediaType: types.OCIImageIndex},
		"kinds that disagree": {body: []byte(`{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`), mediaType: types.OCIManifestSchema1},
		"negative size":       {body: []byte(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"x","size":-1,"digest":"sha256:` + strings.Repeat("a", 64) + `"},"layers":[]}`), mediaType: types.OCIManifestSchema1},
		"bad digest inside":   {body: []byte(`{"layers":[{"digest":"sha256:../../etc"}]}`), mediaType: types.OCIManifestSchema1},
	} {
		t.Run(name, func(t *testing.T) {
			host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", string(c.mediaType))
				w.Write(c.body)
			}))
			_, err := newClient(t, host).Pull(ctx, host+"/app", digest.FromBytes(c.body))
			if !errors.Is(err, accel.ErrInvalid) || !accel.IsPermanent(err) {
				t.Errorf("got %v, want a permanent ErrInvalid", err)
			}
		})
	}
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		w.Header().Set("Docker-Content-Digest", digest.FromString("other").String())
		w.Write([]byte(`{"manifests":[]}`))
	}))
	c := newClient(t, host)
	asked := digest.FromString("asked").String()
	if _, err := c.Head(ctx, host+"/app", asked); err == nil {
		t.Error("Head accepts the digest of another manifest")
	}
	if _, err := c.Pull(ctx, host+"/app", digest.Digest(asked)); err == nil || accel.IsPermanent(err) {
		t.Errorf("Pull of another manifest's bytes: %v", err)
	}
}

func TestNamesAreChecked(t *testing.T) {
	ctx := context.Background()
	host := serve(t, http.NotFoundHandler())
	c := newClient(t, host)
	for _, s := range []string{"", host, host + "/", host + "/../x", host + "/UPPER", host + "/a b", host + "/a?x=y", host + "/a//b"} {
		if _, err := c.Tags(ctx, s); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("repository %q: %v, want ErrInvalid", s, err)
		}
	}
	for _, s := range []string{"", "a/b", "../x", "sha256:abc", "a b", "sha512:" + strings.Repeat("0", 128)} {
		if _, err := c.Head(ctx, host+"/app", s); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("tag or digest %q: %v, want ErrInvalid", s, err)
		}
	}
	if _, err := c.Tags(ctx, "evil.example/app"); !errors.Is(err, accel.ErrRegistryNotAllowed) {
		t.Errorf("got %v, want ErrRegistryNotAllowed", err)
	}
}

func TestListsFollowPages(t *testing.T) {
	ctx := context.Background()
	var endless atomic.Bool
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		last := r.URL.Query().Get("last")
		switch {
		case r.URL.Path == "/v2/":
		case endless.Load():
			w.Header().Set("Link", fmt.Sprintf(`<%s?%s>; rel="next"`, r.URL.Path, r.URL.RawQuery))
			w.Write([]byte(`{"tags":["x"]}`))
		case last == "":
			// The host in a link is not gone to.
			w.Header().Set("Link", fmt.Sprintf(`<http://evil.example%s?last=a&n=1>; rel="next"`, r.URL.Path))
			w.Write([]byte(`{"tags":["a"]}`))
		default:
			w.Write([]byte(`{"tags":["b"]}`))
		}
	}))
	c := newClient(t, host)
	if tags, err := c.Tags(ctx, host+"/app"); err != nil || !reflect.DeepEqual(tags, []string{"a", "b"}) {
		t.Errorf("got %v, %v", tags, err)
	}
	endless.Store(true)
	if _, err := c.Tags(ctx, host+"/app"); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a page that follows itself: %v, want ErrInvalid", err)
	}
}

// sameIndex reads all of two indexes and compares them.
func sameIndex(t *testing.T, got, want v1.ImageIndex) {
	t.Helper()
	m, err := want.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range m.Manifests {
		a, err := got.Image(d.Digest)
		if err != nil {
			t.Error(err)
			continue
		}
		b, err := want.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		configA, errA := a.RawConfigFile()
		configB, errB := b.RawConfigFile()
		if errA != nil || errB != nil || !bytes.Equal(configA, configB) {
			t.Errorf("config of %s differs: %v, %v", d.Digest, errA, errB)
		}
		for i, l := range layersOf(t, a) {
			other := layersOf(t, b)[i]
			if !bytes.Equal(mustContent(t, l), mustContent(t, other)) {
				t.Errorf("layer %d of %s differs", i, d.Digest)
			}
			diffA, errA := l.DiffID()
			diffB, errB := other.DiffID()
			if errA != nil || errB != nil || diffA != diffB {
				t.Errorf("diffID of layer %d of %s: %s, %v, want %s, %v", i, d.Digest, diffA, errA, diffB, errB)
			}
			if _, err := a.LayerByDiffID(diffB); err != nil {
				t.Error(err)
			}
		}
	}
}
