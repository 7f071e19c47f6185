package profile_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"accel/internal/debimage"
	"accel/profile"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// program is an image that starts are recorded of: Debian packages on a minbase and
// some files of its own, one layer each. A change of what is built needs a new name.
type program struct {
	name     string
	packages string
	files    map[string]string
	// prepare is run in the layer of the files, with the packages of tools beside it.
	tools, prepare string
	command        []string
	// ready is a shell command that succeeds once the program is up.
	ready string
}

// run is a command that has to work.
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out[max(0, len(out)-2000):])
	}
}

// unmount is for cleanups, where the test's context has ended.
func unmount(t testing.TB, dir string) {
	t.Helper()
	if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
		t.Errorf("unmount %s: %v", dir, err)
	}
}

// layers are the directories of p's layers, lowest first. They are built once and kept
// in the user's cache directory.
func (p program) layers(t testing.TB) []string {
	t.Helper()
	cache, err := os.UserCacheDir()
	must(t, err)
	root := filepath.Join(cache, "accel-images", "trees-1")
	base, own := filepath.Join(root, "base"), filepath.Join(root, p.name)
	dirs := []string{base, filepath.Join(own, "upper"), filepath.Join(own, "app")}
	if _, err := os.Stat(base); errors.Is(err, os.ErrNotExist) {
		unpackMinbase(t, base)
	}
	if _, err := os.Stat(own); err == nil {
		return dirs
	}
	must(t, os.MkdirAll(root, 0o755))
	made, err := os.MkdirTemp(root, "making-")
	must(t, err)
	defer os.RemoveAll(made)
	app := filepath.Join(made, "app")
	for _, d := range []string{"upper", "app", "tools", "scratch", "merged"} {
		must(t, os.Mkdir(filepath.Join(made, d), 0o755))
	}
	for name, text := range p.files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(app, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(app, name), []byte(text), 0o755))
	}
	within(t, made, base, filepath.Join(made, "upper"), install(p.packages))
	if p.prepare != "" {
		lower := filepath.Join(made, "tools")
		within(t, made, filepath.Join(made, "upper")+":"+base, lower, install(p.tools))
		within(t, made, lower+":"+filepath.Join(made, "upper")+":"+base, app, p.prepare)
	}
	for _, d := range []string{"tools", "scratch", "merged"} {
		must(t, os.RemoveAll(filepath.Join(made, d)))
	}
	must(t, os.Rename(made, own))
	return dirs
}

func install(packages string) string {
	return "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d && apt-get update -q && " +
		"DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends " + packages + " && apt-get clean && rm -rf /var/lib/apt/lists/* /usr/sbin/policy-rc.d"
}

// within runs a script over layers, with what it writes in upper.
func within(t testing.TB, work, lower, upper, script string) {
	t.Helper()
	merged := filepath.Join(work, "merged")
	scratch, err := os.MkdirTemp(work, "scratch-")
	must(t, err)
	run(t, "mount", "-t", "overlay", "overlay", "-o", "lowerdir="+lower+",upperdir="+upper+",workdir="+scratch, merged)
	defer unmount(t, merged)
	run(t, "mount", "-t", "proc", "proc", filepath.Join(merged, "proc"))
	defer unmount(t, filepath.Join(merged, "proc"))
	run(t, "chroot", merged, "sh", "-c", script)
}

func unpackMinbase(t testing.TB, dir string) {
	t.Helper()
	img, err := debimage.Minbase(t.Context(), os.Stderr)
	must(t, err)
	layers, err := img.Layers()
	must(t, err)
	tar, err := layers[0].Uncompressed()
	must(t, err)
	defer tar.Close()
	must(t, os.MkdirAll(dir+".making", 0o755))
	cmd := exec.CommandContext(t.Context(), "tar", "-C", dir+".making", "-xf", "-")
	cmd.Stdin = tar
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	must(t, os.Rename(dir+".making", dir))
}

// tocOfDir is the TOC that a layer made of a directory would have, chunks left out;
// overlayfs's whiteouts become the format's.
func tocOfDir(t testing.TB, dir string) []byte {
	t.Helper()
	var entries []*estargz.TOCEntry
	seen := map[uint64]string{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		e := &estargz.TOCEntry{Name: rel, Mode: int64(st.Mode & 0o7777), Size: info.Size()}
		switch {
		case d.IsDir():
			e.Type = "dir"
		case info.Mode()&fs.ModeSymlink != 0:
			e.Type = "symlink"
			if e.LinkName, err = os.Readlink(name); err != nil {
				return err
			}
		case info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0:
			e.Type, e.Name = "reg", filepath.Join(filepath.Dir(rel), ".wh."+filepath.Base(rel))
		case !info.Mode().IsRegular():
			e.Type = "fifo"
		case seen[st.Ino] != "":
			e.Type, e.LinkName = "hardlink", seen[st.Ino]
		default:
			e.Type = "reg"
			seen[st.Ino] = rel
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(b)
			e.Digest = "sha256:" + hex.EncodeToString(sum[:])
		}
		entries = append(entries, e)
		return nil
	})
	must(t, err)
	b, err := json.Marshal(estargz.JTOC{Version: 1, Entries: entries})
	must(t, err)
	return b
}

// viewOfDirs is an image made of directories.
func viewOfDirs(t testing.TB, dirs []string) profile.View {
	t.Helper()
	var tocs [][]byte
	for _, d := range dirs {
		cached := d + ".toc-1.json"
		b, err := os.ReadFile(cached)
		if err != nil {
			b = tocOfDir(t, d)
			must(t, os.WriteFile(cached, b, 0o644))
		}
		tocs = append(tocs, b)
	}
	tree, err := profile.NewTree(t.Context(), tocs)
	must(t, err)
	return profile.View{Tree: tree, Read: func(_ context.Context, layer int, e *profile.Entry, offset, n int64) ([]byte, error) {
		f, err := os.Open(filepath.Join(dirs[layer], e.Path))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b := make([]byte, n)
		got, err := f.ReadAt(b, offset)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		return bytes.Clone(b[:got]), nil
	}}
}

func lookPath(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Fatal(fmt.Errorf("this test needs %s: %w", n, err))
		}
	}
}
