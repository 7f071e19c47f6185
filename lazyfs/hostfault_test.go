package lazyfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// A holder that dies takes its mounts along; new ones work at once, in the same places too.
func TestHolderDies(t *testing.T) {
	im, plain, idle := newSample(24, 30, 100<<10), newSample(25, 5, 1000), newSample(26, 5, 1000)
	b := newBed(t, nil).start(im, plain, idle)
	l, _ := b.Layer(plain.digest)
	fillAll(t, l, plain)
	target, plainly := b.mount(im, "a"), b.mount(plain, "b")
	blocked := make(chan error, 1)
	b.memory.fault(func(ctx context.Context, _ *Layer, _, _ int) error {
		b.memory.fault(nil)
		pid := b.holderPIDs()[0]
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Error(err)
		}
		<-ctx.Done()
		return ctx.Err()
	})
	go func() { blocked <- im.sameFile(target, im.names[0]) }()
	if err := <-blocked; err == nil {
		t.Error("read through a dead holder")
	}
	if died := <-b.died; len(died) != 1 || died[0] != im.digest {
		t.Error("told of", died)
	}
	if m := b.mountsNow(); len(m) != 2 || b.deadOf(m) != 1 {
		t.Errorf("%+v", m)
	}
	if err := im.sameFile(target, im.names[1]); err == nil {
		t.Error("read through a dead holder")
	}
	if err := plain.same(plainly); err != nil {
		t.Error("a plain mount:", err)
	}
	if err := im.same(b.mount(im, "elsewhere")); err != nil {
		t.Error("a new mount:", err)
	}
	if err := im.same(b.mount(im, "a")); err != nil {
		t.Error("in the same place:", err)
	}
	if m := b.mountsNow(); len(m) != 3 || b.deadOf(m) != 0 {
		t.Errorf("%+v", m)
	}
	if left, err := filepath.Glob(filepath.Join(b.dir, "v1@*")); err != nil || len(left) != 1 {
		t.Error("directories:", left, err)
	}
	for _, name := range []string{"a", "b", "elsewhere"} {
		b.unmount(filepath.Join(b.mounts, name))
	}
}

// One that died while no daemon was there is found by the next.
func TestHolderDiedMeanwhile(t *testing.T) {
	im := newSample(27, 10, 1000)
	b := newBed(t, nil).start(im)
	b.mount(im, "a")
	pid := b.holderPIDs()[0]
	b.stop()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "it is dead", func() bool { return !alivePID(pid) })
	reap(pid)
	b.start(im)
	if died := <-b.died; len(died) != 1 || died[0] != im.digest {
		t.Error("told of", died)
	}
	if err := im.same(b.mount(im, "a")); err != nil {
		t.Error("mounted again:", err)
	}
	if m := b.mountsNow(); len(m) != 1 || b.deadOf(m) != 0 {
		t.Errorf("%+v", m)
	}
}

// A full disk fails the reads that need room, and no others.
func TestDiskFull(t *testing.T) {
	im := newSample(28, 40, 100<<10)
	b := newBed(t, nil)
	mountTmpfs(t, b.store, "size=1m,nr_inodes=100")
	b.start(im)
	target := b.mount(im, "a")
	good, bad := 0, 0
	for _, name := range im.names {
		switch err := im.sameFile(target, name); {
		case err == nil:
			good++
		case errors.Is(err, unix.EIO):
			bad++
		default:
			t.Error(err)
		}
	}
	if good == 0 || bad == 0 {
		t.Errorf("%d good reads, %d bad", good, bad)
	}
	if err := im.sameFile(target, im.names[0]); err != nil {
		t.Error("what is there:", err)
	}
	if err := unix.Mount("", b.store, "", unix.MS_REMOUNT, "size=100m"); err != nil {
		t.Fatal(err)
	}
	if err := im.same(target); err != nil {
		t.Error("with room again:", err)
	}
}

