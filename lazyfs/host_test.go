package lazyfs

import (
	"testing"
)

func TestMountLazily(t *testing.T) {
	im := newSample(1, 200, 700<<10)
	b := newBed(t, nil).start(im)
	target := b.mount(im, "a")
	if err := im.same(target); err != nil {
		t.Fatal(err)
	}
	l, _ := b.Layer(im.digest)
	if !l.Complete() {
		t.Errorf("%d of %d chunks missing after all was read", l.Left(), l.Len())
	}
	if m := b.mountsNow(); len(m) != 1 || !m[0].Lazy || m[0].Dead || m[0].Digest != im.digest || m[0].Target != target || m[0].HolderPID == 0 {
		t.Errorf("%+v", m)
	}
	if err := b.Unmount(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	if m := b.mountsNow(); len(m) != 0 {
		t.Errorf("left: %+v", m)
	}
	if err := b.Remove(t.Context(), im.digest); err != nil {
		t.Fatal(err)
	}
	t.Log(b.Holders())
}
