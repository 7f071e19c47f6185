package profile_test

import (
	"testing"

	"accel"
	"accel/profile"
)

func TestInherit(t *testing.T) {
	old := treeOf(t,
		layerOf(t, file("bin/sh", 100_000, "sh"), file("lib/c.so", 200_000, "libc"), file("hidden", 10, "h")),
		layerOf(t, file("app/main.py", 1000, "v1"), file("app/moved.py", 5000, "moved"), file("app/gone.py", 50, "gone"), file("app/big", 300_000, "big1"), file("hidden", 10, "h2")))
	next := treeOf(t,
		layerOf(t, file("bin/sh", 100_000, "sh")),
		layerOf(t, file("lib/c.so", 200_000, "libc")),
		layerOf(t, file("app/main.py", 1500, "v2"), file("app/sub/moved.py", 5000, "moved"), file("app/big", 200_000, "big2"), file("hidden", 12, "h3")))
	p := accel.Profile{Manifest: imageA, Origin: accel.ProfileRecorded, Starts: 4, RecordedAt: dayOne, Items: items(t,
		"0:bin/sh:0:100000", "0:lib/c.so:4096:8192", "1:app/main.py:0:1000", "1:app/moved.py:0:5000", "1:app/gone.py:0:50",
		"1:app/big:196608:65536", "0:hidden:0:10", "7:nowhere:0:1")}
	for n := range p.Items {
		if e, _ := old.Resolve(p.Items[n].Path); e != nil {
			p.Items[n].Content = e.Content
		}
	}
	got := profile.Inherit(p, next, imageB)
	same(t, got.Items, "0:bin/sh:0:100000", "1:lib/c.so:4096:8192", "2:app/main.py:0:1000", "2:app/sub/moved.py:0:5000", "2:app/big:196608:3392", "2:hidden:0:10")
	if got.Manifest != imageB || got.Origin != accel.ProfileInherited || got.Starts != 0 {
		t.Errorf("%+v", got)
	}
	if _, err := profile.Encode(got); err != nil {
		t.Error(err)
	}
	if e, _ := next.Resolve("bin/sh"); got.Items[0].Content != e.Content || e.Content.IsZero() {
		t.Error("the content id is not the new file's")
	}
	// The same image gives the same items.
	same(t, profile.Inherit(got, next, imageB).Items, texts(got.Items)...)
}

// What an old profile claims of files that have changed is bounded.
func TestInheritBounds(t *testing.T) {
	next := treeOf(t, layerOf(t, file("a", 200<<20, "2"), file("b", 200<<20, "2b")))
	p := accel.Profile{Manifest: imageA, Items: items(t, "0:a:0:1048576", "0:b:0:209715200", "0:b:5:7")}
	got := profile.Inherit(p, next, imageB)
	if got.Bytes() != 64<<20 || got.Items[0].Bytes != 1<<20 {
		t.Errorf("%d bytes, %v", got.Bytes(), texts(got.Items))
	}
}

func TestUnion(t *testing.T) {
	a := accel.Profile{Manifest: imageA, Origin: accel.ProfileListed, Items: items(t, "0:a:0:10")}
	u := profile.Union(a, accel.Profile{Items: items(t, "0:b:0:1", "0:a:5:10")}, accel.Profile{Items: items(t, "0:b:0:3")})
	same(t, u.Items, "0:a:0:10", "0:b:0:1", "0:a:10:5", "0:b:1:2")
	if u.Origin != accel.ProfileListed || len(a.Items) != 1 {
		t.Errorf("%+v", u)
	}
}
