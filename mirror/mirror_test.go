package mirror_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/cache"
	"accel/mirror"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// TestPull: a second pull asks the registry nothing, and each request is told once.
func TestPull(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 3<<20, 100_000, 1)
	d := up.push(t, "public/app", index(t, img, image(t, 10)), "v1")
	n := newNode(t, up)
	if err := n.pull("public/app", "v1"); err != nil {
		t.Fatal(err)
	}
	first := n.seen()
	up.set(nil)
	if err := n.pull("public/app", "v1"); err != nil {
		t.Fatal(err)
	}
	if again := up.requests(""); len(again) > 0 {
		t.Errorf("a second pull asked %q", again)
	}
	second := n.seen()[len(first):]
	// HEAD of the tag, index, manifest, config, three layers.
	if len(first) != 7 || len(second) != 7 {
		t.Fatalf("%d and %d transfers", len(first), len(second))
	}
	if x := first[0]; x.Tag != "v1" || x.Digest != d || x.Repository != up.host+"/public/app" || x.Manifest == nil || len(x.Manifest.Manifests) != 2 || !x.Complete || x.Client == "" {
		t.Errorf("first transfer %+v", x)
	}
	var cold, warm accel.Tally
	var layers []accel.BlobDescriptor
	for i := range first {
		if !first[i].Complete || first[i].Err != nil || !second[i].Complete {
			t.Errorf("transfers %+v, %+v", first[i], second[i])
		}
		cold.Add(first[i].Tally)
		warm.Add(second[i].Tally)
		if first[i].Manifest != nil {
			layers = append(layers, first[i].Manifest.Layers...)
		}
	}
	var want int64 = 3<<20 + 100_000 + 1
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	want += int64(len(config))
	if cold != (accel.Tally{RegistryBytes: want}) || warm != (accel.Tally{CacheBytes: want}) {
		t.Errorf("cold %+v, warm %+v, want %d bytes", cold, warm, want)
	}
	if len(layers) != 3 || layers[0].SizeBytes != 3<<20 {
		t.Errorf("layers %+v", layers)
	}
}

// TestConcurrentPulls: what is pulled many times at once is brought once.
func TestConcurrentPulls(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 4<<20, 1<<20, 100_000)
	up.push(t, "public/app", img, "v1")
	n := newNode(t, up)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := n.pull("public/app", "v1"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	up.mu.Lock()
	defer up.mu.Unlock()
	var sent int64
	for _, b := range up.blobBytes {
		sent += b
	}
	if want := int64(5<<20 + 100_000 + len(config)); sent != want {
		t.Errorf("the registry sent %d bytes of an image of %d", sent, want)
	}
	var told accel.Tally
	for _, x := range n.seen() {
		told.Add(x.Tally)
	}
	if told.RegistryBytes != sent {
		t.Errorf("the meter was told of %d bytes from the registry, it sent %d", told.RegistryBytes, sent)
	}
}

// TestOffline: what is complete is served without the registry, to who was let in
// lately.
func TestOffline(t *testing.T) {
	for name, down := range map[string]func(*upstream){
		"no connection": func(up *upstream) { up.srv.Close() },
		"503":           func(up *upstream) { up.set(status(503)) },
		"429":           func(up *upstream) { up.set(status(429, "Retry-After", "100")) },
		"hangs": func(up *upstream) {
			up.set(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				<-r.Context().Done()
				return true
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up := newUpstream(t)
			img := image(t, 1<<20, 10)
			up.push(t, "public/app", index(t, img), "v1")
			up.push(t, "public/app", image(t, 20), "other")
			up.push(t, "alice/app", image(t, 20), "v1")
			n := newNode(t, up, func(o *mirror.Options) { o.Patience = 300 * time.Millisecond },
				func(o *registry.Options) {
					if name == "hangs" {
						o.StallTimeout, o.Attempts = time.Second, 2
					}
				})
			alice := up.bearer(t, "alice")
			if err := errors.Join(n.pull("public/app", "v1"), n.pull("alice/app", "v1", "Authorization", alice)); err != nil {
				t.Fatal(err)
			}
			down(up)
			n.wait(time.Hour)
			if err := n.pull("public/app", "v1"); err != nil {
				t.Errorf("an image that is here: %v", err)
			}
			if err := n.pull("alice/app", "v1", "Authorization", alice); err != nil {
				t.Errorf("a client's own image that is here: %v", err)
			}
			r := n.get("public/app/manifests/v1")
			if w := r.header.Get("Warning"); r.status != 200 || !strings.HasPrefix(w, `299 - "`+up.host+` could not be asked`) {
				t.Errorf("%d, warning %q", r.status, w)
			}
			seen := n.seen()
			if x := seen[len(seen)-1]; !strings.Contains(x.Note, "without asking") || !x.Complete {
				t.Errorf("transfer %+v", x)
			}
			for _, path := range []string{"public/app/manifests/other", "public/nothing/manifests/v1", "public/app/tags/list"} {
				if r := n.get(path); r.status < 429 || r.status == 500 || !bytes.Contains(r.body, []byte(`"errors"`)) {
					t.Errorf("%s: %d %s", path, r.status, r.body)
				}
			}
			// Nobody can say whether bob may have it.
			if r := n.get("alice/app/manifests/v1", "Authorization", up.bearer(t, "bob")); r.status < 429 {
				t.Errorf("bob, unknown here, got %d", r.status)
			}
			n.wait(30 * time.Hour)
			if r := n.get("public/app/manifests/v1"); r.status < 429 {
				t.Errorf("after the grace: %d", r.status)
			}
		})
	}
}

