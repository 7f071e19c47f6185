package install

import (
	"os"
	"strings"
	"testing"
)

const (
	dropIn  = "/etc/containerd/conf.d/accel.toml"
	main2   = "version = 2\n"
	main3   = "version = 3\n"
	imports = "imports = ['/etc/containerd/conf.d/*.toml']\n"
)

var snapshotter = Snapshotter{Socket: "/run/accel/snapshotter.sock", Root: "/var/lib/accel/node/snapshots"}

// withSnapshotter is a machine with containerd of a version and what its files say.
func withSnapshotter(t *testing.T, version string, files map[string]string) *bed {
	b := newBed(t)
	b.o.Registries, b.o.Unit = []Registry{{Name: "docker.io"}}, nil
	b.o.Snapshotter, b.o.ContainerdVersion = &snapshotter, version
	for path, text := range files {
		b.write(path, text)
	}
	return b
}

// problem is what is left for a person.
func (b *bed) problem() (problem, mend string) {
	b.Helper()
	c, err := ReadContainerd(b.o.Root, DefaultContainerdConfig, b.o.ContainerdVersion)
	if err != nil {
		b.Fatal(err)
	}
	return c.SnapshotterProblem(snapshotter)
}

func TestContainerdIsToldOfTheSnapshotter(t *testing.T) {
	const elsewhere = "/etc/containerd/parts/accel.toml"
	for name, c := range map[string]struct {
		version string
		files   map[string]string
		writes  string // the file; empty: none
		has     string // in it
		left    string // of what is left for a person; empty: nothing is
	}{
		"2.4, imports":          {"2.4.2", map[string]string{DefaultContainerdConfig: main3 + imports}, dropIn, "linux(+erofs)/", ""},
		"2.4, old format":       {"2.4.2", map[string]string{DefaultContainerdConfig: main2 + imports}, dropIn, `snapshotter = "accel"`, ""},
		"2.4, imports nothing":  {"2.4.2", map[string]string{DefaultContainerdConfig: main3}, dropIn, "proxy_plugins", "above the first table\n\nimports = "},
		"2.4, imports others":   {"2.4.2", map[string]string{DefaultContainerdConfig: main3 + "imports = ['/etc/containerd/x.toml']\n"}, dropIn, "", `add "/etc/containerd/conf.d/*.toml" to imports`},
		"2.4, imports relative": {"2.4.2", map[string]string{DefaultContainerdConfig: main3 + "imports = ['parts/*.toml']\n"}, elsewhere, "proxy_plugins", ""},
		"2.4, imports the file": {"2.4.2", map[string]string{DefaultContainerdConfig: main3 + "imports = ['/etc/containerd/parts/accel.toml']\n"}, elsewhere, "", ""},
		"2.4, imports folders":  {"2.4.2", map[string]string{DefaultContainerdConfig: main3 + "imports = ['/etc/*/a*.toml']\n"}, dropIn, "", "to imports"},
		"2.4, no file":          {"2.4.2", nil, dropIn, "", "version = 3\n\nimports = "},
		"2.0 pulls by itself":   {"2.0.5", map[string]string{DefaultContainerdConfig: main3 + imports}, dropIn, "disable_snapshot_annotations = false", ""},
		"2.1 pulls by itself": {"2.1.4", map[string]string{DefaultContainerdConfig: main3 + imports + "[plugins.'io.containerd.cri.v1.images']\nmax_concurrent_downloads = 10\n"},
			dropIn, "disable_snapshot_annotations = false", ""},
		"2.1, list of others": {"2.1.4", map[string]string{DefaultContainerdConfig: main3 + imports + "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux/s390x'\nsnapshotter = 'zfs'\nlayer_types = ['a', 'b']\n"},
			dropIn, `layer_types = ["a","b"]`, ""},
		"2.4, somebody later": {"2.4.2", map[string]string{DefaultContainerdConfig: main3 + imports, "/etc/containerd/conf.d/z.toml": main3 + "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'zfs'\n"},
			dropIn, "", `imported after`},
		"1.6":              {"1.6.20", map[string]string{DefaultContainerdConfig: main2 + imports}, "", "", "ln -s /var/lib/accel/node/snapshots /var/lib/containerd/io.containerd.snapshotter.v1.accel"},
		"1.7, nothing":     {"1.7.2", nil, "", "", "version = 2\n\n[proxy_plugins.accel]"},
		"1.x by format":    {"", map[string]string{DefaultContainerdConfig: main2}, "", "", "--containerd-version 2.x"},
		"2.x by format":    {"", map[string]string{DefaultContainerdConfig: main3 + imports}, dropIn, "", ""},
		"1.6, root is set": {"1.6.20", map[string]string{DefaultContainerdConfig: main2 + "root = '/data/c'\n"}, "", "", "/data/c/io.containerd.snapshotter.v1.accel"},
		"1.6, is imported": {"1.6.20", map[string]string{DefaultContainerdConfig: main2 + imports + "[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'accel'\ndisable_snapshot_annotations = false\n",
			"/etc/containerd/conf.d/x.toml": main2 + "[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'x'\n"}, "", "", "CRI's snapshotter is \"\""},
	} {
		t.Run(name, func(t *testing.T) {
			b := withSnapshotter(t, c.version, c.files)
			want := map[string]Action{hub: Create}
			if c.writes != "" {
				want[c.writes] = Create
			}
			b.want(b.install(), want)
			if c.writes != "" && !strings.Contains(b.read(c.writes), c.has) {
				t.Errorf("no %q in %s", c.has, b.read(c.writes))
			}
			problem, mend := b.problem()
			if (problem == "") != (c.left == "") || !strings.Contains(problem+mend, c.left) || strings.Contains(mend, "accel node install, then") {
				t.Errorf("left: %s: %s", problem, mend)
			}
			// What was written is read back, and changes nothing of what it says.
			for path := range want {
				want[path] = Keep
			}
			b.want(b.install(), want)
			for path := range want {
				want[path] = Remove
			}
			b.want(b.uninstall(), want)
			if problem, mend := b.problem(); problem == "" || c.writes != "" && !strings.Contains(mend, "accel node install, then") {
				t.Errorf("after its end: %q, %q", problem, mend)
			}
		})
	}
}

