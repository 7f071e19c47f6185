package lazyfs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"archive/tar"
	"crypto/sha256"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/stargz-snapshotter/estargz"
	"golang.org/x/sys/unix"
)

// everything is a layer with one of each kind, and those that are hard to get right.
func everything() []tarEntry {
	deep := strings.Repeat("d/", 200)
	all := []tarEntry{
		aDir("./", withMode(0o711), owned(3, 4), at(12345)),
		aDir("etc/"), aDir("tmp", withMode(0o1777)), aDir("owned", owned(70000, 4_000_000_000), at(1)),
		aFile("etc/passwd", "root:x:0:0\n", owned(0, 42)), aFile("etc/shadow", "secret", withMode(0o640), owned(0, 42)),
		aFile("etc/empty", ""), aFile("etc/empty2", "", at(0)),
		aFile("bin/su", "binary", withMode(0o4755)), aFile("bin/wall", "binary", withMode(0o2755)), aFile("bin/none", "x", withMode(0)),
		aFile("no/parents/here", "x"),
		aFile("one-block", noise(4096, 1)), aFile("two", noise(4097, 2)), aFile("almost", noise(4095, 3)),
		aFile("large", noise(3<<20+17, 4)), aFile("zeros", string(make([]byte, 1<<20))),
		aSymlink("etc/mtab", "../proc/mounts"), aSymlink("long-link", strings.Repeat("x/", 1500)), aSymlink("longest", strings.Repeat("y", 4095)),
		aLink("bin/su2", "bin/su", withMode(0o4755)), aLink("a-link", "large"), aLink("tmp/another", "a-link"), aLink("link-to-symlink", "etc/mtab"),
		aDevice("dev/null", tar.TypeChar, 1, 3, withMode(0o666)), aDevice("dev/sda", tar.TypeBlock, 8, 0), aDevice("dev/high", tar.TypeChar, 4000, 1_000_000),
		aFIFO("run/pipe"), aDevice("dev/whiteout-like", tar.TypeChar, 0, 0),
		aFile("äöü/日本語/файл", "unicode"), aFile("with space\nand newline\"<&>\\", "odd"), aFile("-!#", "before the dots"), aFile("!bang", "too"),
		aFile(deep+"leaf", "deep"),
		aFile(strings.Repeat("n", 255), "longest name"), aDir(strings.Repeat("m", 255)),
		aFile("cap", "x", withXattr("security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")),
		aFile("xattrs", "x", withXattr("user.one", "1"), withXattr("user.empty", ""), withXattr("trusted.two", "2\x00\xff"), withXattr("user.long", noise(2000, 5))),
		aDir("dir-xattrs", withXattr("user.one", "1"), withXattr("trusted.overlay.opaque", "y")),
		aFile("acl", "x", withMode(0o664), withXattr("system.posix_acl_access", acl)), aDir("acl-dir", withXattr("system.posix_acl_default", acl)),
		aSymlink("link-xattrs", "x", withXattr("trusted.t", "v"), withXattr("user.not", "allowed")),
		aFile("odd-namespace", "x", withXattr("btrfs.compression", "zstd")),
		aFile("old", "x", at(-86400)), aFile("far", "x", at(7_000_000_000)),
		aFile("many-xattrs", "x", manyXattrs(90)...),
	}
	for i := range 300 {
		all = append(all, aFile(fmt.Sprintf("labelled/%03d", i), fmt.Sprint(i), withXattr("security.selinux", "system_u:object_r:container_file_t:s0"), owned(i, i), at(int64(i))))
	}
	return all
}

// acl is "u::rw-,u:5:r--,g::rw-,m::rw-,o::r--".
const acl = "\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x05\x00\x00\x00" + "\x04\x00\x06\x00\xff\xff\xff\xff" +
	"\x10\x00\x06\x00\xff\xff\xff\xff" + "\x20\x00\x04\x00\xff\xff\xff\xff"

func manyXattrs(n int) (out []tarOption) {
	for i := range n {
		out = append(out, withXattr(fmt.Sprintf("user.number-%d", i), fmt.Sprint(i)))
	}
	return out
}

