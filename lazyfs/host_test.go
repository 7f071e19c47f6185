package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
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
	if m := b.mountsNow(); len(m) != 1 || !m[0].Lazy || b.deadOf(m) != 0 || m[0].Digest != im.digest || m[0].Target != target {
		t.Errorf("%+v", m)
	}
	if err := b.Remove(t.Context(), im.digest, nil); !errors.Is(err, ErrInUse) {
		t.Error("removed while it is mounted:", err)
	}
	if err := b.Mount(t.Context(), im.digest, target); err != nil {
		t.Error("again:", err)
	}
	if m := b.mountsNow(); len(m) != 1 {
		t.Errorf("mounted twice: %+v", m)
	}
	b.unmount(target)
	b.unmount(target)
	if m := b.mountsNow(); len(m) != 0 {
		t.Errorf("left: %+v", m)
	}
	if err := b.Remove(t.Context(), im.digest, nil); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(b.dir, "*", "*"+im.digest.Encoded()+"*")); err != nil || len(left) > 0 {
		t.Error("left:", left, err)
	}
	if l.Put(0, im.chunks[0]) == nil || l.Has(0) || l.Len() != 0 || l.Sync() == nil {
		t.Error("a removed layer still works")
	}
	if err := b.Mount(t.Context(), im.digest, target); !errors.Is(err, ErrUnknown) {
		t.Error("mounted what was removed:", err)
	}
	if l := b.links(); len(l) != 1 || len(l[0].layers()) != 0 || l[0].version != b.options.Version {
		t.Errorf("%d holders, the first of %s with %v", len(l), l[0].version, l[0].layers())
	}
}

// What fills a layer works as long as somebody may read it, and no longer.
func TestRemoveWhatIsStillOpen(t *testing.T) {
	im := newSample(4, 20, 1000)
	b := newBed(t, nil).start(im)
	target := b.mount(im, "a")
	open, err := os.Open(target) // as a container's mount, which we do not see
	if err != nil {
		t.Fatal(err)
	}
	b.unmount(target)
	ended := false
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Remove(ctx, im.digest, func() { ended = true }); err == nil || ended {
		t.Errorf("removed while it is open: %v; filling has ended: %v", err, ended)
	}
	if err := im.sameFile(fmt.Sprintf("/proc/self/fd/%d", open.Fd()), im.names[5]); err != nil {
		t.Error("afterwards:", err)
	}
	open.Close()
	l, _ := b.Layer(im.digest)
	if err := b.Remove(t.Context(), im.digest, func() { ended = l.Put(1, im.chunks[1]) == nil && l.Sync() == nil }); err != nil || !ended {
		t.Errorf("removed: %v; with content that still works: %v", err, ended)
	}
	ended = false
	if err := b.Remove(t.Context(), im.digest, func() { ended = true }); err != nil || !ended {
		t.Errorf("removed again: %v; told: %v", err, ended)
	}
}

// A holder that cannot be asked may have it open.
func TestRemoveBesideASilentHolder(t *testing.T) {
	im := newSample(5, 2, 1000)
	b := newBed(t, nil).start(im)
	<-b.adopted
	dir := filepath.Join(b.dir, "v0@1-1")
	lock, err := makeHolderDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(t.Context(), im.digest, nil); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
	lock.Close()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := b.Remove(t.Context(), im.digest, nil); err != nil {
		t.Error(err)
	}
}

// What a holder notes is newer than its greeting, in whatever order the two come.
func TestNotesBeforeTheGreeting(t *testing.T) {
	noted, other := digest.FromString("noted"), digest.FromString("other")
	l := &holderLink{open: map[digest.Digest]int{}}
	l.opened(noted, 2)
	l.greeted([]heldLayer{{Digest: noted, Opens: 1}, {Digest: other, Opens: 3}})
	if got := l.layers(); got[noted] != 2 || got[other] != 3 {
		t.Error(got)
	}
	l.opened(other, 0)
	l.opened(digest.FromString("removed"), 0)
	if got := l.layers(); got[other] != 0 || len(got) != 2 {
		t.Error("notes of one that it has, and of one that it has no more:", got)
	}
}

// Only what is read is filled, and what is there is not asked for.
func TestReadsFillWhatTheyTouch(t *testing.T) {
	im := newSample(2, 50, 100<<10)
	b := newBed(t, nil).start(im)
	target := b.mount(im, "a")
	if err := im.sameFile(target, im.names[7]); err != nil {
		t.Fatal(err)
	}
	l, _ := b.Layer(im.digest)
	if have := l.Len() - l.Left(); have != 1 || !l.Has(7) {
		t.Errorf("%d chunks there after one file of one chunk was read", have)
	}
	fillAll(t, l, im)
	fills := b.memory.fills.Load()
	if err := im.same(target); err != nil {
		t.Fatal(err)
	}
	if more := b.memory.fills.Load() - fills; more > 0 {
		t.Errorf("%d fills of what is there", more)
	}
}