func TestSnapshotterIsLeftAsItIsWithoutOne(t *testing.T) {
	b := withSnapshotter(t, "2.4.2", map[string]string{DefaultContainerdConfig: main3 + imports})
	b.install()
	b.o.Snapshotter = nil
	b.want(b.install(), map[string]Action{hub: Keep})
	b.read(dropIn)
}

func TestADropInOfOthersIsLeftAlone(t *testing.T) {
	b := withSnapshotter(t, "2.4.2", map[string]string{DefaultContainerdConfig: main3 + imports, dropIn: main3})
	if c := b.install()[dropIn]; c.Action != Conflict || !strings.Contains(c.Content, "proxy_plugins") {
		t.Errorf("%+v", c)
	}
	b.write(dropIn, main3+"[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'stargz'\n")
	if err := os.Rename(b.path(dropIn), b.path("/etc/containerd/conf.d/a.toml")); err != nil {
		t.Fatal(err)
	}
	if c := b.install()[dropIn]; c.Action != Create || !strings.Contains(c.Note, "stargz") {
		t.Errorf("no word of the snapshotter that there was: %+v", c)
	}
}

func TestADropInMovesToWhereItIsImported(t *testing.T) {
	b := withSnapshotter(t, "2.4.2", map[string]string{DefaultContainerdConfig: main3})
	b.install()
	b.write(DefaultContainerdConfig, main3+"imports = ['/etc/containerd/parts/*.toml']\n")
	b.want(b.install(), map[string]Action{hub: Keep, "/etc/containerd/parts/accel.toml": Create, dropIn: Remove})
}

func TestMergedByHand(t *testing.T) {
	b := withSnapshotter(t, "1.6.20", nil)
	_, mend := b.problem()
	_, text, _ := strings.Cut(mend, "\n\n")
	text, _, _ = strings.Cut(text, "\n\nthen")
	b.write(DefaultContainerdConfig, text)
	b.write("/var/lib/containerd/io.containerd.snapshotter.v1.accel/x", "")
	if problem, _ := b.problem(); problem != "" {
		t.Error(problem)
	}
	b.write(DefaultContainerdConfig, strings.Replace(text, "/run/accel", "/run/other", 1))
	if problem, _ := b.problem(); !strings.Contains(problem, "/run/other") {
		t.Errorf("another address is taken for right: %q", problem)
	}
}

func TestReleases(t *testing.T) {
	for text, want := range map[string]release{
		"v2.4.2": {major: 2, minor: 4}, "1.6.20~ds1": {major: 1, minor: 6}, "2.2.0-rc.1": {major: 2, minor: 2}, "": {}, "next": {},
	} {
		if got := parseRelease(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
