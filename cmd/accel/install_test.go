package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"accel/install"

	"golang.org/x/sys/unix"
)

// installRun installs, or takes away, below a root, and gives what is left to a person.
func installRun(t *testing.T, wantCode int, args ...string) (actions map[string]install.Action, next string) {
	t.Helper()
	code, out, said := accelRun(t, append(append([]string{"node"}, args...), "-o", "json")...)
	var done installed
	if err := json.Unmarshal([]byte(out), &done); err != nil || code != wantCode {
		t.Fatalf("exit %d, %s%s (%v)", code, out, said, err)
	}
	actions = map[string]install.Action{}
	for _, c := range done.Changes {
		actions[filepath.Base(c.Path)] = c.Action
	}
	return actions, strings.Join(done.Next, "\n")
}

func TestInstallOfTheSnapshotterByCommand(t *testing.T) {
	root, file := t.TempDir(), configFile(t, good)
	config := filepath.Join(root, install.DefaultContainerdConfig)
	below := []string{"--root", root, "--config", file}
	do := func(verb string, more ...string) (map[string]install.Action, string) {
		t.Helper()
		return installRun(t, exitOK, slices.Concat([]string{verb}, below, more)...)
	}
	if done, next := do("install", "--no-snapshotter"); done["accel.toml"] != "" || strings.Contains(next, "lazily") {
		t.Errorf("without a snapshotter: %v, %s", done, next)
	}
	if done, next := do("install", "--containerd-version", "1.7"); done["accel.toml"] != "" || !strings.Contains(next, "snapshotter = \"accel\"\n  disable_snapshot_annotations = false") {
		t.Errorf("1.7: %v, %s", done, next)
	}
	if done, next := do("install", "--containerd-version", "2.4"); done["accel.toml"] != install.Create || !strings.Contains(next, "imports = ") || strings.Contains(next, "accel node install, then") {
		t.Errorf("2.4 that imports nothing: %v, %s", done, next)
	}
	if err := os.WriteFile(config, []byte("version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if done, next := do("install", "--data", "/srv/node"); done["accel.toml"] != install.Update || !strings.Contains(next, "systemctl restart containerd") || strings.Contains(next, "lazily") {
		t.Errorf("2.x that imports it, with other keys: %v, %s", done, next)
	}
	if text, err := os.ReadFile(filepath.Join(root, install.DefaultDropInDir, "accel.toml")); err != nil || !strings.Contains(string(text), `root = "/srv/node/snapshots"`) {
		t.Errorf("%s %v", text, err)
	}
	if done, next := do("install", "--data", "/srv/node"); done["accel.toml"] != install.Keep || strings.Contains(next, "restart containerd, while") {
		t.Errorf("again: %v, %s", done, next)
	}
	if done, next := do("uninstall"); done["accel.toml"] != install.Remove || !strings.Contains(next, "when no container is left") {
		t.Errorf("uninstall: %v, %s", done, next)
	}
	if err := os.WriteFile(config, []byte("version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'accel'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, next := do("uninstall"); !strings.Contains(next, "merged by hand") {
		t.Errorf("no word of what a person merged: %s", next)
	}
}

// TestMountsBelowAreCounted: by the path that the kernel has for them, and not those beside.
func TestMountsBelowAreCounted(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: mounting needs root")
	}
	at := t.TempDir()
	for _, dir := range []string{"data/snapshots/snapshots/1/fs", "data/snapshots2"} {
		dir = filepath.Join(at, dir)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
	}
	if err := os.Symlink("data", filepath.Join(at, "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"data", "link"} {
		if n, err := mountsBelow(filepath.Join(at, name, "snapshots")); err != nil || n != 1 {
			t.Errorf("%s: %d mounts, %v; want 1", name, n, err)
		}
	}
	if n, err := mountsBelow(filepath.Join(at, "gone")); err != nil || n != 0 {
		t.Errorf("below what is not there: %d mounts, %v", n, err)
	}
}
