package convert

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

func diffOf(t *testing.T, a, b v1.Image, o DiffOptions) []string {
	t.Helper()
	ds, err := Diff(context.Background(), a, b, o)
	must(err)
	var out []string
	for _, d := range ds {
		out = append(out, d.String())
	}
	return out
}

// TestDiffSays: each thing that can differ is found, and said.
func TestDiffSays(t *testing.T) {
	common := []tarEntry{dir("d"), file("d/same", "same")}
	for name, c := range map[string]struct {
		a, b []tarEntry
		want string // the only line; empty: none
	}{
		"nothing":     {[]tarEntry{file("a", "x")}, []tarEntry{file("./a", "x")}, ""},
		"fraction":    {[]tarEntry{file("a", "x", at(time.Unix(5, 6e8)), format(tar.FormatPAX))}, []tarEntry{file("a", "x", at(time.Unix(5, 0)))}, ""},
		"missing":     {[]tarEntry{file("d/a", "x")}, nil, `layer 1: "/d/a" (file of 1 bytes) is only in the first`},
		"extra":       {nil, []tarEntry{symlink("d/a", "x")}, `layer 1: "/d/a" (symlink to "x") is only in the second`},
		"name":        {[]tarEntry{file("caf\xe9", "x")}, []tarEntry{file("caf\xe9", "y")}, `layer 1: "/caf\xe9": content is sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881 in the first, sha256:a1fce4363854ff888cff4b8e7875d600c2682390412a8cf79b37d0b11148b0fa in the second`},
		"type":        {[]tarEntry{file("a", "")}, []tarEntry{fifo("a")}, `layer 1: "/a": type is file of 0 bytes in the first, fifo in the second`},
		"mode":        {[]tarEntry{file("a", "x", mode(0o4755))}, []tarEntry{file("a", "x", mode(0o755))}, `layer 1: "/a": mode is 4755 in the first, 0755 in the second`},
		"owner":       {[]tarEntry{file("a", "x", owner(1, 0))}, []tarEntry{file("a", "x", owner(2, 0))}, `layer 1: "/a": uid is 1 in the first, 2 in the second`},
		"time":        {[]tarEntry{file("a", "x", at(time.Unix(5, 0)))}, []tarEntry{file("a", "x", at(time.Unix(6, 0)))}, `layer 1: "/a": modification time is 1970-01-01T00:00:05Z in the first, 1970-01-01T00:00:06Z in the second`},
		"xattr":       {[]tarEntry{file("a", "x", xattr("user.k", "\x01"))}, []tarEntry{file("a", "x")}, `layer 1: "/a": extended attribute "user.k" is "\x01" in the first, absent in the second`},
		"target":      {[]tarEntry{symlink("a", "x")}, []tarEntry{symlink("a", "y")}, `layer 1: "/a": target is "x" in the first, "y" in the second`},
		"device":      {[]tarEntry{device("a", tar.TypeChar, 1, 3)}, []tarEntry{device("a", tar.TypeChar, 1, 5)}, `layer 1: "/a": device is 1:3 in the first, 1:5 in the second`},
		"size":        {[]tarEntry{file("a", "x")}, []tarEntry{file("a", "xx")}, `layer 1: "/a": size is 1 in the first, 2 in the second`},
		"link broken": {[]tarEntry{file("a", "x"), link("b", "a")}, []tarEntry{file("a", "x"), file("b", "x")}, `layer 1: "/b": hard link is "/a" in the first, a file of its own in the second`},
		"other link":  {[]tarEntry{file("a", "x"), file("b", "x"), link("c", "a")}, []tarEntry{file("a", "x"), file("b", "x"), link("c", "b")}, `"/c": hard link is "/a" in the first, "/b" in the second`},
		"whiteout":    {[]tarEntry{file("d/.wh.x", "")}, []tarEntry{file("d/.wh.y", "")}, `"/d/.wh.x" (file of 0 bytes) is only in the first`},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := imageOf(t, gzLayer(append(slices.Clone(common), c.a...)...)), imageOf(t, gzLayer(append(slices.Clone(common), c.b...)...))
			for _, o := range []DiffOptions{{}, {SampleBytes: 1 << 20}} {
				got := diffOf(t, a, b, o)
				if c.want == "" && len(got) > 0 || c.want != "" && (len(got) == 0 || !slices.ContainsFunc(got, func(g string) bool { return strings.HasSuffix(g, c.want) })) {
					t.Errorf("%+v: %q, want %q", o, got, c.want)
				}
			}
		})
	}
}