func TestMountsThroughLoopDevices(t *testing.T) {
	im := newSample(3, 60, 400<<10)
	b := newBed(t, func(o *Options) { o.ForceLoop = true }).start(im)
	target := b.mount(im, "a")
	if err := im.same(target); err != nil {
		t.Fatal(err)
	}
	if b.loops() != 2 {
		t.Errorf("%d loop devices", b.loops())
	}
	l, _ := b.Layer(im.digest)
	fillAll(t, l, im)
	if err := b.Complete(t.Context(), im.digest); err != nil {
		t.Fatal(err)
	}
	if m := b.mountsNow(); len(m) != 1 || m[0].Lazy {
		t.Errorf("%+v", m)
	}
	if err := im.same(target); err != nil {
		t.Fatal(err)
	}
	b.unmount(target)
	until(t, "loop devices detached", func() bool { return b.loops() == 0 })
	if err := b.Remove(t.Context(), im.digest, nil); err != nil {
		t.Fatal(err)
	}
}

// loops counts the loop devices on this bed's files.
func (b *bed) loops() int {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		b.t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		if path, err := os.ReadFile(f); err == nil && (strings.HasPrefix(string(path), b.dir) || strings.HasPrefix(string(path), b.store)) {
			n++
		}
	}
	return n
}

func TestMountRefusesAForeignPlace(t *testing.T) {
	one, two := newSample(5, 3, 1000), newSample(6, 3, 1000)
	b := newBed(t, nil).start(one, two)
	target := b.mount(one, "a")
	if err := b.Mount(t.Context(), two.digest, target); !errors.Is(err, ErrInUse) {
		t.Error("two layers in one place:", err)
	}
	if err := unix.Mount("tmpfs", target, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := b.Mount(t.Context(), one.digest, target); !errors.Is(err, ErrInUse) {
		t.Error("beneath somebody else's mount:", err)
	}
	if err := b.Unmount(t.Context(), target); !errors.Is(err, ErrInUse) {
		t.Error("somebody else's mount:", err)
	}
	if err := unix.Unmount(target, 0); err != nil {
		t.Fatal(err)
	}
	b.unmount(target)
	if err := b.Mount(t.Context(), one.digest, filepath.Join(b.mounts, "none")); err == nil {
		t.Error("mounted where nothing is")
	}
	if err := b.Unmount(t.Context(), filepath.Join(b.mounts, "none")); err != nil {
		t.Error("not mounted is no error:", err)
	}
	if err := b.Unmount(t.Context(), "/proc"); err != nil {
		t.Error("somebody else's is not mounted for us:", err)
	}
}

func TestMountWaitsForRun(t *testing.T) {
	im := newSample(7, 2, 1000)
	b := newBed(t, nil)
	h, err := NewHost(b.options)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if _, err = h.Add(im.digest, im.store(t, b.store), nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := h.Mount(ctx, im.digest, t.TempDir()); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// Who waits for a miss can be killed.
func TestKilledReader(t *testing.T) {
	im := newSample(15, 5, 1000)
	b := newBed(t, nil).start(im)
	target := b.mount(im, "a")
	asked := make(chan struct{})
	var once sync.Once
	b.memory.fault(func(ctx context.Context, l *Layer, first, n int) error {
		once.Do(func() { close(asked) })
		<-ctx.Done()
		return ctx.Err()
	})
	cat := exec.Command("cat", filepath.Join(target, im.names[0]))
	if err := cat.Start(); err != nil {
		t.Fatal(err)
	}
	<-asked
	if err := cat.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cat.Wait(); err == nil {
		t.Error("it was not killed")
	}
	b.stop()
}

// Many mount, read, complete and unmount at once.
func TestManyAtOnce(t *testing.T) {
	const layers, turns = 6, 8
	var images []*sample
	for i := range layers {
		images = append(images, newSample(uint64(100+i), 12, 200<<10))
	}
	b := newBed(t, nil).start(images...)
	var all sync.WaitGroup
	for i, im := range images {
		for j := range 2 {
			all.Go(func() {
				for range turns {
					target := filepath.Join(b.mounts, fmt.Sprint(i, "-", j))
					if err := os.MkdirAll(target, 0o700); err != nil {
						t.Error(err)
						return
					}
					if err := b.Mount(t.Context(), im.digest, target); err != nil {
						t.Error("mount:", err)
						return
					}
					if err := im.same(target); err != nil {
						t.Error("read:", err)
					}
					if l, _ := b.Layer(im.digest); l.Complete() {
						if err := b.Complete(t.Context(), im.digest); err != nil && !errors.Is(err, ErrIncomplete) {
							t.Error("complete:", err)
						}
						if err := l.Forget(0, l.Len()-1); err != nil {
							t.Error(err)
						}
					}
					if err := b.Unmount(t.Context(), target); err != nil {
						t.Error("unmount:", err)
					}
				}
			})
		}
	}
	all.Wait()
	if m := b.mountsNow(); len(m) != 0 {
		t.Errorf("left: %+v", m)
	}
	for _, im := range images {
		if err := b.Remove(t.Context(), im.digest, nil); err != nil {
			t.Error(err)
		}
	}
}

func TestVersionName(t *testing.T) {
	seen := map[string]string{}
	for _, text := range []string{
		"v1.2.3", "v1.2.4", "(devel)", "v0.0.0-20261129173039-ae2d957357ed ae2d957357edca5bddcfa172874f2d861bfad699",
		"v0.0.0-20261129173039-ae2d957357ed ae2d957357edca5bddcfa172874f2d861bfad698", "", "../../x", "ä/@,\n",
	} {
		name := VersionName(text)
		if err := checkVersion(name); err != nil {
			t.Errorf("of %q: %v", text, err)
		}
		if other, is := seen[name]; is {
			t.Errorf("%q and %q are both %s", text, other, name)
		}
		seen[name] = text
	}
}
