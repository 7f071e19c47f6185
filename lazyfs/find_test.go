package lazyfs

import "testing"

// File tells the same as a walk through the TOC, also behind content that was replaced.
func TestFile(t *testing.T) {
	z := ours(t, tarOf(aFile("gone", noise(100_000, 1)), aDir("d"), aFile("d/b", noise(9_000_000, 2)), aFile("d/a", "small"),
		aLink("d/hard", "d/b"), aFile("gone", ""), aFile("top", noise(10, 3)), aSymlink("soft", "top"), aDir("e"), aFile("e/x", "x")))
	l, err := Build(z.toc, z.tocOffset)
	must(err)
	want := map[string]Entry{}
	must(EachEntry(z.toc, func(e Entry) error {
		switch {
		case e.Name == ".no.prefetch.landmark": // the format's own
		case e.Type == "reg" && e.Size > 0:
			e.Digest, e.Name = "", string(clean([]byte(e.Name)))
			want[e.Name] = e
		case e.Type == "hardlink":
			e = want[e.LinkName]
			e.Name = "d/hard"
			want[e.Name] = e
		case e.Type == "reg":
			delete(want, e.Name)
		}
		return nil
	}))
	if len(want) != 5 {
		t.Fatalf("the TOC has %d files: %v", len(want), want)
	}
	for path, e := range want {
		if got, ok := l.File(path); !ok || got != e {
			t.Errorf("%s: %+v, %v, want %+v", path, got, ok, e)
		}
	}
	for _, path := range []string{"", ".", "/", "/top", "d", "d/", "d/c", "gone", "soft", "top/x", "d//a", "d/../top", "zzz"} {
		if e, ok := l.File(path); ok {
			t.Errorf("%q is %+v", path, e)
		}
	}
}
