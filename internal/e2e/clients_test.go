package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"accel/internal/testbed"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
)

// The accounts of the registries here: alice pulls in team, robot writes there,
// bob is somebody else's.
const (
	reader, readerPassword = "alice", "secret"
	writer, writerPassword = "robot", "writes"
	other, otherPassword   = "bob", "elsewhere"
)

func accounts() []testbed.Account {
	return []testbed.Account{
		{Name: reader, Password: readerPassword, Pull: []string{"team/*"}},
		{Name: writer, Password: writerPassword, Push: []string{"*/*"}},
		{Name: other, Password: otherPassword, Pull: []string{"elsewhere/*"}},
	}
}

func startRegistry(t *testing.T) *testbed.Registry {
	t.Helper()
	return startRegistryIn(t, t.TempDir())
}

func startRegistryIn(t *testing.T, dir string) *testbed.Registry {
	t.Helper()
	r, err := testbed.StartRegistry(testbed.RegistryOptions{Dir: dir, Accounts: accounts()})
	must(t, err)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// pushTo puts what into the registry as writer, sets its counters to zero, and
// gives the reference and the digest of what.
func pushTo(t *testing.T, r *testbed.Registry, path string, what remote.Taggable) (image, hash string) {
	t.Helper()
	ref, err := name.ParseReference(r.Host()+"/"+path, name.Insecure)
	must(t, err)
	must(t, remote.Push(ref, what, remote.WithAuth(&authn.Basic{Username: writer, Password: writerPassword})))
	r.Reset()
	h, err := what.(interface{ Digest() (v1.Hash, error) }).Digest()
	must(t, err)
	return ref.Name(), h.String()
}

// needsClients skips where the clients cannot run, and says so.
func needsClients(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: containerd needs root")
	}
}

// route is how clients reach a registry: straight, where it is zero.
type route struct {
	hostsDir string // containerd's
	mirror   string // "host:port" of a mirror whose default registry is the one asked for
}

// client is one program that pulls images.
type client struct {
	name string
	// pull brings an image as somebody, and gives the digest that the client has it
	// by: of what was asked for, or of this platform's manifest in that.
	pull func(image, user, password string) (string, error)
	// forget makes the next pull start from nothing.
	forget func(image string) error
}

// newClients starts what has to be started for each client, and ends it with the
// test.
func newClients(t *testing.T, r route) []client {
	t.Helper()
	var all []client
	for _, version := range []string{testbed.Containerd2, testbed.Containerd16} {
		all = append(all, containerdClients(t, startContainerd(t, version, r.hostsDir), version, r)...)
	}
	return append(all, skopeoClient(t, r), craneClient(t, r))
}

