package doctor

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel/install"
	"accel/node"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/authn"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"
)

// machine is a root with files, and the options that describe it.
type machine struct {
	*testing.T
	o Options
}

func newMachine(t *testing.T) *machine {
	root := t.TempDir()
	client := node.NewClient(filepath.Join(root, "node.sock"))
	t.Cleanup(client.Close)
	web := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(web.CloseIdleConnections)
	m := &machine{t, Options{
		Root: root, ContainerdConfig: install.DefaultContainerdConfig, ContainerdSocket: "/run/containerd/containerd.sock",
		Install: install.Options{ConfigDir: install.DefaultConfigDir, Mirror: "http://127.0.0.1:1", Registries: []install.Registry{{Name: "r.test"}}},
		Dir:     "/var/lib/accel/node", Node: client, NodeName: "n1", HTTP: web, Patience: 5 * time.Second, Now: time.Now,
	}}
	m.write("/proc/sys/kernel/osrelease", "6.18.1-x\n")
	m.write("/proc/filesystems", "nodev\toverlay\n\terofs\nnodev\tfuse\n")
	return m
}

func (m *machine) write(path, content string) {
	m.Helper()
	path = filepath.Join(m.o.Root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		m.Fatal(err)
	}
}

// want finds a finding of a level that has the words, and a way to mend it unless it is ok.
func (m *machine) want(found []Finding, level Level, words string) {
	m.Helper()
	for _, f := range found {
		if f.Level == level && strings.Contains(f.Detail, words) {
			if (level == OK) != (f.Mend == "") {
				m.Errorf("%q says %q on how to mend it", f.Detail, f.Mend)
			}
			return
		}
	}
	m.Errorf("no finding %q with %q in %+v", level, words, found)
}

func (m *machine) allOK(found []Finding) {
	m.Helper()
	if w := Worst(found); w != OK || len(found) == 0 {
		m.Errorf("%q: %+v", w, found)
	}
}

func TestKernel(t *testing.T) {
	ctx := context.Background()
	m := newMachine(t)
	m.allOK(m.o.kernel(ctx))

	m.write("/proc/filesystems", "nodev\toverlay\n")
	m.write("/lib/modules/6.18.1-x/modules.dep", "kernel/fs/erofs/erofs.ko.zst: kernel/lib/x.ko\n")
	found := m.o.kernel(ctx)
	m.want(found, OK, "erofs (a module")
	m.want(found, Warn, "no file system fuse")

	m.write("/proc/sys/kernel/osrelease", "6.1.0-13-amd64\n")
	m.want(m.o.kernel(ctx), Warn, "loop devices")
	m.write("/proc/sys/kernel/osrelease", "4.19.0\n")
	m.want(m.o.kernel(ctx), Warn, "too old")
	m.write("/proc/sys/kernel/osrelease", "strange\n")
	m.want(m.o.kernel(ctx), Warn, "cannot be read")
}

func TestContainerdAndItsHostsFiles(t *testing.T) {
	ctx := context.Background()
	m := newMachine(t)
	found := m.o.containerd(ctx)
	m.want(found, Warn, "does not run")
	if len(found) != 1 {
		t.Errorf("a machine without containerd gets more than one word on it: %+v", found)
	}

	m.write(install.DefaultContainerdConfig, "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n")
	found = m.o.containerd(ctx)
	m.want(found, Fail, "list")
	m.want(found, Fail, "r.test/hosts.toml is not there")

	m.write(install.DefaultContainerdConfig, "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d'\n")
	wanted := m.o.Install
	wanted.Root = m.o.Root
	plan, err := install.Plan(wanted)
	if err == nil {
		err = install.Apply(plan)
	}
	if err != nil {
		t.Fatal(err)
	}
	found = m.o.containerd(ctx)
	m.want(found, OK, "looks for hosts.toml")
	m.want(found, OK, "sends pulls to the node first")

	m.o.Install.Mirror = "http://127.0.0.1:2"
	m.want(m.o.containerd(ctx), Fail, "not as the configuration wants it")
	m.write("/etc/containerd/certs.d/r.test/hosts.toml", "server = 'https://other.test'\n")
	m.want(m.o.containerd(ctx), Fail, "not written by accel")
	m.write(install.DefaultContainerdConfig, "version = [")
	m.want(m.o.containerd(ctx), Fail, "config.toml")
}