// TestRestart: what a client was allowed outlives the process, with the same key alone.
func TestRestart(t *testing.T) {
	up := newUpstream(t)
	up.push(t, "alice/app", image(t, 1<<20), "v1")
	dir, key := t.TempDir(), func(b byte) func(*mirror.Options) {
		return func(o *mirror.Options) { o.Key = bytes.Repeat([]byte{b}, 32) }
	}
	kept := func(o *cache.Options) { o.Dir = dir }
	alice := up.bearer(t, "alice")
	first := newNode(t, up, kept, key(1))
	if err := first.pull("alice/app", "v1", "Authorization", alice); err != nil {
		t.Fatal(err)
	}
	first.stop()
	up.srv.Close()
	second := newNode(t, up, kept, key(1))
	if err := second.pull("alice/app", "v1", "Authorization", alice); err != nil {
		t.Errorf("after a restart, without the registry: %v", err)
	}
	second.stop()
	third := newNode(t, up, kept, key(2))
	if r := third.get("alice/app/manifests/v1", "Authorization", alice); r.status != 503 {
		t.Errorf("with another key: %d", r.status)
	}
}

func TestPing(t *testing.T) {
	up := newUpstream(t)
	realm := up.challenge()
	bare, rich := newNode(t, up), newNode(t, up, own("alice"))
	def := newNode(t, up, func(o *mirror.Options) { o.Default = up.host })
	for name, c := range map[string]struct {
		n         *node
		path      string
		headers   []string
		status    int
		challenge string
	}{
		"no registry":               {n: bare, path: "/v2/", status: 200},
		"registry":                  {n: bare, path: "/v2/?ns=" + up.host, status: 401, challenge: realm},
		"default registry":          {n: def, path: "/v2/", status: 401, challenge: realm},
		"with a token":              {n: def, path: "/v2/", headers: []string{"Authorization", up.bearer(t, "bob")}, status: 200},
		"with a bad token":          {n: def, path: "/v2/", headers: []string{"Authorization", "Bearer x"}, status: 401, challenge: realm},
		"own credentials":           {n: rich, path: "/v2/?ns=" + up.host, status: 200},
		"registry that is unlisted": {n: bare, path: "/v2/?ns=evil.example", status: 403},
	} {
		r := c.n.ask(http.MethodGet, c.path, c.headers...)
		if r.status != c.status || r.header.Get("WWW-Authenticate") != c.challenge || r.header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
			t.Errorf("%s: %d, %q", name, r.status, r.header.Get("WWW-Authenticate"))
		}
	}
	up.srv.Close()
	if r := bare.ask(http.MethodGet, "/v2/?ns="+up.host); r.status != 200 {
		t.Errorf("registry away: %d", r.status)
	}
}

// TestTags: a tag is looked at when it is old, and follows upstream.
func TestTags(t *testing.T) {
	up := newUpstream(t)
	one, two := up.push(t, "public/app", image(t, 10), "v"), up.push(t, "public/app", image(t, 20))
	n := newNode(t, up)
	at := func() string { return n.get("public/app/manifests/v").header.Get("Docker-Content-Digest") }
	if got := at(); got != one.String() {
		t.Errorf("at first %s", got)
	}
	if err := up.client(t).Tag(context.Background(), up.host+"/public/app", "v", two); err != nil {
		t.Fatal(err)
	}
	if got := at(); got != one.String() {
		t.Errorf("within the TTL %s", got)
	}
	n.wait(2 * time.Minute)
	if got := at(); got != two.String() {
		t.Errorf("after the TTL %s", got)
	}
	n.wait(2 * time.Minute)
	up.set(nil)
	if got, asked := at(), up.requests(""); got != two.String() || len(asked) != 1 || !strings.HasPrefix(asked[0], "HEAD") {
		t.Errorf("unchanged: %s, asked %q", got, asked)
	}
	n.wait(2 * time.Minute)
	up.set(on("", "/manifests/v", 0, status(404)))
	if r := n.get("public/app/manifests/v"); r.status != 404 || !bytes.Contains(r.body, []byte("MANIFEST_UNKNOWN")) {
		t.Errorf("a tag that is gone: %d %s", r.status, r.body)
	}
	up.srv.Close()
	if r := n.get("public/app/manifests/v"); r.status == 200 {
		t.Error("a tag that was gone is back")
	}
}

