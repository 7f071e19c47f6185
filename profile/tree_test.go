package profile_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"accel"
	"accel/profile"

	"github.com/containerd/stargz-snapshotter/estargz"
)

func device(name string) *estargz.TOCEntry { return &estargz.TOCEntry{Name: name, Type: "char"} }

func TestTree(t *testing.T) {
	tree := treeOf(t,
		layerOf(t, dir(""), dir("usr"), dir("usr/bin"), symlink("bin", "usr/bin"), file("usr/bin/python3.11", 100, "py"), symlink("usr/bin/python3", "python3.11"),
			symlink("usr/bin/python", "/usr/bin/python3"), symlink("loop", "loop"), symlink("up", "../../../../bin/python"), file("etc/gone", 1, "x"), file("etc/kept", 1, "y"),
			file("var/a/b", 1, "z"), file("dirtofile/x", 1, "q"), device("dev/null"), hardlink("usr/bin/py2", "usr/bin/py1"), hardlink("usr/bin/py1", "usr/bin/python3.11")),
		layerOf(t, file("etc/new", 1, "n"), file("etc/.wh.gone", 0, ""), file("var/a/c", 1, "c"), file("var/a/.wh..wh..opq", 0, ""), file("dirtofile", 5, "f"),
			file("etc/kept", 7, "kept again"), file("a/b/../c", 1, "abc"), file("stargz.index.json", 9, "toc")),
	)
	for name, want := range map[string]string{
		"/bin/python":             "usr/bin/python3.11",
		"bin/python3":             "usr/bin/python3.11",
		"up":                      "usr/bin/python3.11",
		"bin/../etc/kept":         "etc/kept: no, usr/etc",
		"/../..//usr/./bin/../":   "usr",
		"loop":                    "",
		"etc/gone":                "",
		"etc/new":                 "etc/new",
		"var/a/b":                 "",
		"var/a/c":                 "var/a/c",
		"dirtofile/x":             "",
		"dirtofile":               "dirtofile",
		"a/c":                     "a/c",
		"":                        "",
		"dev/null":                "dev/null",
		"stargz.index.json":       "",
		strings.Repeat("a", 5000): "",
	} {
		if name == "bin/../etc/kept" { // the kernel goes up from the link's target
			want = ""
		}
		if _, real := tree.Resolve(name); real != want {
			t.Errorf("%.40q is %q, want %q", name, real, want)
		}
	}
	if e, real := tree.Lookup("bin/python"); e == nil || e.Kind != "symlink" || real != "usr/bin/python" {
		t.Errorf("%+v, %q", e, real)
	}
	if e, real := tree.Resolve("/bin/py2"); e == nil || e.Path != "usr/bin/python3.11" || real != "usr/bin/py2" || !e.Executable() {
		t.Errorf("%+v, %q", e, real)
	}
	if e, _ := tree.Resolve("etc/kept"); e.Layer != 1 || e.Size != 7 {
		t.Errorf("%+v", e)
	}
	if got := fmt.Sprint(tree.Names("/etc"), tree.Names("bin"), tree.Names("nowhere"), tree.Names("dirtofile")); got != "[kept new] [py1 py2 python python3 python3.11] [] []" {
		t.Error(got)
	}
	if got := fmt.Sprint(tree.Names("/")); got != "[a bin dev dirtofile etc loop up usr var]" {
		t.Error(got)
	}
	n := 0
	for range tree.Files("usr") {
		n++
		if n == 3 {
			break
		}
	}
	if n != 3 {
		t.Errorf("%d files", n)
	}
}

func TestTreeRefuses(t *testing.T) {
	for _, bad := range []string{"", "[]", "{", `{"entries":{}}`, `{"entries":[{"name":5}]}`, `{"entries":[]`, `{"entries":[]}x`, `{"entries":[{"name":"` + strings.Repeat("a/", 2100) + `"}]}`} {
		if _, err := profile.NewTree(t.Context(), [][]byte{[]byte(bad)}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%.40s: %v", bad, err)
		}
	}
	if _, err := profile.NewTree(t.Context(), make([][]byte, 513)); !errors.Is(err, accel.ErrInvalid) {
		t.Error(err)
	}
	if tree, err := profile.NewTree(t.Context(), [][]byte{nil, []byte(`{"version":1,"odd":{"a":[1]},"entries":[{"name":"a","type":"reg"}]}`)}); err != nil || len(tree.Names("/")) != 1 {
		t.Error(err)
	}
}

func FuzzTree(f *testing.F) {
	f.Add(layerOf(f, file("a/b", 100_000, "x"), symlink("l", "a"), hardlink("h", "a/b"), file("a/.wh.c", 0, "")).toc, "l/b")
	f.Fuzz(func(t *testing.T, toc []byte, name string) {
		tree, err := profile.NewTree(t.Context(), [][]byte{toc, toc})
		if err != nil {
			if !errors.Is(err, accel.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if e, real := tree.Resolve(name); e != nil {
			if again, _ := tree.Lookup(real); again != e {
				t.Fatalf("%q is %q, which is another file", name, real)
			}
		}
		for name := range tree.Files("") {
			tree.Lookup(name)
		}
		empty := layerOf(t)
		if _, err := joined(toc, empty); err != nil && !errors.Is(err, accel.ErrInvalid) {
			t.Fatal(err)
		}
	})
}
