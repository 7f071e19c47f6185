package registry_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"accel"
	"accel/registry"
)

// TestDefaultKeychainSeesRenewedCredentials: what docker's config.json says now
// counts, in a client that has been refused with what it said before.
func TestDefaultKeychainSeesRenewedCredentials(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("DOCKER_CONFIG", dir)
	host := serve(t, kinds["distribution with tokens"](t))
	login := func(password string) {
		auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
		config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, auth)
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := newClient(t, host, func(o *registry.Options) {
		o.Hosts[0].Username, o.Hosts[0].Password = "", ""
		o.Keychain = registry.DefaultKeychain()
	})
	img := newImage(t, 100, 1)
	login("old")
	if err := c.PushImage(ctx, host+"/app", img); !errors.Is(err, accel.ErrUnauthenticated) {
		t.Errorf("with an old password: %v, want ErrUnauthenticated", err)
	}
	login(password)
	if err := c.PushImage(ctx, host+"/app", img); err != nil {
		t.Errorf("with the new one: %v", err)
	}
}
