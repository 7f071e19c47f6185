package registry_test

import (
	"context"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"accel"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/authn"
)

func TestNewRefuses(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, hosts := range map[string][]registry.Host{
		"scheme in name":   {{Name: "https://registry.example"}},
		"no name":          {{}},
		"alias of another": {{Name: "a.example"}, {Name: "b.example", Aliases: []string{"a.example"}}},
		"twice":            {{Name: "a.example"}, {Name: "A.example:443"}},
		"two credentials":  {{Name: "a.example", Username: "u", Token: "t"}},
		"CA without TLS":   {{Name: "a.example", PlainHTTP: true, CAFile: empty}},
		"CA without certs": {{Name: "a.example", CAFile: empty}},
	} {
		if _, err := registry.New(registry.Options{Hosts: hosts}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
}

// TestNoFallBackToPlainHTTP: a loopback name alone is no leave to speak plainly.
func TestNoFallBackToPlainHTTP(t *testing.T) {
	var spoken atomic.Int64
	host := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { spoken.Add(1) }))
	c := newClient(t, host, func(o *registry.Options) { o.Hosts[0].PlainHTTP = false })
	_, err := c.Head(context.Background(), host+"/app", "v1")
	if err == nil || spoken.Load() > 0 || accel.IsPermanent(err) {
		t.Errorf("got %v after %d plain requests", err, spoken.Load())
	}
}

func TestCAFile(t *testing.T) {
	ctx := context.Background()
	srv := httptest.NewUnstartedServer(newGGCR())
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "https://")
	ca := caFile(t, srv)
	img := newImage(t, 100, 1)
	with := newClient(t, host, func(o *registry.Options) { o.Hosts[0].PlainHTTP, o.Hosts[0].CAFile = false, ca })
	if err := with.PushImage(ctx, host+"/app", img); err != nil {
		t.Error(err)
	}
	without := newClient(t, host, func(o *registry.Options) { o.Hosts[0].PlainHTTP = false })
	if _, err := without.Pull(ctx, host+"/app", digestOf(t, img)); err == nil || accel.IsPermanent(err) {
		t.Errorf("an unknown authority: %v, want an error that can be mended", err)
	}
}

func TestCredentials(t *testing.T) {
	ctx := context.Background()
	host := serve(t, kinds["distribution with htpasswd"](t))
	img := newImage(t, 100, 1)
	for name, c := range map[string]struct {
		set  func(*registry.Options)
		want error
	}{
		"right": {func(*registry.Options) {}, nil},
		"wrong": {func(o *registry.Options) { o.Hosts[0].Password = "other" }, accel.ErrUnauthenticated},
		"none":  {func(o *registry.Options) { o.Hosts[0].Username, o.Hosts[0].Password = "", "" }, accel.ErrUnauthenticated},
		"keychain": {func(o *registry.Options) {
			o.Hosts[0].Username, o.Hosts[0].Password = "", ""
			o.Keychain = &rotating{from: 0}
		}, nil},
		"rotated": {func(o *registry.Options) {
			o.Hosts[0].Username, o.Hosts[0].Password = "", ""
			o.Keychain = &rotating{from: 1}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			err := newClient(t, host, c.set).PushImage(ctx, host+"/app", img)
			if !errors.Is(err, c.want) || accel.IsPermanent(err) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	host = serve(t, kinds["distribution with tokens"](t))
	wrong := newClient(t, host, func(o *registry.Options) { o.Hosts[0].Password = "other" })
	_, err := wrong.Tags(ctx, host+"/app")
	if !errors.Is(err, accel.ErrUnauthenticated) {
		t.Errorf("refused by the token service: %v, want ErrUnauthenticated", err)
	}
}

// rotating is a keychain whose first answers are out of date.
type rotating struct {
	from  int64 // the first answer that is right
	asked atomic.Int64
}

func (k *rotating) Resolve(authn.Resource) (authn.Authenticator, error) {
	if k.asked.Add(1) <= k.from {
		return &authn.Basic{Username: user, Password: "old"}, nil
	}
	return &authn.Basic{Username: user, Password: password}, nil
}

func caFile(t *testing.T, srv *httptest.Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
