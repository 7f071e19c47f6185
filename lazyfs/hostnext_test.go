package lazyfs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

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
	if m := b.mountsNow(); len(m) != 3 || b.deadOf(m) != 0 {
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
	again, _ := b.Layer(im.digest)
	fillAll(t, again, im)
	if err := b.Complete(t.Context(), im.digest); err != nil {
		t.Error(err)
	}
	for _, target := range []string{lazily, plainly, lost} {
		b.unmount(target)
	}
	for _, d := range []digest.Digest{im.digest, plain.digest} {
		if err := b.Remove(t.Context(), d, nil); err != nil {
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
	if n := len(b.links()); n != 2 {
		t.Errorf("%d holders", n)
	}
	if err := im.same(target); err != nil {
		t.Error("through the old holder:", err)
	}
	if err := im.same(next); err != nil {
		t.Error("through the new holder:", err)
	}
	b.unmount(target)
	until(t, "the old holder ends", func() bool { return !alivePID(old) })
	until(t, "it is forgotten", func() bool { return len(b.links()) == 1 })
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
