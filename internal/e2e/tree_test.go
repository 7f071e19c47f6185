package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/reference"
	stargz "github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// needsMounts skips where FUSE and overlayfs cannot be mounted, and says so.
func needsMounts(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no FUSE here: %v", err)
	}
}

// apply unpacks an image as containerd does.
func apply(t *testing.T, img v1.Image) string {
	t.Helper()
	root := t.TempDir()
	layers, err := img.Layers()
	must(t, err)
	for _, l := range layers {
		rc, err := l.Uncompressed()
		must(t, err)
		_, err = archive.Apply(context.Background(), root, rc)
		must(t, err)
		must(t, rc.Close())
	}
	return root
}

// mountStock mounts every layer of an eStargz image by the stock stargz library
// and lays them over each other, as a snapshotter would.
func mountStock(t *testing.T, ref name.Reference, img v1.Image) string {
	t.Helper()
	hosts := func(reference.Spec) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{
			Client: &http.Client{Transport: http.DefaultTransport}, Header: http.Header{}, Host: ref.Context().RegistryStr(), Scheme: "http", Path: "/v2",
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
		}}, nil
	}
	filesystem, err := stargz.NewFilesystem(t.TempDir(), config.Config{NoPrefetch: true, NoBackgroundFetch: true, NoPrometheus: true},
		stargz.WithGetSources(source.FromDefaultLabels(hosts)))
	must(t, err)
	m, err := img.Manifest()
	must(t, err)
	var digests, lower []string
	for _, l := range m.Layers {
		digests = append(digests, l.Digest.String())
	}
	for _, l := range m.Layers {
		toc := l.Annotations["containerd.io/snapshot/stargz/toc.digest"]
		if toc == "" {
			t.Fatalf("layer %s has no TOC digest", l.Digest)
		}
		at := t.TempDir()
		must(t, filesystem.Mount(context.Background(), at, map[string]string{
			"containerd.io/snapshot/remote/stargz.reference": ref.Name(),
			"containerd.io/snapshot/remote/stargz.digest":    l.Digest.String(),
			"containerd.io/snapshot/remote/stargz.layers":    strings.Join(digests, ","),
			"containerd.io/snapshot/stargz/toc.digest":       toc,
		}))
		t.Cleanup(func() { must(t, unix.Unmount(at, unix.MNT_DETACH)) })
		lower = append([]string{at}, lower...)
	}
	merged := t.TempDir()
	if len(lower) == 1 {
		lower = append(lower, t.TempDir()) // overlayfs wants two
	}
	must(t, unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")))
	t.Cleanup(func() { must(t, unix.Unmount(merged, unix.MNT_DETACH)) })
	return merged
}

// walk describes every file below root in words that two trees can be compared
// by: type, mode, owner, time in whole seconds, size, link target, device,
// xattrs, content, and which names are one file.
func walk(t *testing.T, root string) map[string]string {
	t.Helper()
	type inode struct{ dev, ino uint64 }
	found := map[string]string{}
	names := map[inode][]string{}
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == "." {
			return err // the root is the runtime's, not the image's
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		words := []string{fmt.Sprintf("mode %o", st.Mode), fmt.Sprintf("owner %d:%d", st.Uid, st.Gid), fmt.Sprintf("mtime %d", st.Mtim.Sec)}
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			sum, err := contentOf(path)
			if err != nil {
				return err
			}
			words = append(words, fmt.Sprintf("size %d", st.Size), "content "+sum)
		case syscall.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			words = append(words, "to "+to)
		case syscall.S_IFBLK, syscall.S_IFCHR:
			words = append(words, fmt.Sprintf("device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
		}
		x, err := xattrsOf(path)
		if err != nil {
			return err
		}
		found[rel] = strings.Join(append(words, x...), ", ")
		if st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
			key := inode{st.Dev, st.Ino}
			names[key] = append(names[key], rel)
		}
		return nil
	}))
	for _, same := range names {
		if len(same) > 1 {
			slices.Sort(same)
			for _, n := range same {
				found[n] += ", one file with " + strings.Join(same, " ")
			}
		}
	}
	return found
}

func contentOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), err
}

func xattrsOf(path string) ([]string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs of %s: %w", path, err)
	}
	var words []string
	for _, raw := range bytes.Split(bytes.TrimSuffix(buf[:n], []byte{0}), []byte{0}) {
		key := string(raw)
		if key == "" || strings.HasPrefix(key, "trusted.overlay.") || strings.HasPrefix(key, "user.overlay.") {
			continue // how overlayfs is told of opaque directories, not the image's
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, key, value)
		if err != nil {
			return nil, fmt.Errorf("xattr %s of %s: %w", key, path, err)
		}
		words = append(words, fmt.Sprintf("xattr %s=%x", key, value[:n]))
	}
	slices.Sort(words)
	return words, nil
}

// compare requires two walks to be equal.
func compare(t *testing.T, want, got map[string]string) {
	t.Helper()
	shown := 0
	report := func(format string, args ...any) {
		if shown++; shown <= 20 {
			t.Errorf(format, args...)
		}
	}
	for path, w := range want {
		if g, ok := got[path]; !ok {
			report("%s is missing", path)
		} else if g != w {
			report("%s:\n is   %s\n want %s", path, g, w)
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			report("%s should not be there: %s", path, got[path])
		}
	}
	if shown > 20 {
		t.Errorf("and %d more differences", shown-20)
	}
}
