package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/mirror"

	"github.com/opencontainers/go-digest"
)

// TestAccess: what one client may have is not another's.
func TestAccess(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 100_000)
	d := up.push(t, "alice/app", img, "v1")
	secret, content := layer(t, img, 0)
	shared := image(t, 1000)
	common, _ := layer(t, shared, 0)
	up.push(t, "alice/app", shared)
	up.push(t, "bob/app", shared)
	n := newNode(t, up)
	alice, bob := up.bearer(t, "alice"), up.bearer(t, "bob")

	r := n.get("alice/app/manifests/v1")
	if c := r.header.Get("WWW-Authenticate"); r.status != 401 || c != up.challenge()+`,scope="repository:alice/app:pull"` {
		t.Errorf("without credentials: %d, challenge %q", r.status, c)
	}
	if len(n.seen()) > 0 {
		t.Errorf("a question was told to the meter: %+v", n.seen())
	}
	if err := n.pull("alice/app", "v1", "Authorization", alice); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"manifests/v1", "manifests/" + d.String(), "blobs/" + secret.String()} {
		for who, headers := range map[string][]string{"bob": {"Authorization", bob}, "nobody": nil, "a forger": {"Authorization", "Bearer x"}} {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				if r := n.ask(method, "/v2/alice/app/"+path+"?ns="+up.host, headers...); r.status != 401 || bytes.Contains(r.body, content[:100]) {
					t.Errorf("%s %s as %s: %d", method, path, who, r.status)
				}
			}
		}
		// Not by way of a repository that bob may read, either.
		for _, extra := range [][]string{nil, {"Range", "bytes=0-9"}, {"Range", "bytes=999999-"}, {"If-None-Match", `"` + secret.String() + `"`}} {
			if strings.HasPrefix(path, "manifests/v1") {
				continue
			}
			if r := n.get("bob/app/"+path, append(extra, "Authorization", bob)...); r.status != 404 {
				t.Errorf("bob/app/%s %q: %d", path, extra, r.status)
			}
		}
	}
	// What both repositories hold is brought once.
	for _, c := range []struct{ who, token string }{{"alice", alice}, {"bob", bob}} {
		if r := n.get(c.who+"/app/blobs/"+common.String(), "Authorization", c.token); r.status != 200 || digest.FromBytes(r.body) != common {
			t.Errorf("%s: %d", c.who, r.status)
		}
	}
	up.mu.Lock()
	if got := up.blobBytes["/v2/alice/app/blobs/"+common.String()] + up.blobBytes["/v2/bob/app/blobs/"+common.String()]; got != 1000 {
		t.Errorf("a common layer of 1000 bytes took %d", got)
	}
	up.mu.Unlock()

	// Within the grant nothing is asked; after it, the registry's word counts at once.
	up.set(status(401, "WWW-Authenticate", `Bearer realm="x"`))
	if err := n.pull("alice/app", d.String(), "Authorization", alice); err != nil {
		t.Errorf("within the grant: %v", err)
	}
	if asked := up.requests(""); len(asked) > 0 {
		t.Errorf("within the grant: asked %q", asked)
	}
	n.wait(10 * time.Minute)
	if r := n.get("alice/app/manifests/"+d.String(), "Authorization", alice); r.status != 401 {
		t.Errorf("a token that was taken back: %d", r.status)
	}
	up.set(status(503))
	if r := n.get("alice/app/manifests/"+d.String(), "Authorization", alice); r.status != 503 {
		t.Errorf("a refusal is forgotten when the registry goes away: %d", r.status)
	}
}

// TestOwnCredentials open for every client what they open for the node.
func TestOwnCredentials(t *testing.T) {
	up := newUpstream(t)
	up.push(t, "alice/app", image(t, 1000), "v1")
	n := newNode(t, up, own("alice"))
	if err := n.pull("alice/app", "v1"); err != nil {
		t.Error(err)
	}
	if r := n.get("bob/app/manifests/v1"); r.status != 401 || r.header.Get("WWW-Authenticate") == "" {
		t.Errorf("what they do not open: %d %v", r.status, r.header)
	}
	up.set(nil)
	if r := n.get("bob/app/manifests/v2"); r.status != 401 || len(up.requests("")) > 0 {
		t.Errorf("asked again at once: %d, %q", r.status, up.requests(""))
	}
	n.wait(time.Minute)
	if n.get("bob/app/manifests/v2"); len(up.requests("")) == 0 {
		t.Error("a refusal is kept for ever")
	}
}