func TestLazy(t *testing.T) {
	ctx := context.Background()
	m := newMachine(t)
	m.allOK(m.o.lazy(ctx)) // not wanted, so nothing lacks

	m.o.Install.Snapshotter = &install.Snapshotter{Socket: "/run/accel/snapshotter.sock", Root: "/var/lib/accel/node/snapshots"}
	m.o.RuntimeDir = "/run/accel/lazyfs"
	found := m.o.lazy(ctx)
	m.want(found, Warn, "switched off")
	m.want(found, Warn, "/dev/fuse")
	m.want(found, Warn, "not on tmpfs")
	m.want(found, Warn, "nobody's mappings")
	m.want(found, OK, "images can be mounted from")
	for _, f := range found {
		if strings.Contains(f.Detail, "containerd") {
			t.Errorf("a word of containerd, which is not here: %+v", f)
		}
	}
	m.o.Lazy, m.o.Server = true, "https://accel.test"
	m.write("/dev/fuse", "")
	found = m.o.lazy(ctx)
	m.want(found, Warn, "is no device")
	m.want(found, OK, "mappings of https://accel.test")
	m.o.KeysFile = "/etc/accel/keys.pem"
	m.want(m.o.lazy(ctx), Fail, "keys.pem")
	m.write(m.o.KeysFile, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
	m.want(m.o.lazy(ctx), Fail, "want PUBLIC KEY")
	key := func() string {
		t.Helper()
		public, _, err := ed25519.GenerateKey(nil)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: raw}))
	}
	m.write(m.o.KeysFile, key()+"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
	m.want(m.o.lazy(ctx), Fail, "block 2")
	m.write(m.o.KeysFile, key()+key())
	m.want(m.o.lazy(ctx), OK, "signed by the keys")
	m.write("/proc/sys/kernel/osrelease", "6.1.0\n")
	m.want(m.o.lazy(ctx), Warn, "loop-control")

	// Its configuration is here, but containerd does not run.
	m.write(install.DefaultContainerdConfig, "version = 3\n")
	found = m.o.lazy(ctx)
	m.want(found, Warn, "no proxy plugin accel")
	m.want(found, Warn, "nobody answers for snapshots")
}

