package lazyfs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Completion gives new containers a plain mount, and running ones keep the old.
func TestCompleteSwapsTheMount(t *testing.T) {
	for _, propagation := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
		t.Run(map[uintptr]string{unix.MS_PRIVATE: "private", unix.MS_SHARED: "shared"}[propagation], func(t *testing.T) {
			im := newSample(4, 40, 300<<10)
			b := newBed(t, nil).start(im)
			mountPlace(t, b.mounts, propagation)
			target := b.mount(im, "a")
			if err := b.Complete(t.Context(), im.digest); !errors.Is(err, ErrIncomplete) {
				t.Error("completed what is not:", err)
			}
			old, err := os.Open(filepath.Join(target, im.names[0]))
			if err != nil {
				t.Fatal(err)
			}
			defer old.Close()
			container := overlay(t, b, target, "old")
			l, _ := b.Layer(im.digest)
			putAll(t, l, im)
			if err := b.Complete(t.Context(), im.digest); !errors.Is(err, ErrIncomplete) {
				t.Error("what may be taken back:", err)
			}
			fillAll(t, l, im)
			if err := b.Complete(t.Context(), im.digest); err != nil {
				t.Fatal(err)
			}
			if m := b.mountsNow(); len(m) != 1 || m[0].Lazy || m[0].Target != target {
				t.Errorf("%+v", m)
			}
			if err := b.Complete(t.Context(), im.digest); err != nil {
				t.Error("again:", err)
			}
			if err := im.same(target); err != nil {
				t.Error("new:", err)
			}
			if err := im.same(container); err != nil {
				t.Error("running:", err)
			}
			if got, err := io.ReadAll(old); err != nil || string(got) != string(im.files[im.names[0]]) {
				t.Error("open file:", err)
			}
			if err := im.same(overlay(t, b, target, "new")); err != nil {
				t.Error("new container:", err)
			}
			if n := b.opens(); n != 1 {
				t.Errorf("%d files are open in the holder", n)
			}
			b.unmount(target)
			if err := b.Remove(t.Context(), im.digest, nil); !errors.Is(err, ErrInUse) {
				t.Error("removed under a running container:", err)
			}
			old.Close()
			unmountOverlay(t, container)
			until(t, "the holder has nothing open", func() bool { return b.opens() == 0 })
		})
	}
}

// mountPlace makes a mount at dir with that propagation, as hosts have it: shared.
func mountPlace(t *testing.T, dir string, propagation uintptr) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", propagation, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

// overlay is what a container has of the layer at target.
func overlay(t *testing.T, b *bed, target, name string) string {
	t.Helper()
	base := filepath.Join(t.TempDir(), name)
	for _, dir := range []string{"upper", "work", "root"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(base, "root")
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", target, base, base)
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		t.Fatal("mount overlay:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	return root
}

func unmountOverlay(t *testing.T, root string) {
	t.Helper()
	if err := unix.Unmount(root, 0); err != nil {
		t.Fatal(err)
	}
}

// Kernels before 6.5 cover the old mount with the new one; and a crash may leave one put beneath.
func TestStackedMounts(t *testing.T) {
	for name, flags := range map[string]int{"over": 0, "beneath": moveBeneath} {
		t.Run(name, func(t *testing.T) {
			im := newSample(16, 5, 1000)
			b := newBed(t, nil).start(im)
			target := b.mount(im, "a")
			l, _ := b.Layer(im.digest)
			fillAll(t, l, im)
			fd, err := b.makePlain(l)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if err := attach(fd, target, flags); err != nil {
				t.Fatal(err)
			}
			stack := stackAt(b.mountsNow(), target)
			if len(stack) != 2 || stack[0].Lazy != (name == "over") || stack[1].Lazy == stack[0].Lazy {
				t.Fatalf("%+v", stack)
			}
			if err := b.Complete(t.Context(), im.digest); err != nil {
				t.Fatal(err)
			}
			stack = stackAt(b.mountsNow(), target)
			if top := stack[len(stack)-1]; top.Lazy {
				t.Errorf("%+v", stack)
			}
			if err := im.same(target); err != nil {
				t.Error(err)
			}
			b.unmount(target)
			if m := b.mountsNow(); len(m) != 0 {
				t.Errorf("left: %+v", m)
			}
			if err := b.Remove(t.Context(), im.digest, nil); err != nil {
				t.Error(err)
			}
		})
	}
}