func startContainerd(t *testing.T, version, hostsDir string) *testbed.Containerd {
	t.Helper()
	c, err := testbed.StartContainerd(t.Context(), testbed.ContainerdOptions{Version: version, HostsDir: hostsDir})
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("containerd %s:\n%s", version, c.Log())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func containerdClients(t *testing.T, c *testbed.Containerd, version string, r route) []client {
	return []client{{
		name: "ctr " + version,
		pull: func(image, user, password string) (string, error) {
			if err := c.PullCtr(t.Context(), image, r.hostsDir, user, password); err != nil {
				return "", err
			}
			list, err := c.Ctr(t.Context(), "images", "ls", "name=="+image)
			return sha256Digest.FindString(list), err
		},
		forget: func(image string) error { return c.RemoveCtr(t.Context(), image) },
	}, {
		name: "CRI " + version,
		pull: func(image, user, password string) (string, error) {
			ref, err := c.PullCRI(t.Context(), image, user, password)
			return sha256Digest.FindString(ref), err
		},
		forget: func(image string) error { return c.RemoveCRI(t.Context(), image) },
	}}
}

// skopeoClient knows the mirror from registries.conf, as podman and CRI-O do.
func skopeoClient(t *testing.T, r route) client {
	dir := t.TempDir()
	conf := filepath.Join(dir, "registries.conf")
	return client{
		name: "skopeo",
		pull: func(image, user, password string) (string, error) {
			host, _, _ := strings.Cut(image, "/")
			text := fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", host)
			if r.mirror != "" {
				text += fmt.Sprintf("[[registry.mirror]]\nlocation = %q\ninsecure = true\n", r.mirror)
			}
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				return "", err
			}
			args := []string{"--insecure-policy", "--registries-conf", conf, "copy", "--digestfile", filepath.Join(dir, "digest")}
			auth, err := dockerConfig(filepath.Join(dir, "auth"), user, password, host, r.mirror)
			if err != nil {
				return "", err
			}
			cmd := exec.CommandContext(t.Context(), "skopeo", append(args, "docker://"+image, "dir:"+filepath.Join(dir, "image"))...)
			cmd.Env = append(os.Environ(), "REGISTRY_AUTH_FILE="+auth)
			if out, err := cmd.CombinedOutput(); err != nil {
				return "", fmt.Errorf("skopeo: %w: %s", err, out)
			}
			said, err := os.ReadFile(filepath.Join(dir, "digest"))
			return strings.TrimSpace(string(said)), err
		},
		forget: func(string) error { return os.RemoveAll(filepath.Join(dir, "image")) },
	}
}

// craneClient knows no mirrors: it asks the mirror as if that were the registry.
func craneClient(t *testing.T, r route) client {
	t.Helper()
	dir := t.TempDir()
	path, err := testbed.Crane()
	must(t, err)
	return client{
		name: "crane",
		pull: func(image, user, password string) (string, error) {
			host, rest, _ := strings.Cut(image, "/")
			if r.mirror != "" {
				host = r.mirror
			}
			auth, err := dockerConfig(filepath.Join(dir, "config.json"), user, password, host)
			if err != nil {
				return "", err
			}
			layout := filepath.Join(dir, "image")
			cmd := exec.CommandContext(t.Context(), path, "pull", "--insecure", "--format", "oci", "--platform", "linux/amd64", host+"/"+rest, layout)
			cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+filepath.Dir(auth))
			if out, err := cmd.CombinedOutput(); err != nil {
				return "", fmt.Errorf("crane: %w: %s", err, out)
			}
			index, err := os.ReadFile(filepath.Join(layout, "index.json"))
			return sha256Digest.FindString(string(index)), err
		},
		forget: func(string) error { return os.RemoveAll(filepath.Join(dir, "image")) },
	}
}

// dockerConfig writes a config.json with one credential for each host.
func dockerConfig(path, user, password string, hosts ...string) (string, error) {
	auths := map[string]authn.AuthConfig{}
	for _, h := range hosts {
		if h != "" && user != "" {
			auths[h] = authn.AuthConfig{Username: user, Password: password}
		}
	}
	raw, err := json.Marshal(map[string]any{"auths": auths})
	return path, errors.Join(err, os.WriteFile(path, raw, 0o600))
}

var sha256Digest = regexp.MustCompile(`sha256:[0-9a-f]{64}`)

const greeting = "hello from inside"

// program is a static program that says hello, in a layer.
func program(t *testing.T) v1.Layer {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\n\nfunc main() { println(\""+greeting+"\") }\n"), 0o600))
	cmd := exec.Command("go", "build", "-o", "hello", "main.go")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "hello"))
	must(t, err)
	return gzipped(t, tarOf(t, file("hello", string(raw), 0o755)))
}

// layerSizes are an image's layers by digest, with their compressed sizes.
func layerSizes(t *testing.T, img v1.Image) map[digest.Digest]int64 {
	t.Helper()
	layers, err := img.Layers()
	must(t, err)
	sizes := map[digest.Digest]int64{}
	for _, l := range layers {
		h, err := l.Digest()
		must(t, err)
		sizes[digest.Digest(h.String())], err = l.Size()
		must(t, err)
	}
	return sizes
}