// TestLazyOnRealFileSystems mounts those that count.
func TestLazyOnRealFileSystems(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: mounting needs root")
	}
	m := newMachine(t)
	m.o.Install.Snapshotter, m.o.RuntimeDir, m.o.Root = &install.Snapshotter{Socket: "/s", Root: "/r"}, t.TempDir(), ""
	mount(t, "tmpfs", m.o.RuntimeDir, "")
	m.want([]Finding{m.o.runtimeDir()}, OK, "on tmpfs")
	m.want([]Finding{m.o.device("/dev/null", "x")}, OK, "is there")
	for _, dir := range []string{"lower", "upper", "work", "all"} {
		if err := os.Mkdir(filepath.Join(m.o.RuntimeDir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	m.o.Dir = filepath.Join(m.o.RuntimeDir, "all")
	mount(t, "overlay", m.o.Dir, strings.ReplaceAll("lowerdir=DIR/lower,upperdir=DIR/upper,workdir=DIR/work", "DIR", m.o.RuntimeDir))
	m.want([]Finding{m.o.mountable()}, Warn, "overlayfs")
}

func mount(t *testing.T, kind, at, data string) {
	t.Helper()
	if err := unix.Mount(kind, at, kind, 0, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
}

func TestDisk(t *testing.T) {
	ctx := context.Background()
	m := newMachine(t)
	m.allOK(m.o.disk(ctx))
	m.o.FreeFloorBytes = 1 << 60
	m.want(m.o.disk(ctx), Fail, "nothing is cached")
	m.o.FreeFloorBytes, m.o.BudgetBytes = 0, 1<<60
	m.want(m.o.disk(ctx), Warn, "budget")
	m.write("/var/lib/accel", "a file")
	m.want(m.o.disk(ctx), Fail, "")
}

func TestDaemonThatDoesNotRun(t *testing.T) {
	m := newMachine(t)
	m.want(m.o.daemon(context.Background()), Fail, "does not run")
}

// registryAt serves a registry that wants the password, or none where that is empty.
func (m *machine) registryAt(password string, own authn.Keychain) {
	m.Helper()
	inner := ggcr.New()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, p, _ := r.BasicAuth(); password != "" && p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	m.Cleanup(s.Close)
	m.o.Registries = []registry.Host{{Name: strings.TrimPrefix(s.URL, "http://"), PlainHTTP: true}}
	var err error
	if m.o.Client, err = registry.New(registry.Options{Hosts: m.o.Registries, Keychain: own, Attempts: 1}); err != nil {
		m.Fatal(err)
	}
	m.Cleanup(m.o.Client.Close)
}

type keychain authn.AuthConfig

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig(k)), nil
}

func TestRegistries(t *testing.T) {
	ctx := context.Background()
	m := newMachine(t)
	m.want(m.o.registries(ctx), Fail, "none is configured")
	m.registryAt("", nil)
	m.allOK(m.o.registries(ctx))
	m.registryAt("secret", nil)
	m.want(m.o.registries(ctx), Warn, "this machine has none")
	m.registryAt("secret", keychain{Username: "u", Password: "secret"})
	m.want(m.o.registries(ctx), OK, "own credentials")
	m.registryAt("secret", keychain{Username: "u", Password: "old"})
	m.want(m.o.registries(ctx), Fail, "refuses")
	m.o.Registries = []registry.Host{{Name: "127.0.0.1:1", PlainHTTP: true}}
	var err error
	if m.o.Client, err = registry.New(registry.Options{Hosts: m.o.Registries, Attempts: 1}); err != nil {
		t.Fatal(err)
	}
	m.want(m.o.registries(ctx), Fail, "does not answer")
}

func TestClock(t *testing.T) {
	ctx := context.Background()
	m := newMachine(t)
	m.want(m.o.clock(ctx), Warn, "nobody")
	m.registryAt("", nil)
	m.allOK(m.o.clock(ctx))
	m.o.Now = func() time.Time { return time.Now().Add(-time.Minute) }
	m.want(m.o.clock(ctx), Warn, "-1m0s")
	m.o.Now = func() time.Time { return time.Now().Add(time.Hour) }
	m.want(m.o.clock(ctx), Fail, "tokens")
}

func TestServer(t *testing.T) {
	ctx := context.Background()
	m := newMachine(t)
	m.want(m.o.server(ctx), Warn, "none is configured")
	for status, want := range map[int]struct {
		level Level
		words string
	}{
		http.StatusUnauthorized:        {Fail, "refuses the token"},
		http.StatusNotFound:            {Warn, "never heard"},
		http.StatusInternalServerError: {Fail, "500"},
	} {
		problem := map[int]string{http.StatusUnauthorized: "unauthenticated", http.StatusNotFound: "not-found"}[status]
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(status)
			w.Write([]byte(`{"type":"urn:accel:problem:` + problem + `","title":"no","detail":"said so"}`))
		}))
		m.o.Server = s.URL
		m.want(m.o.server(ctx), want.level, want.words)
		s.Close()
	}
	m.want(m.o.server(ctx), Fail, "refused")
}