func TestDiffConfig(t *testing.T) {
	a := imageOf(t, gzLayer(file("a", "x")))
	c, _ := a.ConfigFile()
	c = c.DeepCopy()
	c.Config.Entrypoint = []string{"/bin/sh"}
	b, err := mutate.ConfigFile(a, c)
	must(err)
	if got := diffOf(t, a, b, DiffOptions{}); len(got) != 1 || !strings.Contains(got[0], `"config"`) || !strings.Contains(got[0], "/bin/sh") {
		t.Error(got)
	}
}

// TestDiffFlattened: images with different numbers of layers are compared as the
// container sees them.
func TestDiffFlattened(t *testing.T) {
	a := imageOf(t,
		gzLayer(dir("d"), file("d/gone", "x"), file("d/stays", "x"), dir("o"), file("o/hidden", "x"), file("f", "old"), file("replaced/by/file", "x")),
		gzLayer(file("d/.wh.gone", ""), dir("o"), file("o/.wh..wh..opq", ""), file("o/new", "n"), file("f", "new"), file("replaced", "x")),
	)
	b := imageOf(t, gzLayer(dir("d"), file("d/stays", "x"), dir("o"), file("o/new", "n"), file("f", "new"), file("replaced", "x")))
	for _, d := range diffOf(t, a, b, DiffOptions{}) {
		if !strings.Contains(d, `"history"`) {
			t.Error(d)
		}
	}
	c := imageOf(t, gzLayer(dir("d"), file("d/stays", "x"), dir("o"), file("o/new", "n"), file("f", "old"), file("replaced", "x")))
	if got := diffOf(t, a, c, DiffOptions{}); !slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, `"/f": content`) }) {
		t.Error(got)
	}
}

// TestDiffSampled reads little of layers that are alike.
func TestDiffSampled(t *testing.T) {
	src := tarOf(append(manyFiles(100, 4000), file("big", noise(4<<20, 1)))...)
	l := layerOf(gz(src), src)
	res := converted(t, newConverter(t, 2), imageOf(t, l))
	read := 0
	l.open = func(b []byte) io.ReadCloser { return io.NopCloser(countTo{section(b), &read}) }
	if got := diffOf(t, imageOf(t, l), res.Image, DiffOptions{SampleBytes: 100_000}); len(got) > 0 {
		t.Error(got)
	}
	if read > len(l.blob)/4 {
		t.Errorf("read %d of %d bytes", read, len(l.blob))
	}
}

func TestDiffEnds(t *testing.T) {
	a := manyFiles(50, 10)
	if got := diffOf(t, imageOf(t, gzLayer(a...)), imageOf(t, gzLayer()), DiffOptions{MaxDifferences: 3}); len(got) != 3 {
		t.Error(got)
	}
	wrong := errors.New("the digest does not hold")
	l := gzLayer(a...)
	l.open = func(b []byte) io.ReadCloser { return io.NopCloser(io.MultiReader(section(b), failing{wrong})) }
	if _, err := Diff(context.Background(), imageOf(t, gzLayer()), imageOf(t, l), DiffOptions{}); !errors.Is(err, wrong) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(wrong)
	if _, err := Diff(ctx, imageOf(t, gzLayer()), imageOf(t, gzLayer(a...)), DiffOptions{}); !errors.Is(err, wrong) {
		t.Error(err)
	}
}
