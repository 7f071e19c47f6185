package mirror_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"accel/cache"
	"accel/mirror"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
)

// TestTokenServiceAway: what is open without a client's credentials is served without a token, whatever
// client comes; for the rest the answer says why not.
func TestTokenServiceAway(t *testing.T) {
	for how, away := range map[string]fault{
		"breaks off": func(http.ResponseWriter, *http.Request, http.Handler) bool { panic(http.ErrAbortHandler) },
		"503":        status(503),
		"hangs":      hangs,
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			up := newUpstream(t)
			up.push(t, "public/app", image(t, 1000), "v1")
			up.push(t, "alice/app", image(t, 1000), "v1")
			impatient := func(o *mirror.Options) { o.Patience, o.AnswerPatience = 200*time.Millisecond, 2*time.Second }
			byName := func(o *mirror.Options) { o.Default = up.host }
			n := newNode(t, up, impatient, byName)
			alice := up.bearer(t, "alice")
			if err := errors.Join(n.pull("public/app", "v1"), n.pull("alice/app", "v1", "Authorization", alice)); err != nil {
				t.Fatal(err)
			}
			up.breakTokens(away)
			n.wait(time.Hour)
			if err := n.pull("public/app", "v1"); err != nil {
				t.Errorf("without credentials: %v", err)
			}
			for _, user := range []string{"alice", ""} {
				if _, _, err := containerd(n, user).Resolve(context.Background(), up.host+"/public/app:v1"); err != nil {
					t.Errorf("containerd as %q: %v", user, err)
				}
				ref, err := name.ParseReference(strings.TrimPrefix(n.url, "http://")+"/public/app:v1", name.Insecure)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := remote.Image(ref, remote.WithAuth(authn.FromConfig(authn.AuthConfig{Username: user, Password: users[user]}))); err != nil {
					t.Errorf("crane as %q: %v", user, err)
				}
			}
			r := n.get("alice/app/manifests/v1")
			if r.status != 503 || !bytes.Contains(r.body, []byte("without a credential nobody was let in")) {
				t.Errorf("a client's own image, without its credential: %d %s", r.status, r.body)
			}
			if _, _, err := containerd(n, "alice").Resolve(context.Background(), up.host+"/alice/app:v1"); err == nil || !strings.Contains(err.Error(), "503") {
				t.Errorf("containerd with the credential: %v", err)
			}
			up.breakTokens(nil)
			n.wait(time.Minute)
			if _, _, err := containerd(n, "alice").Resolve(context.Background(), up.host+"/alice/app:v1"); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestWhoIsServedWhileTheRegistryIsAway: who was let in, by the credential, and who may come without one.
func TestWhoIsServedWhileTheRegistryIsAway(t *testing.T) {
	up := newUpstream(t)
	up.push(t, "public/app", image(t, 1000), "v1")
	up.push(t, "alice/app", image(t, 1000), "v1")
	up.push(t, "bob/app", image(t, 1000), "v1")
	n := newNode(t, up, own("bob"))
	alice, other := up.bearer(t, "alice"), up.bearer(t, "admin")
	if err := errors.Join(n.pull("public/app", "v1"), n.pull("bob/app", "v1"), n.pull("alice/app", "v1", "Authorization", alice)); err != nil {
		t.Fatal(err)
	}
	up.srv.Close()
	n.wait(time.Hour)
	for _, repository := range []string{"public/app", "bob/app"} {
		if err := errors.Join(n.pull(repository, "v1"), n.pull(repository, "v1", "Authorization", alice), n.pull(repository, "v1", "Authorization", "Basic eDp5")); err != nil {
			t.Errorf("%s: %v", repository, err)
		}
	}
	if err := n.pull("alice/app", "v1", "Authorization", alice); err != nil {
		t.Errorf("alice/app with a token that was let in: %v", err)
	}
	for _, path := range []string{"alice/app/manifests/v1", "alice/app/manifests/v2", "admin/app/manifests/v1"} {
		for _, headers := range [][]string{nil, {"Authorization", other}} {
			// The answer is the same whether it is here or not.
			if r := n.get(path, headers...); r.status != 503 || !bytes.Contains(r.body, []byte("whether this client may pull from "+up.host)) {
				t.Errorf("%s as %q: %d %s", path, headers, r.status, r.body)
			}
		}
	}
	n.wait(30 * time.Hour)
	if r := n.get("alice/app/manifests/v1", "Authorization", alice); r.status != 503 {
		t.Errorf("after the grace: %d", r.status)
	}
}

// TestReferrersAreKept as tags are: looked at after the TTL, and served to who is let in while the registry is away.
func TestReferrersAreKept(t *testing.T) {
	ctx := context.Background()
	up := newUpstream(t)
	d := up.push(t, "public/app", image(t, 10), "v1")
	up.push(t, "alice/app", image(t, 10), "v1")
	c := up.client(t)
	attach := func(artifactType string) string {
		t.Helper()
		desc, err := c.Head(ctx, up.host+"/public/app", d.String())
		if err != nil {
			t.Fatal(err)
		}
		attached, err := c.Attach(ctx, up.host+"/public/app", desc, artifactType, nil)
		if err != nil {
			t.Fatal(err)
		}
		return attached.String()
	}
	one := attach("application/x.one")
	dir := t.TempDir()
	kept := func(o *cache.Options) { o.Dir = dir }
	key := func(o *mirror.Options) { o.Key = bytes.Repeat([]byte{1}, 32) }
	n := newNode(t, up, kept, key)
	lists := func(artifactType string) string {
		t.Helper()
		r := n.ask(http.MethodGet, "/v2/public/app/referrers/"+d.String()+"?ns="+up.host+"&artifactType="+artifactType)
		var list struct{ Manifests []struct{ Digest string } }
		if err := json.Unmarshal(r.body, &list); err != nil || r.status != 200 {
			t.Errorf("%q: %d %s", artifactType, r.status, r.body)
		}
		got := ""
		for _, m := range list.Manifests {
			got += m.Digest
		}
		return got
	}
	if err := n.pull("public/app", "v1"); err != nil {
		t.Fatal(err)
	}
	want := func(when, artifactType, want string) {
		t.Helper()
		if got := lists(artifactType); got != want {
			t.Errorf("%s, of type %q: %q, want %q", when, artifactType, got, want)
		}
	}
	want("at first", "application/x.one", one)
	want("at first", "application/x.two", "")
	two := attach("application/x.two")
	up.set(nil)
	want("within the TTL", "application/x.two", "")
	want("within the TTL", "application/x.one", one)
	if asked := up.requests(""); len(asked) > 0 {
		t.Errorf("within the TTL: asked %q", asked)
	}
	n.wait(2 * time.Minute)
	want("after the TTL", "application/x.two", two)
	n.stop()
	up.srv.Close()
	n = newNode(t, up, kept, key)
	n.wait(time.Hour)
	want("with the registry away", "application/x.one", one)
	want("with the registry away", "application/x.two", two)
	path := "/v2/public/app/referrers/" + d.String() + "?ns=" + up.host
	r := n.ask(http.MethodGet, path+"&artifactType=application/x.two")
	if r.header.Get("Warning") == "" || r.header.Get("OCI-Filters-Applied") != "artifactType" {
		t.Errorf("headers %v", r.header)
	}
	if r := n.get("public/app/manifests/" + digest.FromBytes(r.body).String()); r.status < 400 {
		t.Errorf("the list is given out as a manifest of the repository: %d", r.status)
	}
	if r := n.ask(http.MethodGet, path); r.status < 400 {
		t.Errorf("a list that was never asked for: %d %s", r.status, r.body)
	}
	n.wait(30 * time.Hour)
	if r := n.ask(http.MethodGet, path+"&artifactType=application/x.one"); r.status != 503 {
		t.Errorf("after the grace: %d", r.status)
	}
}

// TestReferrersAreGuarded: a list is not given to who was not let in.
func TestReferrersAreGuarded(t *testing.T) {
	up := newUpstream(t)
	d := up.push(t, "alice/app", image(t, 10), "v1")
	n := newNode(t, up)
	alice := up.bearer(t, "alice")
	path := "alice/app/referrers/" + d.String()
	if err := n.pull("alice/app", "v1", "Authorization", alice); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		headers         []string
		online, offline int
	}{
		"alice":  {[]string{"Authorization", alice}, 200, 200},
		"bob":    {[]string{"Authorization", up.bearer(t, "bob")}, 401, 503},
		"nobody": {nil, 401, 503},
	} {
		if r := n.get(path, "Authorization", alice); r.status != 200 {
			t.Fatalf("alice: %d %s", r.status, r.body)
		}
		up.set(nil)
		if r := n.get(path, c.headers...); r.status != c.online {
			t.Errorf("%s: %d, want %d", name, r.status, c.online)
		}
		up.set(func(http.ResponseWriter, *http.Request, http.Handler) bool { panic(http.ErrAbortHandler) })
		n.wait(time.Hour)
		if r := n.get(path, c.headers...); r.status != c.offline {
			t.Errorf("%s, with the registry away: %d, want %d", name, r.status, c.offline)
		}
		up.set(nil)
		n.wait(time.Minute)
	}
}

// TestSilentRegistry: one that takes connections and says nothing is given up, although the
// registry client would be patient for ever.
func TestSilentRegistry(t *testing.T) {
	patient := func(o *registry.Options) { o.StallTimeout = time.Hour }
	impatient := func(answer time.Duration) func(o *mirror.Options) {
		return func(o *mirror.Options) { o.AnswerPatience, o.StallPatience = answer, 100*time.Millisecond }
	}
	t.Run("from the beginning", func(t *testing.T) {
		up := newUpstream(t)
		up.set(hangs)
		n := newNode(t, up, patient, impatient(100*time.Millisecond))
		none := "sha256:" + strings.Repeat("0", 64)
		for _, path := range []string{"manifests/v1", "manifests/" + none, "blobs/" + none, "tags/list", "referrers/" + none} {
			for _, headers := range [][]string{nil, {"Authorization", "Bearer x"}} {
				if r := n.get("public/app/"+path, headers...); r.status != 503 || !bytes.Contains(r.body, []byte("took too long")) {
					t.Errorf("%s %q: %d %s", path, headers, r.status, r.body)
				}
			}
		}
		if r := n.ask(http.MethodGet, "/v2/?ns="+up.host); r.status != 200 {
			t.Errorf("ping: %d", r.status)
		}
		if _, _, err := n.mirror.Warm(context.Background(), up.host+"/public/app:v1", "", nil); !registry.Unreachable(err) {
			t.Errorf("warm: %v", err)
		}
	})
	for name, c := range map[string]struct {
		silence fault
		status  int // 0: the answer breaks off
	}{
		"before a blob": {hangs, 504},
		"within a blob": {func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			w.Header().Set("Content-Length", "2097152")
			w.Write(make([]byte, 1<<20))
			w.(http.Flusher).Flush()
			return hangs(w, r, nil)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			up := newUpstream(t)
			img := image(t, 2<<20)
			up.push(t, "public/app", img, "v1")
			d, _ := layer(t, img, 0)
			n := newNode(t, up, patient, impatient(2*time.Second)) // the manifest is to come in that time
			if r := n.get("public/app/manifests/v1"); r.status != 200 {
				t.Fatalf("manifest: %d", r.status)
			}
			up.set(on(http.MethodGet, "/blobs/", 0, c.silence))
			if r := n.get("public/app/blobs/" + d.String()); c.status != 0 && r.status != c.status || c.status == 0 && r.err == nil {
				t.Errorf("%d, %d bytes, %v", r.status, len(r.body), r.err)
			}
		})
	}
}