func TestRanges(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 3<<20+17)
	up.push(t, "public/app", img, "v1")
	d, content := layer(t, img, 0)
	path := "public/app/blobs/" + d.String()
	size := len(content)
	for _, state := range []string{"cold", "complete"} {
		n := newNode(t, up)
		if state == "complete" {
			if err := n.pull("public/app", "v1"); err != nil {
				t.Fatal(err)
			}
		}
		for header, want := range map[string][2]int{
			"bytes=0-99":                       {0, 100},
			"bytes=2000000-2000999":            {2_000_000, 2_001_000},
			"bytes=-100":                       {size - 100, size},
			fmt.Sprintf("bytes=%d-", size-1):   {size - 1, size},
			fmt.Sprintf("bytes=0-%d", 10*size): {0, size},
		} {
			r := n.get(path, "Range", header)
			place := fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, size)
			if r.status != 206 || r.err != nil || !bytes.Equal(r.body, content[want[0]:want[1]]) || r.header.Get("Content-Range") != place {
				t.Errorf("%s: %s: %d, %d bytes, %q, %v", state, header, r.status, len(r.body), r.header.Get("Content-Range"), r.err)
			}
		}
		r := n.get(path, "Range", "bytes=5-9, 3000000-3000099,-1")
		mediaType, params, err := mime.ParseMediaType(r.header.Get("Content-Type"))
		if r.status != 206 || err != nil || mediaType != "multipart/byteranges" || r.err != nil {
			t.Fatalf("%s: several ranges: %d %q, %v", state, r.status, mediaType, r.err)
		}
		parts := multipart.NewReader(bytes.NewReader(r.body), params["boundary"])
		for _, want := range [][2]int{{5, 10}, {3_000_000, 3_000_100}, {size - 1, size}} {
			p, err := parts.NextPart()
			if err != nil {
				t.Fatalf("%s: %v", state, err)
			}
			got, err := io.ReadAll(p)
			if place := fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, size); err != nil || !bytes.Equal(got, content[want[0]:want[1]]) || p.Header.Get("Content-Range") != place {
				t.Errorf("%s: part %q: %d bytes, %v", state, p.Header.Get("Content-Range"), len(got), err)
			}
		}
		if r := n.get(path, "Range", fmt.Sprintf("bytes=%d-", size)); r.status != 416 || r.header.Get("Content-Range") != fmt.Sprintf("bytes */%d", size) || !bytes.Contains(r.body, []byte("RANGE_INVALID")) {
			t.Errorf("%s: outside: %d %q", state, r.status, r.header.Get("Content-Range"))
		}
		etag := `"` + d.String() + `"`
		for name, c := range map[string]struct {
			headers []string
			status  int
			bytes   int
		}{
			"If-Range that holds":       {[]string{"Range", "bytes=0-9", "If-Range", etag}, 206, 10},
			"If-Range of other content": {[]string{"Range", "bytes=0-9", "If-Range", `"other"`}, 200, size},
			"malformed":                 {[]string{"Range", "bytes=x"}, 200, size},
			"more than all":             {[]string{"Range", "bytes=0-,0-"}, 200, size},
			"If-None-Match":             {[]string{"If-None-Match", `"other", W/` + etag}, 304, 0},
			"If-None-Match and Range":   {[]string{"If-None-Match", etag, "Range", "bytes=0-9"}, 304, 0},
			"If-None-Match of another":  {[]string{"If-None-Match", `"other"`}, 200, size},
		} {
			if r := n.get(path, c.headers...); r.status != c.status || len(r.body) != c.bytes || r.header.Get("ETag") != etag || r.err != nil {
				t.Errorf("%s: %s: %d, %d bytes, etag %s, %v", state, name, r.status, len(r.body), r.header.Get("ETag"), r.err)
			}
		}
		if r := n.ask(http.MethodHead, "/v2/"+path+"?ns="+up.host, "Range", "bytes=0-9"); r.status != 200 || r.header.Get("Content-Length") != fmt.Sprint(size) || r.header.Get("Accept-Ranges") != "bytes" {
			t.Errorf("%s: HEAD: %d %v", state, r.status, r.header)
		}
	}
	n := newNode(t, up)
	first := n.get("public/app/manifests/v1")
	if r := n.get("public/app/manifests/v1", "If-None-Match", first.header.Get("ETag")); r.status != 304 || len(r.body) > 0 || r.header.Get("Docker-Content-Digest") == "" {
		t.Errorf("a manifest that is known: %d", r.status)
	}
}