// TestClientThatTakesNothing loses its connection, and the store its reader.
func TestClientThatTakesNothing(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 16<<20)
	up.push(t, "public/app", img, "v1")
	d, _ := layer(t, img, 0)
	n := newNode(t, up, func(o *mirror.Options) { o.ClientPatience = 2 * time.Second })
	if err := n.pull("public/app", "v1"); err != nil {
		t.Fatal(err)
	}
	before := len(n.seen())
	conn, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", strings.TrimPrefix(n.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /v2/public/app/blobs/%s?ns=%s HTTP/1.1\r\nHost: x\r\n\r\n", d, up.host)
	for len(n.seen()) == before {
		time.Sleep(time.Millisecond)
	}
	if x := n.seen()[before]; x.Complete || x.Err != nil {
		t.Errorf("transfer %+v", x)
	}
	if e, err := n.store.Stat(d); err != nil || e.Readers > 0 {
		t.Errorf("entry %+v, %v", e, err)
	}
	if err := n.pull("public/app", "v1"); err != nil {
		t.Errorf("others: %v", err)
	}
}

// TestClientThatHangsUp does not end the fill for others.
func TestClientThatHangsUp(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 4<<20)
	up.push(t, "public/app", img, "v1")
	d, content := layer(t, img, 0)
	n := newNode(t, up)
	n.get("public/app/manifests/v1")
	begun, goOn := make(chan struct{}), make(chan struct{})
	up.set(on(http.MethodGet, "/blobs/", 1, func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Write(content[:1<<20])
		w.(http.Flusher).Flush()
		close(begun)
		<-goOn
		w.Write(content[1<<20:])
		return true
	}))
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.url+"/v2/public/app/blobs/"+d.String()+"?ns="+up.host, nil)
	if err != nil {
		t.Fatal(err)
	}
	left := make(chan struct{})
	go func() {
		defer close(left)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}()
	<-begun
	other := make(chan reply, 1)
	go func() { other <- n.get("public/app/blobs/" + d.String()) }()
	cancel()
	<-left
	close(goOn)
	if r := <-other; r.err != nil || !bytes.Equal(r.body, content) {
		t.Errorf("the other client got %d, %d bytes, %v", r.status, len(r.body), r.err)
	}
	if got := up.requests("GET /v2/public/app/blobs/"); len(got) != 1 {
		t.Errorf("fetched by %q", got)
	}
	if _, err := n.store.Stat(d); errors.Is(err, accel.ErrNotFound) {
		t.Error("nothing is kept")
	}
}

// TestPlatformSaysWhomItIsFor by headers.
func TestPlatformSaysWhomItIsFor(t *testing.T) {
	up := newUpstream(t)
	up.push(t, "public/app", image(t, 10), "v1")
	n := newNode(t, up)
	n.get("public/app/manifests/v1", mirror.TenantHeader, "team-a", mirror.MemoryHeader, "1073741824")
	n.get("public/app/manifests/v1", mirror.TenantHeader, "a\tb", mirror.MemoryHeader, "-1")
	seen := n.seen()
	if x := seen[0]; x.Tenant != "team-a" || x.MemoryBytes != 1<<30 {
		t.Errorf("%+v", x)
	}
	if x := seen[1]; x.Tenant != "" || x.MemoryBytes != 0 {
		t.Errorf("malformed: %+v", x)
	}
	n.get("public/app/manifests/v1", "Authorization", up.bearer(t, "bob"))
	seen = n.seen()
	if seen[2].Client == seen[0].Client || strings.Contains(seen[2].Client, "token") {
		t.Errorf("clients %q and %q", seen[0].Client, seen[2].Client)
	}
}
