package e2e

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"accel"
	"accel/internal/debimage"
	"accel/internal/testbed"
	"accel/lazy"
	"accel/node"

	"golang.org/x/sys/unix"
)

// onDemand keeps the background from bringing everything before the program asks for it.
const onDemand = "  background: 1KB"

// pyContainer is where the tests here start debimage.PyWeb.
const pyContainer = "web"

// admin asks the node by its socket.
func (n *nodeRun) admin() *node.Client {
	c := node.NewClient(n.socket())
	n.t.Cleanup(c.Close)
	return c
}

// recordedStart pulls and starts debimage.PyWeb until it answers, ends it, and gives what was recorded of that.
func (b *lazyBed) recordedStart(ref string) lazy.Start {
	b.t.Helper()
	b.pull(ref)
	b.run("default", ref, pyContainer)
	answers(b.t, pyURL)
	client := b.node.admin()
	must(b.t, client.Answered(b.t.Context(), pyContainer))
	defer b.end("default", pyContainer)
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		starts, err := client.Starts(b.t.Context())
		must(b.t, err)
		if len(starts) > 0 && starts[0].End != "" {
			if starts[0].Problem != "" {
				b.t.Fatalf("the recording is lost: %s", starts[0].Problem)
			}
			// Every file that the program read was seen, but for those of the mounts that a runtime makes, in whole chunks.
			files, bytes := resident(b.t, b.rootfs("default", pyContainer))
			b.t.Logf("recorded: %d files, %d bytes; the kernel has %d of %d files", starts[0].Files, starts[0].Bytes, bytes, files)
			if starts[0].Complete && (starts[0].Files < files || starts[0].Bytes < bytes) {
				b.t.Errorf("%d bytes of %d files were recorded, the kernel has %d of %d", starts[0].Bytes, starts[0].Files, bytes, files)
			}
			return starts[0]
		}
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("the recording does not end: %+v\n%s", starts, b.node.log)
		}
	}
}

// resident is what the kernel has of the files below a container's root, when nothing had been there before it
// started: all that was read of them, and no more.
func resident(t *testing.T, root string) (files int, bytes int64) {
	t.Helper()
	page := int64(os.Getpagesize())
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil || info.Size() == 0 {
			return err
		}
		mapped, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_NONE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		defer unix.Munmap(mapped)
		pages := make([]byte, (info.Size()+page-1)/page)
		if _, _, no := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), uintptr(len(mapped)), uintptr(unsafe.Pointer(&pages[0]))); no != 0 {
			return no
		}
		var here int64
		for _, p := range pages {
			here += int64(p&1) * page
		}
		if here > 0 {
			files++
			bytes += min(here, info.Size())
		}
		return nil
	}))
	return files, bytes
}

// wipe takes an image from containerd and from the node's cache.
func (b *lazyBed) wipe(ref string) {
	b.t.Helper()
	_, err := b.c.Ctr(b.t.Context(), "images", "rm", "--sync", ref)
	must(b.t, err)
	client := b.node.admin()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) { // containerd collects its snapshots a moment later
		_, err := client.Remove(b.t.Context(), ref)
		if err == nil || errors.Is(err, accel.ErrNotFound) {
			break
		}
		if !errors.Is(err, accel.ErrConflict) || time.Since(begin) > time.Minute {
			b.t.Fatalf("wipe %s: %v", ref, err)
		}
	}
	b.reg.Reset()
}

// TestStartsAreRecorded: what a first start reads is recorded, and the next cold start finds it fetched ahead.
func TestStartsAreRecorded(t *testing.T) {
	needsClients(t)
	img, err := debimage.PyWeb(t.Context(), os.Stderr)
	must(t, err)
	b := newLazyBed(t, testbed.Containerd2, onDemand)
	ref, _ := pushTo(t, b.reg, "team/pyweb:v1", img)
	b.convert(ref)

	first := b.recordedStart(ref)
	t.Logf("first: %+v", first)
	if !first.Complete || first.End != "answered" || first.Ahead != nil {
		t.Errorf("the first start is recorded as %+v", first)
	}
	if first.Files < 50 || first.Bytes < 5<<20 || first.Misses == 0 {
		t.Errorf("too little was recorded: %+v", first)
	}
	b.wipe(ref)
	second := b.recordedStart(ref)
	t.Logf("second: %+v %+v\n%s", second, second.Ahead, b.node.log)
	if second.Ahead == nil || second.Ahead.From != "node" {
		t.Fatalf("nothing was fetched ahead of the second start: %+v\n%s", second, b.node.log)
	}
	if second.Misses > first.Misses/4 || second.MissBytes > first.MissBytes/4 {
		t.Errorf("%d reads waited for %d bytes, the first time %d for %d", second.Misses, second.MissBytes, first.Misses, first.MissBytes)
	}
}