// TestSameAsContainerd: with all of it, and in every form that a layer may have, the mount
// is what containerd unpacks.
func TestSameAsContainerd(t *testing.T) {
	needRoot(t)
	layers := map[string][]tarEntry{
		"everything": everything(),
		"empty":      {},
		"one empty":  {aFile("a", "")},
		"only dirs":  {aDir("a"), aDir("a/b")},
		"whiteouts":  {aDir("d"), aFile("d/.wh..wh..opq", ""), aFile("d/new", "x"), aFile("e/.wh.gone", ""), aFile("e/new", "x"), aFile(".wh.top", ""), aFile("implicit/.wh.x", "")},
		"replaced": {aFile("a", "first"), aLink("b", "a"), aFile("a", "second"), aDir("c"), aFile("c/x", "below"), aFile("c", "a file now"),
			aFile("d", "a file"), aDir("d"), aFile("d/y", "below"), aDir("e", withMode(0o700), withXattr("user.a", "1")), aDir("e", withMode(0o755), withXattr("user.b", "2"))},
		"odd names": {aFile("/absolute", "x"), aFile("../../up", "y"), aFile("./dot/../dot2/f", "z"), aFile("a//b/./c", "w")},
	}
	for name, entries := range layers {
		for form, make := range forms {
			if name == "replaced" && form != "ours" {
				continue // the stock library keeps one entry for each name, with links to that
			}
			t.Run(name+"/"+form, func(t *testing.T) {
				raw := tarOf(entries...)
				want := unpacked(t, raw)
				got := mounted(t, stored(t, make(t, raw)))
				sameTree(t, walked(t, want), walked(t, got), named(entries))
			})
		}
	}
}

// forms are the ways in which a layer becomes eStargz.
var forms = map[string]func(testing.TB, []byte) esgz{
	"ours":         ours,
	"stock":        func(t testing.TB, b []byte) esgz { return stock(t, b) },
	"small chunks": func(t testing.TB, b []byte) esgz { return stock(t, b, estargz.WithChunkSize(5000)) },
	"shared member": func(t testing.TB, b []byte) esgz {
		return stock(t, b, estargz.WithChunkSize(100_000), estargz.WithMinChunkSize(400_000))
	},
}

// unpacked applies the layer with containerd.
func unpacked(t testing.TB, layer []byte) string {
	t.Helper()
	d := t.TempDir()
	if _, err := archive.Apply(context.Background(), d, bytes.NewReader(layer), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
		t.Fatal(err)
	}
	return d
}

// named is the paths that have an entry: what others have for a time, nobody said.
func named(entries []tarEntry) map[string]bool {
	names := map[string]bool{}
	for _, e := range entries {
		names[string(clean([]byte(e.h.Name)))] = true
	}
	return names
}

// seen is what a walk sees of one name.
type seen struct {
	mode, uid, gid uint32
	links, rdev    uint64
	sizeBytes      int64
	mtime          int64
	link           string
	xattrs         string
	content        [32]byte
	group          string // the first of all its names
}

func walked(t testing.TB, root string) map[string]seen {
	t.Helper()
	all := map[string]seen{}
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		must(err)
		var st unix.Stat_t
		must(unix.Lstat(path, &st))
		rel, err := filepath.Rel(root, path)
		must(err)
		s := seen{
			mode: st.Mode, uid: st.Uid, gid: st.Gid, rdev: st.Rdev,
			links: uint64(st.Nlink), //nolint:unconvert // 32 bits on arm64
			mtime: st.Mtim.Sec, xattrs: xattrsOf(path), group: rel,
		}
		if st.Mtim.Nsec != 0 {
			s.mtime = -1 // an implicit directory's
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			s.sizeBytes = st.Size
			b, err := os.ReadFile(path)
			must(err)
			s.content = sha256.Sum256(b)
		case unix.S_IFLNK:
			s.sizeBytes = st.Size
			s.link, err = os.Readlink(path)
			must(err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if f, ok := first[st.Ino]; ok {
				s.group = f
			} else {
				first[st.Ino] = rel
			}
		}
		all[rel] = s
		return nil
	})
	must(err)
	return all
}

func xattrsOf(path string) string {
	names := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, names)
	must(err)
	var out []string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			out = append(out, fmt.Sprintf("%s: %v", name, err))
			continue
		}
		out = append(out, fmt.Sprintf("%s=%q", name, value[:n]))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// sameTree compares. Of the root containerd takes nothing from a layer; all whiteouts are one
// inode here, as overlayfs itself has them.
func sameTree(t testing.TB, want, got map[string]seen, named map[string]bool) {
	t.Helper()
	for path, w := range want {
		g, ok := got[path]
		if !ok {
			t.Errorf("%s is missing", quoted(path))
			continue
		}
		if path == "." {
			w.mode, w.uid, w.gid, w.mtime, w.xattrs = g.mode, g.uid, g.gid, g.mtime, g.xattrs
		}
		if w.mode&unix.S_IFMT == unix.S_IFDIR && !named[path] {
			w.mtime, g.mtime = 0, 0
		}
		if w.mode&unix.S_IFMT == unix.S_IFCHR && w.rdev == 0 && !named[path] {
			w.mtime, g.mtime, w.group, g.group, w.links, g.links, w.mode, g.mode = 0, 0, "", "", 0, 0, 0, 0
		}
		if w != g {
			t.Errorf("%s:\nwant %+v\ngot  %+v", quoted(path), w, g)
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%s is too much", quoted(path))
		}
	}
}