// TestRefuses what is no pull, in the spec's form.
func TestRefuses(t *testing.T) {
	up := newUpstream(t)
	n := newNode(t, up)
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions, "TRACE"} {
		r := n.ask(method, "/v2/public/app/manifests/v1?ns="+up.host)
		if r.status != 405 || r.header.Get("Allow") != "GET, HEAD" || !bytes.Contains(r.body, []byte(`"code":"UNSUPPORTED"`)) {
			t.Errorf("%s: %d %s", method, r.status, r.body)
		}
	}
	d := digest.FromString("x").String()
	for path, want := range map[string]int{
		"/v2/public/app/blobs/" + d + "?ns=evil.example":            403,
		"/v2/public/app/blobs/" + d + "?ns=169.254.169.254":         403,
		"/v2/public/../alice/app/blobs/" + d + "?ns=" + up.host:     400,
		"/v2/public/%2e%2e/alice/app/blobs/" + d + "?ns=" + up.host: 400,
		"/v2/public/app/blobs/sha256:..%2f..%2fx?ns=" + up.host:     400,
		"/v2/public/app/blobs/" + d:                                 400,
		"/v2/public/app/blobs/" + d + "?ns=" + up.host:              404,
		"/v2/public/app/manifests/" + d + "?ns=" + up.host:          404,
		"/v2/" + up.host + "/public/app/manifests/nothing":          404,
		"/": 404,
	} {
		r := n.ask(http.MethodGet, path)
		var body struct {
			Errors []struct{ Code, Message string }
		}
		if err := json.Unmarshal(r.body, &body); r.status != want || err != nil || len(body.Errors) != 1 || body.Errors[0].Code == "" {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
	}
	if _, err := mirror.New(mirror.Options{}); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("New without anything: %v", err)
	}
	for name, o := range map[string]mirror.Options{
		"short key":        {Store: n.store, Registry: up.client(t), Key: []byte("short")},
		"negative pause":   {Store: n.store, Registry: up.client(t), Pause: -1},
		"unlisted default": {Store: n.store, Registry: up.client(t), Default: "evil.example"},
	} {
		if _, err := mirror.New(o); err == nil {
			t.Errorf("New with %s succeeds", name)
		}
	}
}

// TestListings are the registry's own, by way of the mirror.
func TestListings(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 10)
	d := up.push(t, "public/app", img, "a", "b", "c")
	c := up.client(t)
	desc, err := c.Head(context.Background(), up.host+"/public/app", d.String())
	if err != nil {
		t.Fatal(err)
	}
	attached, err := c.Attach(context.Background(), up.host+"/public/app", desc, "application/x.test", map[string]string{"k": "v"})
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t, up)
	var all []string
	for path, pages := "/v2/public/app/tags/list?n=2&ns="+up.host, 0; path != ""; pages++ {
		r := n.ask(http.MethodGet, path)
		var body struct{ Tags []string }
		if err := json.Unmarshal(r.body, &body); r.status != 200 || err != nil || pages > 5 {
			t.Fatalf("%s: %d %s", path, r.status, r.body)
		}
		all = append(all, body.Tags...)
		link, _, _ := strings.Cut(strings.TrimPrefix(r.header.Get("Link"), "<"), ">")
		path = link
	}
	if got := strings.Join(all, " "); !strings.HasPrefix(got, "a b c") {
		t.Errorf("tags %s", got)
	}
	for query, want := range map[string]string{"": attached.String(), "&artifactType=application/x.test": attached.String(), "&artifactType=other": ""} {
		r := n.ask(http.MethodGet, "/v2/public/app/referrers/"+d.String()+"?ns="+up.host+query)
		var body struct {
			MediaType string
			Manifests []struct{ Digest, ArtifactType string }
		}
		if err := json.Unmarshal(r.body, &body); r.status != 200 || err != nil || r.header.Get("Content-Type") != "application/vnd.oci.image.index.v1+json" || (r.header.Get("OCI-Filters-Applied") != "") != (query != "") {
			t.Errorf("%q: %d %s %v", query, r.status, r.body, r.header)
		}
		got := ""
		for _, m := range body.Manifests {
			got += m.Digest
		}
		if got != want {
			t.Errorf("%q: %q, want %q", query, got, want)
		}
	}
	if r := n.get("public/app/tags/list", "X", ""); r.status != 200 {
		t.Errorf("all tags: %d", r.status)
	}
	if r := n.ask(http.MethodGet, "/v2/public/app/tags/list?n=x&ns="+up.host); r.status != 400 {
		t.Errorf("n=x: %d", r.status)
	}
	if r := n.get("alice/app/tags/list"); r.status != 401 {
		t.Errorf("another's tags: %d", r.status)
	}
}