func mountTmpfs(t *testing.T, dir, options string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

// A bitmap that does not fit is an error of Add, not a fault later.
func TestNoRoomForBitmap(t *testing.T) {
	im := newSample(29, 3000, 10)
	b := newBed(t, nil)
	mountTmpfs(t, filepath.Join(b.dir, bitsDir), "size=4k")
	if err := os.WriteFile(filepath.Join(b.dir, bitsDir, "other"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := NewHost(b.options)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if _, err := h.Add(im.digest, im.store(t, b.store), nil); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
}

// Files that are damaged under a mount are EIO, for the holder and for the daemon.
func TestDamagedFiles(t *testing.T) {
	for _, kind := range []string{"table", "data"} {
		t.Run(kind, func(t *testing.T) {
			im := newSample(30, 500, 3000)
			b := newBed(t, nil).start(im)
			target := b.mount(im, "a")
			l, _ := b.Layer(im.digest)
			fillAll(t, l, im)
			pids := b.holderPIDs()
			path := map[string]string{"table": l.files.Table, "data": l.files.Data}[kind]
			if err := os.Truncate(path, 4096); err != nil {
				t.Fatal(err)
			}
			if err := im.sameFile(target, im.names[400]); !errors.Is(err, unix.EIO) {
				t.Error("read:", err)
			}
			if err := l.Put(400, im.chunks[400]); kind == "table" && !errors.Is(err, ErrDamaged) {
				t.Error("put:", err)
			}
			if err := l.Read(400, make([]byte, len(im.chunks[400]))); err == nil {
				t.Error("daemon's read")
			}
			if now := b.holderPIDs(); len(now) != 1 || now[0] != pids[0] {
				t.Errorf("the holder died of it: %v, before %v", now, pids)
			}
			b.stop()
			h, err := NewHost(b.options)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			if _, err := h.Add(im.digest, l.files, nil); !errors.Is(err, ErrDamaged) {
				t.Error("added again:", err)
			}
		})
	}
}

// A holder that ends just when it is asked to serve a layer is no reason not to mount it.
func TestMountWhileTheHolderEnds(t *testing.T) {
	im := newSample(33, 5, 1000)
	b := newBed(t, nil)
	dir := filepath.Join(b.dir, "v1@1-1")
	lock, err := makeHolderDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	l, err := listenAt(filepath.Join(dir, holderSocket))
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 10)
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn, err := l.Accept()
		l.Close()
		if err != nil {
			t.Error(err)
			return
		}
		p := newPeer(conn)
		_ = p.serve(context.Background(), func(_ context.Context, m message) (message, bool) {
			asked <- m.Kind
			if m.Kind != askAdd {
				return message{Version: "v1"}, true
			}
			if err := p.send(message{Kind: answer, ID: m.ID}); err != nil { // it has unmounted, and is about to end
				t.Error(err)
			}
			p.close()
			return message{}, false
		})
	}()
	b.start(im)
	if err := im.same(b.mount(im, "a")); err != nil {
		t.Error(err)
	}
	<-served
	if first, second := <-asked, <-asked; first != askHello || second != askAdd {
		t.Error("asked", first, second)
	}
}

// A holder is dead when its lock is free or gone, and not when nobody can tell.
func TestDead(t *testing.T) {
	b := newBed(t, nil)
	h, err := NewHost(b.options)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	lock := filepath.Join(b.dir, "v1@1-1", holderLock)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if !h.dead("v1@1-1") {
		t.Error("one without a directory lives")
	}
	must(os.MkdirAll(filepath.Dir(lock), 0o700))
	must(os.Symlink(lock, lock)) // cannot be opened
	if h.dead("v1@1-1") {
		t.Error("one whose lock cannot be looked at is dead")
	}
	must(os.Remove(lock))
	f, err := os.Create(lock)
	must(err)
	must(unix.Flock(int(f.Fd()), unix.LOCK_EX))
	if h.dead("v1@1-1") {
		t.Error("one that holds its lock is dead")
	}
	must(f.Close())
	if !h.dead("v1@1-1") {
		t.Error("one that let go of its lock lives")
	}
}

// A layer whose data file is another one now must not be taken for filled.
func TestBitmapOfAnotherFile(t *testing.T) {
	im := newSample(31, 20, 1000)
	b := newBed(t, nil).start(im)
	l, _ := b.Layer(im.digest)
	fillAll(t, l, im)
	b.stop()
	if err := os.Remove(filesIn(b.store, im).Data); err != nil {
		t.Fatal(err)
	}
	b.start(im)
	if l, _ = b.Layer(im.digest); l.Left() != l.Len() {
		t.Errorf("%d of %d chunks taken for there", l.Len()-l.Left(), l.Len())
	}
	if err := im.same(b.mount(im, "a")); err != nil {
		t.Error(err)
	}
}

func TestHostRefuses(t *testing.T) {
	b := newBed(t, nil)
	for name, change := range map[string]func(*Options){
		"relative": func(o *Options) { o.Dir = "run" },
		"long":     func(o *Options) { o.Dir = filepath.Join(b.dir, strings.Repeat("long/", 20)) },
		"version":  func(o *Options) { o.Version = "a/b" },
		"filler":   func(o *Options) { o.Filler = nil },
	} {
		o := b.options
		change(&o)
		if _, err := NewHost(o); err == nil {
			t.Error(name)
		}
	}
	b.start()
	for _, d := range []digest.Digest{"", "sha256:abc", "../../etc", digest.SHA512.FromString("x")} {
		if _, err := b.Add(d, Files{}, nil); err == nil {
			t.Error(d)
		}
	}
	<-b.adopted
	if err := b.Run(t.Context()); err == nil {
		t.Error("ran twice")
	}
}

// The holder of 20 large layers, all mounted, is small.
func TestManyLayers(t *testing.T) {
	const layers, files = 20, 30_000
	const mostBytes = 40 << 20
	b := newBed(t, nil)
	im := newSample(40, files, 16)
	layout, err := Build(im.toc, im.size)
	if err != nil {
		t.Fatal(err)
	}
	var images []*sample
	for i := range layers {
		one := *im
		one.digest = digest.FromString("many " + strconv.Itoa(i))
		images = append(images, &one)
		if err := layout.Store(filesIn(b.store, &one)); err != nil {
			t.Fatal(err)
		}
	}
	b.start(images...)
	var targets []string
	for i, im := range images {
		targets = append(targets, b.mount(im, strconv.Itoa(i)))
	}
	for i, im := range images {
		for j := range 200 {
			if err := im.sameFile(targets[i], im.names[(j*149+i)%files]); err != nil {
				t.Fatal(err)
			}
		}
	}
	pid := b.holderPIDs()[0]
	anonymous := statusBytes(t, pid, "RssAnon")
	t.Logf("holder: %d KB anonymous, %d KB in all", anonymous>>10, statusBytes(t, pid, "VmRSS")>>10)
	if anonymous > mostBytes && !raceDetector() {
		t.Errorf("the holder has %d bytes of anonymous memory", anonymous)
	}
	for _, target := range targets {
		b.unmount(target)
	}
	for _, im := range images {
		if err := b.Remove(t.Context(), im.digest, nil); err != nil {
			t.Error(err)
		}
	}
}

// raceDetector reports whether memory is what the race detector needs.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func statusBytes(t *testing.T, pid int, field string) int {
	t.Helper()
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(status), field+":")
	if !ok {
		t.Fatalf("no %s", field)
	}
	kb, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kb << 10
}
