package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"accel/registry"
)

// TestCredentialsForContainerd: containerd is told what the node would use, under each name of a registry.
func TestCredentialsForContainerd(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	auth := base64.StdEncoding.EncodeToString([]byte("kept:k"))
	text := fmt.Sprintf(`{"auths": {"https://index.docker.io/v1/": {"auth": %q}, "other.example:5000": {"auth": %q}}}`, auth, auth)
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	own, err := registry.New(registry.Options{
		Hosts: []registry.Host{
			{Name: "static.example", Aliases: []string{"alias.example"}, Username: "u", Password: "p"}, {Name: "token.example", Token: "t"}, {Name: "docker.io"},
		},
		AllowAny: true, Keychain: registry.DefaultKeychain(),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	for host, want := range map[string][2]string{
		"static.example": {"u", "p"}, "alias.example": {"u", "p"}, "token.example": {"", "t"}, "other.example:5000": {"kept", "k"},
		"docker.io": {"kept", "k"}, "registry-1.docker.io": {"kept", "k"}, "nobody.example": {"", ""},
	} {
		user, secret, err := credentials(t.Context(), own, host)
		if err != nil || user != want[0] || secret != want[1] {
			t.Errorf("%s: %q %q, %v; want %q", host, user, secret, err, want)
		}
	}
}
