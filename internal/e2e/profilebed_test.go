package e2e

import (
	"bytes"
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
	"accel/profile/artifact"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// onDemand keeps the background from bringing everything before the program asks for it.
const onDemand = "  background: 1KB"

// lackingBytes of the blobs may be fetched because reads missed them, where a good profile is fetched ahead: by the first read, which
// may come before the plan is made and then brings what lies near, and some chunks. Without a profile it is more than twice that.
const lackingBytes = 2<<20 + 400_000

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
	must(b.t, client.Answered(b.t.Context(), node.Answered{Container: pyContainer}))
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

// pyBed is a bed whose registry has debimage.PyWeb, converted.
func pyBed(t *testing.T, make func(*testing.T, string, ...string) *lazyBed) (b *lazyBed, ref string, img v1.Image) {
	t.Helper()
	needsClients(t)
	img, err := debimage.PyWeb(t.Context(), os.Stderr)
	must(t, err)
	b = make(t, testbed.Containerd2, onDemand)
	ref, _ = pushTo(t, b.reg, "team/pyweb:v1", img)
	b.convert(ref)
	return b, ref, img
}

// manifestOf is the digest of an image's manifest.
func manifestOf(t *testing.T, img v1.Image) digest.Digest {
	t.Helper()
	h, err := img.Digest()
	must(t, err)
	return digest.Digest(h.String())
}

// awaitProfile waits until the server's profile of an image has an origin.
func (b *lazyBed) awaitProfile(manifest digest.Digest, origin accel.ProfileOrigin) accel.Profile {
	b.t.Helper()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		p, err := b.server.client.Profile(b.t.Context(), manifest)
		if err == nil && p.Origin == origin {
			return p
		}
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("no %s profile of %s: %s, %v\n%s", origin, manifest, p.Origin, err, b.server.log)
		}
	}
}

// registryClient is a client of the bed's registry that may push.
func (b *lazyBed) registryClient() *registry.Client {
	b.t.Helper()
	c, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: b.reg.Host(), PlainHTTP: true, Username: writer, Password: writerPassword}}})
	must(b.t, err)
	b.t.Cleanup(c.Close)
	return c
}

// awaitArtifact waits until the service has published a profile with its boot bundle, and reads nothing from the registry any more.
func (b *lazyBed) awaitArtifact(manifest digest.Digest) {
	b.t.Helper()
	c := b.registryClient()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		list, err := c.Referrers(b.t.Context(), b.reg.Host()+"/team/pyweb", manifest, accel.MediaTypeProfile)
		must(b.t, err)
		if _, ok := artifact.BundleIn(list, manifest); ok {
			return
		}
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("no profile is published with a boot bundle: %+v\n%s", list, b.server.log)
		}
	}
}

// gone requires that no container, no image and no mount is left of what a verb started.
func (b *lazyBed) gone() {
	b.t.Helper()
	for _, namespace := range []string{"accel-record", "accel-bench"} {
		for _, what := range []string{"containers", "images"} {
			left, err := b.c.CtrCommand(b.t.Context(), "-n", namespace, what, "ls", "-q").Output() // it warns on standard error
			if err != nil || len(bytes.TrimSpace(left)) > 0 {
				b.t.Errorf("%s are left: %q, %v", what, left, err)
			}
		}
	}
	for begin := time.Now(); len(b.lazyMounts()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("mounts are left: %v", b.lazyMounts())
		}
	}
}

// wipeLayers drops every layer of the node's cache.
func (b *lazyBed) wipeLayers() {
	b.t.Helper()
	client := b.node.admin()
	blobs, err := client.List(b.t.Context())
	must(b.t, err)
	for _, e := range blobs {
		for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			_, err := client.Remove(b.t.Context(), e.Digest.String())
			if err == nil || errors.Is(err, accel.ErrNotFound) {
				break
			}
			if time.Since(begin) > time.Minute {
				b.t.Fatal(err)
			}
		}
	}
}
