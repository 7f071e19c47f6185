package registry_test

import (
	"context"
	"net/http"
	"testing"

	"accel/registry"

	"github.com/google/go-containerregistry/pkg/authn"
)

// TestReadsAreNotAskedForTwice: an open registry is read from without a question before, also by a client that has
// credentials for others, and one that wants a token is asked how it wants that once for all repositories.
func TestReadsAreNotAskedForTwice(t *testing.T) {
	ctx := context.Background()
	pings := func(front *faulty) int { return len(front.requests("GET /v2/")) - len(front.requests("GET /v2/a")) }
	t.Run("open", func(t *testing.T) {
		front, host, img := fronted(t, newGGCR())
		d := digestOf(t, img)
		front.set(nil)
		c := newClient(t, host, func(o *registry.Options) { o.Hosts[0].Username, o.Hosts[0].Password = "", "" })
		for range 2 {
			if _, err := c.Pull(ctx, host+"/app", d); err != nil {
				t.Fatal(err)
			}
		}
		if n := pings(front); n > 0 {
			t.Errorf("%d questions before open content: %q", n, front.requests(""))
		}
	})
	t.Run("tokens", func(t *testing.T) {
		guard := &tokens{next: newGGCR()}
		front := &faulty{next: guard}
		host := serve(t, front)
		img := newImage(t, 100, 1)
		for _, repository := range []string{"/app", "/another"} {
			if err := newClient(t, host).PushImage(ctx, host+repository, img); err != nil {
				t.Fatal(err)
			}
		}
		front.set(nil)
		c := newClient(t, host)
		for _, repository := range []string{"/app", "/another"} {
			if _, err := c.Pull(ctx, host+repository, digestOf(t, img)); err != nil {
				t.Fatal(err)
			}
		}
		if n := pings(front); n != 1 {
			t.Errorf("asked %d times how to authenticate, want 1", n)
		}
		// Without credentials the refusal itself tells how, and nothing opens by it.
		without := newClient(t, host, func(o *registry.Options) {
			o.Hosts[0].Username, o.Hosts[0].Password, o.Keychain = "", "", authn.NewMultiKeychain()
		})
		front.set(nil)
		if _, err := without.Pull(ctx, host+"/app", digestOf(t, img)); err == nil {
			t.Error("content came without credentials")
		}
		if n := pings(front); n != 0 {
			t.Errorf("asked %d times how to authenticate, want 0", n)
		}
	})
}

// TestWarm makes connections that the next requests use.
func TestWarm(t *testing.T) {
	ctx := context.Background()
	front, host, img := fronted(t, newGGCR())
	c := newClient(t, host)
	s := source(t, c, host+"/app", "")
	s.Warm(ctx, 3)
	if got := front.requests("GET /v2/"); len(got) < 3 {
		t.Errorf("requests: %q", got)
	}
	front.set(status(http.StatusUnauthorized))
	s.Warm(ctx, 1000) // bounded, and never an error
	front.set(nil)
	if _, _, err := s.Manifest(ctx, digestOf(t, img).String()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
