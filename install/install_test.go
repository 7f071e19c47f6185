package install

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if play(os.Args) {
		return
	}
	logrus.SetOutput(io.Discard)                                                                         // the registry of the tests logs to it
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run")) // distribution never ends it
}

const mirrorURL = "http://127.0.0.1:5555"

// bed is a machine's root with an installation to be.
type bed struct {
	*testing.T
	o Options
}

func newBed(t *testing.T) *bed {
	return &bed{t, Options{
		Root: t.TempDir(), Mirror: mirrorURL,
		Registries: []Registry{
			{Name: "registry.test:5000", Aliases: []string{"r.test"}, PlainHTTP: true},
			{Name: "docker.io"},
			{Name: "secure.test", CAFile: "/etc/accel/ca.pem"},
		},
		Unit: &Unit{Binary: "/usr/bin/accel", ConfigFile: "/etc/accel/node.yaml", RuntimeDir: "accel"},
	}}
}

func (b *bed) path(p string) string { return filepath.Join(b.o.Root, p) }

func (b *bed) write(p, content string) {
	b.Helper()
	if err := os.MkdirAll(filepath.Dir(b.path(p)), 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(b.path(p), []byte(content), 0o644); err != nil {
		b.Fatal(err)
	}
}

func (b *bed) read(p string) string {
	b.Helper()
	raw, err := os.ReadFile(b.path(p))
	if err != nil {
		b.Fatal(err)
	}
	return string(raw)
}

// install plans and applies, and returns what was done to each file.
func (b *bed) install() map[string]Change {
	b.Helper()
	return b.apply(Plan(b.o))
}

func (b *bed) uninstall() map[string]Change {
	b.Helper()
	return b.apply(PlanRemoval(Options{Root: b.o.Root, ConfigDir: b.o.ConfigDir}))
}

func (b *bed) apply(plan []Change, err error) map[string]Change {
	b.Helper()
	if err == nil {
		err = Apply(plan)
	}
	if err != nil {
		b.Fatal(err)
	}
	done := map[string]Change{}
	for _, c := range plan {
		done[strings.TrimPrefix(c.Path, b.o.Root)] = c
	}
	return done
}

func (b *bed) want(done map[string]Change, actions map[string]Action) {
	b.Helper()
	for path, want := range actions {
		if got := done[path].Action; got != want {
			b.Errorf("%s: %q (%s), want %q", path, got, done[path].Note, want)
		}
	}
	if len(done) != len(actions) {
		b.Errorf("%d files, want %d: %v", len(done), len(actions), done)
	}
}

// asked lists whom containerd asks for an image of host, in order.
func (b *bed) asked(host string) []docker.RegistryHost {
	b.Helper()
	lookup := config.ConfigureHosts(context.Background(), config.HostOptions{HostDir: config.HostDirFromRoot(b.path(DefaultConfigDir))})
	found, err := lookup(host)
	if err != nil {
		b.Fatal(err)
	}
	return found
}

const (
	unit       = "/etc/systemd/system/accel-node.service"
	registry   = "/etc/containerd/certs.d/registry.test_5000_/hosts.toml"
	alias      = "/etc/containerd/certs.d/r.test/hosts.toml"
	hub        = "/etc/containerd/certs.d/docker.io/hosts.toml"
	secure     = "/etc/containerd/certs.d/secure.test/hosts.toml"
	allOthers  = "/etc/containerd/certs.d/_default/hosts.toml"
	pullAndTag = docker.HostCapabilityPull | docker.HostCapabilityResolve
)

func TestContainerdAsksTheNodeFirstAndTheRegistryAfterIt(t *testing.T) {
	b := newBed(t)
	b.o.Everything, b.o.Headers = true, map[string]string{"Accel-Tenant": "team \"a\"", "Accel-Memory-Bytes": "1024"}
	b.want(b.install(), map[string]Action{registry: Create, alias: Create, hub: Create, secure: Create, allOthers: Create, unit: Create})
	for host, server := range map[string]string{
		"registry.test:5000": "http://registry.test:5000",
		"r.test":             "http://r.test",
		"docker.io":          "https://registry-1.docker.io",
		"other.test:5001":    "https://other.test:5001",
	} {
		asked := b.asked(host)
		if len(asked) != 2 {
			t.Fatalf("%s: containerd asks %d hosts, want 2", host, len(asked))
		}
		node, upstream := asked[0], asked[1]
		if got := node.Scheme + "://" + node.Host; got != mirrorURL || node.Path != "/v2" || node.Capabilities != pullAndTag {
			t.Errorf("%s: first %s%s with capabilities %b", host, got, node.Path, node.Capabilities)
		}
		if node.Header.Get("Accel-Tenant") != `team "a"` || node.Header.Get("Accel-Memory-Bytes") != "1024" || len(upstream.Header) != 0 {
			t.Errorf("%s: headers %v to the node, %v to the registry", host, node.Header, upstream.Header)
		}
		if got := upstream.Scheme + "://" + upstream.Host; got != server || upstream.Path != "/v2" || !upstream.Capabilities.Has(docker.HostCapabilityPush) {
			t.Errorf("%s: then %s%s, want %s", host, got, upstream.Path, server)
		}
	}
	if text := b.read(secure); !strings.Contains(text, `ca = ["/etc/accel/ca.pem"]`) {
		t.Errorf("the registry's CA is lost: %s", text)
	}
}

func TestInstallIsIdempotentAndFollowsTheConfiguration(t *testing.T) {
	b := newBed(t)
	b.install()
	before := b.read(registry)
	b.want(b.install(), map[string]Action{registry: Keep, alias: Keep, hub: Keep, secure: Keep, unit: Keep})
	if b.read(registry) != before {
		t.Error("a second run changed a file")
	}
	b.o.Mirror = "http://127.0.0.1:6666"
	b.o.Registries = b.o.Registries[:2]
	b.want(b.install(), map[string]Action{registry: Update, alias: Update, hub: Update, secure: Remove, unit: Keep})
	if asked := b.asked("docker.io"); asked[0].Host != "127.0.0.1:6666" {
		t.Errorf("containerd still asks %s", asked[0].Host)
	}
	if _, err := os.Stat(filepath.Dir(b.path(secure))); !os.IsNotExist(err) {
		t.Error("the empty folder of a registry that is gone was left")
	}
}

func TestPlanWritesNothing(t *testing.T) {
	b := newBed(t)
	if _, err := Plan(b.o); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(b.o.Root); len(left) != 0 {
		t.Errorf("a plan wrote %v", left)
	}
}

func TestFilesOfOthersAreLeftAlone(t *testing.T) {
	b := newBed(t)
	foreign := "server = \"https://registry-1.docker.io\"\n\n[host.\"https://mirror.test\"]\n"
	b.write(hub, foreign)
	b.write(unit, "[Service]\nExecStart=/opt/accel node\n")
	done := b.install()
	b.want(done, map[string]Action{registry: Create, alias: Create, hub: Conflict, secure: Create, unit: Conflict})
	if b.read(hub) != foreign {
		t.Error("somebody else's file was changed")
	}
	if c := done[hub]; !strings.Contains(c.Content, mirrorURL) || !strings.Contains(c.Note, "above") {
		t.Errorf("no word of what to merge: %+v", c)
	}

	// Below the other mirror it is not asked first; above it, all is well.
	table := done[hub].Content
	b.write(hub, foreign+table)
	if c := b.install()[hub]; c.Action != Conflict || !strings.Contains(c.Note, "https://mirror.test") {
		t.Errorf("the wrong order is taken for right: %+v", c)
	}
	merged := "server = \"https://registry-1.docker.io\"\n\n" + table + "\n[host.\"https://mirror.test\"]\n"
	b.write(hub, merged)
	if c := b.install()[hub]; c.Action != Keep {
		t.Errorf("what was merged by hand is a conflict: %+v", c)
	}
	if asked := b.asked("docker.io"); len(asked) != 3 || asked[0].Host != "127.0.0.1:5555" || asked[1].Host != "mirror.test" {
		t.Errorf("containerd asks %v", asked)
	}

	b.want(b.uninstall(), map[string]Action{registry: Remove, alias: Remove, secure: Remove})
	if b.read(hub) != merged {
		t.Error("uninstall changed somebody else's file")
	}
}

func TestAFileOfOursThatWasChangedIsLeftAlone(t *testing.T) {
	b := newBed(t)
	b.install()
	edited := b.read(hub) + "  dial_timeout = \"1s\"\n"
	b.write(hub, edited)
	b.o.Mirror = "http://127.0.0.1:6666"
	if c := b.install()[hub]; c.Action != Conflict || !strings.Contains(c.Note, "changed") {
		t.Errorf("%+v", c)
	}
	if c := b.uninstall()[hub]; c.Action != Conflict {
		t.Errorf("uninstall: %+v", c)
	}
	if b.read(hub) != edited {
		t.Error("an edited file was touched")
	}
}

func TestASymlinkIsSomebodyElses(t *testing.T) {
	b := newBed(t)
	b.install()
	b.write("/elsewhere", b.read(hub))
	if err := os.Remove(b.path(hub)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(b.path("/elsewhere"), b.path(hub)); err != nil {
		t.Fatal(err)
	}
	b.o.Mirror = "http://127.0.0.1:6666"
	if c := b.install()[hub]; c.Action != Conflict {
		t.Errorf("%+v", c)
	}
}

func TestCertificatesInDockersWayAreCarriedOver(t *testing.T) {
	b := newBed(t)
	for _, name := range []string{"ca.crt", "client.cert", "client.key"} {
		b.write("/etc/containerd/certs.d/secure.test/"+name, "PEM")
	}
	b.install()
	text := b.read(secure)
	for _, want := range []string{`ca = ["/etc/accel/ca.pem", "ca.crt"]`, `client = [["client.cert", "client.key"]]`} {
		if !strings.Contains(text, want) {
			t.Errorf("%s lacks %s", text, want)
		}
	}
	b.uninstall()
	if b.read("/etc/containerd/certs.d/secure.test/ca.crt") != "PEM" {
		t.Error("uninstall took more than its own")
	}
}

func TestTheFolderThatContainerdTakesIsTheOneWritten(t *testing.T) {
	b := newBed(t)
	b.write("/etc/containerd/certs.d/registry.test:5000/ca.crt", "PEM")
	b.write(allOthers, "[host.\"https://mirror.test\"]\n")
	done := b.install()
	if done["/etc/containerd/certs.d/registry.test:5000/hosts.toml"].Action != Create {
		t.Errorf("not beside the certificates: %v", done)
	}
	if asked := b.asked("registry.test:5000"); asked[0].Host != "127.0.0.1:5555" {
		t.Errorf("containerd asks %s first", asked[0].Host)
	}
	if c := done[hub]; !strings.Contains(c.Note, "_default") {
		t.Errorf("no word of the _default that no longer counts: %+v", c)
	}
}

func TestUninstallLeavesNothingOfItsOwn(t *testing.T) {
	b := newBed(t)
	b.o.Everything = true
	b.install()
	b.uninstall()
	b.want(b.uninstall(), map[string]Action{})
	var left []string
	err := filepath.WalkDir(b.o.Root, func(path string, d os.DirEntry, err error) error {
		if !d.IsDir() {
			left = append(left, path)
		}
		return err
	})
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestBadOptions(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no mirror":   func(o *Options) { o.Mirror = "127.0.0.1:5555" },
		"no registry": func(o *Options) { o.Registries = nil },
		"relative":    func(o *Options) { o.ConfigDir = "certs.d" },
	} {
		b := newBed(t)
		change(&b.o)
		if _, err := Plan(b.o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestUnitQuotesItsWords(t *testing.T) {
	u := Unit{Binary: "/opt/my tools/accel", ConfigFile: "/etc/accel/100%.yaml"}
	if text := u.content(); !strings.Contains(text, `ExecStart="/opt/my tools/accel" node --config /etc/accel/100%%.yaml`+"\n") {
		t.Error(text)
	}
}
