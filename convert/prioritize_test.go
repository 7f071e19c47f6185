package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// inOrder are the names in a layer's tar.
func inOrder(t *testing.T, blob []byte) []string {
	t.Helper()
	var names []string
	for tr := tar.NewReader(bytes.NewReader(inflateAll(t, blob))); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		must(err)
		names = append(names, h.Name)
	}
}

func prioritized(t *testing.T, c *Converter, src []byte, list ...string) *Result {
	t.Helper()
	res, err := c.Convert(context.Background(), Source{Repository: "r.test/app", Image: imageOf(t, layerOf(gz(src), src))}, Options{Prioritized: list})
	must(err)
	t.Cleanup(func() { res.Close() })
	return res
}

// TestPrioritized: what is named comes first, with its parents and its links, and
// then the landmark; the tree stays the same.
func TestPrioritized(t *testing.T) {
	src := tarOf(
		dir("usr/"), dir("usr/bin/"), file("usr/bin/a", text(300_000, 1)), file("usr/bin/python", text(600_000, 2), xattr("user.x", "1")),
		dir("usr/lib/"), file("usr/lib/z", "z"), link("usr/lib/y", "usr/lib/z"), symlink("usr/lib/x", "z"),
		file("usr/lib/twice", "1"), file("usr/lib/twice", "2"), file("etc/.wh.gone", ""),
		file("app.py", "print()"), file("empty", ""), file("last", noise(100_000, 3)),
	)
	for name, c := range map[string]struct {
		list []string
		want string // the entries up to the landmark; "" for the source's order
	}{
		"files":       {[]string{"/app.py", "usr/bin/python"}, "app.py usr/ usr/bin/ usr/bin/python"},
		"a link":      {[]string{"usr/lib/y"}, "usr/ usr/lib/ usr/lib/z usr/lib/y"},
		"a symlink":   {[]string{"./usr/lib/x", "empty", "usr/lib/x"}, "usr/ usr/lib/ usr/lib/x empty"},
		"ambiguous":   {[]string{"usr/lib/twice", "etc/.wh.gone", "last"}, "last"},
		"not there":   {[]string{"nothing", "", "/", "../../app.py"}, "app.py"},
		"none at all": {[]string{"nothing"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			conv := newConverter(t, 2)
			res := prioritized(t, conv, src, c.list...)
			checkSame(t, imageOf(t, layerOf(gz(src), src)), res.Image, nil)
			blob := bytesOf(t, layers(t, res.Image)[0])
			names := inOrder(t, blob)
			at := slices.Index(names, estargz.PrefetchLandmark)
			if c.want == "" {
				if at >= 0 || !slices.Contains(names, estargz.NoPrefetchLandmark) {
					t.Errorf("a landmark without prioritized files: %q", names)
				}
				return
			}
			if at < 0 || strings.Join(names[:at], " ") != c.want {
				t.Errorf("first come %q, want %q", names[:max(0, at)], c.want)
			}
			if slices.Contains(names, estargz.NoPrefetchLandmark) {
				t.Error("both landmarks")
			}
			again := bytesOf(t, layers(t, prioritized(t, newConverter(t, 1), src, c.list...).Image)[0])
			if string(again) != string(blob) {
				t.Error("not reproducible")
			}
		})
	}
}

// TestPrioritizedLikeStock: the stock library given the same list puts the same
// files before the landmark.
func TestPrioritizedLikeStock(t *testing.T) {
	src := tarOf(dir("d/"), file("d/a", text(70_000, 1)), file("d/b", "b"), link("d/c", "d/b"), file("e", "e"), file("f", "f"))
	list := []string{"f", "d/c", "d/a"}
	ours := inOrder(t, bytesOf(t, layers(t, prioritized(t, newConverter(t, 2), src, list...).Image)[0]))
	stock := inOrder(t, stockBuild(t, src, estargz.WithPrioritizedFiles(list)))
	first := func(names []string) []string {
		names = slices.Clone(names[:slices.Index(names, estargz.PrefetchLandmark)])
		slices.Sort(names)
		return names
	}
	if got, want := first(ours), first(stock); !slices.Equal(got, want) {
		t.Errorf("before the landmark %q, stock has %q", got, want)
	}
}

// TestPrioritizedAgain: a layer that has landmarks already, and a memo that keeps
// the orders apart.
func TestPrioritizedAgain(t *testing.T) {
	src := tarOf(file("a", text(1000, 1)), file("b", text(1000, 2)))
	blob := stockBuild(t, src, estargz.WithPrioritizedFiles([]string{"b"}))
	inner := inflateAll(t, blob)
	l := layerOf(gz(inner), inner) // no eStargz any more, but its leftovers
	l.mediaType = types.OCILayer
	conv := newConverter(t, 2)
	memo := &mapMemo{m: map[string]LayerMemo{}}
	var digests []string
	for _, list := range [][]string{{"a"}, nil, {"b"}, {"a"}} {
		res, err := conv.Convert(context.Background(), Source{Repository: "r.test/app", Image: imageOf(t, l)}, Options{Prioritized: list, Memo: memo})
		must(err)
		defer res.Close()
		digests = append(digests, res.Mappings[0].Layers[0].Target.String()+res.Mappings[0].Params)
	}
	if digests[0] != digests[3] || digests[0] == digests[1] || digests[0] == digests[2] || digests[1] == digests[2] {
		t.Errorf("lists a, none, b, a gave %q", digests)
	}
	if memo.hits != 1 {
		t.Errorf("%d memo hits, want one", memo.hits)
	}
	res := prioritized(t, conv, inner, "a")
	if names := inOrder(t, bytesOf(t, layers(t, res.Image)[0])); names[0] != "a" || names[1] != estargz.PrefetchLandmark || slices.Index(names[2:], estargz.PrefetchLandmark) >= 0 {
		t.Errorf("entries %q", names)
	}
}

func TestPrioritizedTooMany(t *testing.T) {
	list := make([]string, maxPrioritized+1)
	for i := range list {
		list[i] = fmt.Sprint(i)
	}
	for name, l := range map[string][]string{"number": list, "length": {strings.Repeat("x", maxPathBytes+1)}} {
		if _, err := newPriorities(l); err == nil {
			t.Errorf("no error for the %s", name)
		}
	}
}
