package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	if m := b.mountsNow(); len(m) != 1 || !m[0].Lazy || m[0].Dead || m[0].Digest != im.digest || m[0].Target != target || m[0].HolderPID == 0 {
		t.Errorf("%+v", m)
	}
	if err := b.Remove(t.Context(), im.digest); !errors.Is(err, ErrInUse) {
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
	if err := b.Remove(t.Context(), im.digest); err != nil {
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
	if h := b.Holders(); len(h) != 1 || h[0].Open != 0 || h[0].Layers != 0 || !h[0].Current {
		t.Errorf("%+v", h)
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
	if err := b.Remove(t.Context(), im.digest); err != nil {
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
			if h := b.Holders(); len(h) != 1 || h[0].Open != 1 {
				t.Errorf("the running container holds %+v", h)
			}
			b.unmount(target)
			if err := b.Remove(t.Context(), im.digest); !errors.Is(err, ErrInUse) {
				t.Error("removed under a running container:", err)
			}
			old.Close()
			unmountOverlay(t, container)
			until(t, "the holder has nothing open", func() bool { h := b.Holders(); return len(h) == 1 && h[0].Open == 0 })
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

// A machine that starts again has only what is durable.
func TestReboot(t *testing.T) {
	im := newSample(8, 30, 300<<10)
	b := newBed(t, nil).start(im)
	target := b.mount(im, "a")
	if err := im.same(target); err != nil {
		t.Fatal(err)
	}
	b.clear()
	// The disk kept what was synced: the first half.
	half := len(im.chunks) / 2
	data, err := os.OpenFile(filesIn(b.store, im).Data, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	var last int64
	b.start()
	l, err := b.Add(im.digest, filesIn(b.store, im), func(i int) bool { return i < half })
	if err != nil {
		t.Fatal(err)
	}
	last = l.Chunk(half).DataOffset
	if err := unix.Fallocate(int(data.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, last, 1<<40-last); err != nil {
		t.Fatal(err)
	}
	if l.Left() != len(im.chunks)-half || l.Has(half) || !l.Has(half-1) {
		t.Errorf("%d of %d left", l.Left(), l.Len())
	}
	if err := im.same(b.mount(im, "a")); err != nil {
		t.Fatal(err)
	}
	if !l.Complete() {
		t.Error("not complete")
	}
}

// The next daemon takes over what the last one left, and reads go on meanwhile.
func TestAdopt(t *testing.T) {
	im, plain, unknown := newSample(9, 40, 300<<10), newSample(10, 10, 1000), newSample(11, 10, 1000)
	b := newBed(t, nil).start(im, plain, unknown)
	l, _ := b.Layer(plain.digest)
	fillAll(t, l, plain)
	lazily, plainly, lost := b.mount(im, "a"), b.mount(plain, "b"), b.mount(unknown, "c")
	if err := im.sameFile(lazily, im.names[0]); err != nil {
		t.Fatal(err)
	}
	pids := b.holderPIDs()
	b.stop()
	stale := filepath.Join(b.dir, bitsDir, digest.FromString("gone").Encoded())
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	read := make(chan error, 1)
	go func() { read <- im.same(lazily) }()
	b.start(im, plain)
	if err := <-read; err != nil {
		t.Error("across the restart:", err)
	}
	if now := b.holderPIDs(); len(now) != 1 || now[0] != pids[0] {
		t.Errorf("holders %v, before %v", now, pids)
	}
	if m := b.mountsNow(); len(m) != 3 || m[0].Dead || m[1].Dead || m[2].Dead {
		t.Errorf("%+v", m)
	}
	if err := unknown.sameFile(lost, unknown.names[0]); !errors.Is(err, unix.EIO) {
		t.Error("a layer that was not added:", err)
	}
	if err := plain.same(plainly); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(stale); err == nil {
		t.Error("a bitmap that is nobody's is still there")
	}
	if err := b.Complete(t.Context(), im.digest); err != nil {
		t.Error(err)
	}
	for _, target := range []string{lazily, plainly, lost} {
		b.unmount(target)
	}
	for _, d := range []digest.Digest{im.digest, plain.digest} {
		if err := b.Remove(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
}

// A holder of another version serves its mounts until the last is gone.
func TestRetire(t *testing.T) {
	im := newSample(12, 40, 100<<10)
	b := newBed(t, nil).start(im)
	target := b.mount(im, "old")
	old := b.holderPIDs()[0]
	b.stop()
	b.options.Version = "v2"
	b.options.Holder = holderCommand(b.dir, "v2", holderTimes{})
	b.start(im)
	next := b.mount(im, "new")
	if err := b.Retire(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h := b.Holders(); len(h) != 2 {
		t.Errorf("%+v", h)
	}
	if err := im.same(target); err != nil {
		t.Error("through the old holder:", err)
	}
	if err := im.same(next); err != nil {
		t.Error("through the new holder:", err)
	}
	b.unmount(target)
	until(t, "the old holder ends", func() bool { return !alivePID(old) })
	until(t, "it is forgotten", func() bool { return len(b.Holders()) == 1 })
	select {
	case d := <-b.died:
		t.Error("told of dead mounts:", d)
	default:
	}
	if err := im.same(next); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(b.dir, "v1@*")); err != nil || len(left) > 0 {
		t.Error("left:", left, err)
	}
}

func TestHolderThatDoesNotStart(t *testing.T) {
	im := newSample(13, 2, 1000)
	b := newBed(t, func(o *Options) {
		o.Holder = []string{"/bin/sh", "-c", "echo the reason why >&2; exit 3"}
	}).start(im)
	target := filepath.Join(b.mounts, "a")
	if err := os.MkdirAll(target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.Mount(t.Context(), im.digest, target); err == nil || !strings.Contains(err.Error(), "the reason why") {
		t.Error(err)
	}
}

// A holder with nothing to do ends by itself, and signals of a service manager do not end it.
func TestHolderEndsIdle(t *testing.T) {
	im := newSample(14, 5, 1000)
	b := newBed(t, nil)
	b.options.Holder = holderCommand(b.dir, "v1", holderTimes{IdleLimit: 200 * time.Millisecond})
	b.start(im)
	target := b.mount(im, "a")
	pid := b.holderPIDs()[0]
	b.stop()
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		if err := unix.Kill(pid, signal); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(500 * time.Millisecond) // longer than it may be idle: it is not, it has a mount
	if !alivePID(pid) {
		t.Fatal("it ended with a mount")
	}
	if err := unix.Unmount(target, 0); err != nil {
		t.Fatal(err)
	}
	until(t, "it ends", func() bool { return !alivePID(pid) })
	reap(pid)
	if left, err := filepath.Glob(filepath.Join(b.dir, "v1@*")); err != nil || len(left) > 0 {
		t.Error("left:", left, err)
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
		if err := b.Remove(t.Context(), im.digest); err != nil {
			t.Error(err)
		}
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
			if err := b.Remove(t.Context(), im.digest); err != nil {
				t.Error(err)
			}
		})
	}
}
