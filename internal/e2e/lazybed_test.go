package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"accel"
	"accel/internal/testbed"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// lazyBed is a registry, a server that converts what is in it, a node that mounts
// lazily, and a containerd that asks the node for snapshots.
type lazyBed struct {
	t      *testing.T
	regDir string
	reg    *testbed.Registry
	server *up
	serve  func() *up // starts the server again on what it has
	node   *nodeRun
	c      *testbed.Containerd
}

// newLazyBed starts all of it. More are further lines of the node's configuration.
func newLazyBed(t *testing.T, version string, more ...string) *lazyBed {
	t.Helper()
	b := newServedBed(t)
	b.startNode(version, b.server.client.Server(), more...)
	return b
}

// newLonelyBed is newLazyBed with a node that has the server's public keys, and no way to the server.
func newLonelyBed(t *testing.T, version string, more ...string) *lazyBed {
	t.Helper()
	b := newServedBed(t)
	keys, err := b.server.client.Keys(t.Context())
	must(t, err)
	file := filepath.Join(t.TempDir(), "keys.pem")
	must(t, os.WriteFile(file, []byte(keys.PEM), 0o600))
	b.startNode(version, "", append([]string{"  keys: " + file}, more...)...)
	return b
}

// newServedBed has no node and no containerd yet.
func newServedBed(t *testing.T) *lazyBed {
	t.Helper()
	needsClients(t)
	b := &lazyBed{t: t, regDir: t.TempDir()}
	b.reg = startRegistryIn(t, b.regDir)
	file := filepath.Join(t.TempDir(), "password")
	must(t, os.WriteFile(file, []byte(writerPassword), 0o600))
	data := t.TempDir()
	b.serve = func() *up {
		return start(t, data, "127.0.0.1:0", "--registries",
			fmt.Sprintf("[{host: %q, plain_http: true, username: %s, password_file: %s}]", b.reg.Host(), writer, file))
	}
	b.server = b.serve()
	return b
}

func (b *lazyBed) startNode(version, server string, more ...string) {
	b.t.Helper()
	b.node = newNodeAt(b.t, b.reg, server, reader, readerPassword, "s.sock", more...)
	b.t.Cleanup(b.clear) // before the node's own directory goes
	b.node.start()
	b.startContainerd(version)
}

func (b *lazyBed) startContainerd(version string) {
	b.t.Helper()
	c, err := testbed.StartContainerd(b.t.Context(), testbed.ContainerdOptions{Version: version, Extra: b.plugin(version)})
	must(b.t, err)
	b.c = c
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.t.Logf("containerd %s:\n%s", version, c.Log())
		}
		if err := c.Close(); err != nil {
			b.t.Error(err)
		}
	})
}

// plugin is the configuration that `accel node install` tells of.
func (b *lazyBed) plugin(version string) string {
	proxy := fmt.Sprintf("[proxy_plugins.accel]\n  type = 'snapshot'\n  address = '%s'\n", b.node.snapshotter)
	if version == testbed.Containerd16 {
		return proxy + "[plugins.'io.containerd.grpc.v1.cri'.containerd]\n  snapshotter = 'accel'\n  disable_snapshot_annotations = false\n"
	}
	unpack := ""
	for _, s := range []string{"overlayfs", "accel"} {
		unpack += fmt.Sprintf("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/amd64'\n  snapshotter = '%s'\n", s)
	}
	return proxy + fmt.Sprintf("[proxy_plugins.accel.exports]\n  root = '%s'\n  enable_remote_snapshot_annotations = 'true'\n", filepath.Join(b.node.dir, "data", "snapshots")) +
		unpack + "[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'accel'\n"
}

// convert has an image of the registry converted, and waits until it is Ready.
func (b *lazyBed) convert(ref string) {
	b.t.Helper()
	_, err := b.server.client.Submit(b.t.Context(), ref)
	must(b.t, err)
	img, err := b.server.client.Wait(b.t.Context(), ref, patience)
	must(b.t, err)
	if img.State != accel.Ready {
		b.t.Fatalf("%s is %s: %s %s\n%s", ref, img.State, img.Rule, img.Reason, b.server.log)
	}
	b.reg.Reset()
}

// pull is `ctr image pull`, by the transfer service where containerd has one.
func (b *lazyBed) pull(ref string) {
	b.t.Helper()
	_, err := b.c.Ctr(b.t.Context(), "images", "pull", "--snapshotter", "accel", "--user", reader+":"+readerPassword, ref)
	must(b.t, err)
}

// run starts a container on the host's network in a namespace of containerd's, and ends it with the test.
func (b *lazyBed) run(namespace, ref, id string, args ...string) {
	b.t.Helper()
	b.t.Cleanup(func() { b.end(namespace, id) })
	_, err := b.c.Ctr(b.t.Context(), append([]string{"-n", namespace, "run", "-d", "--snapshotter", "accel", "--net-host", ref, id}, args...)...)
	must(b.t, err)
}

// end ends a container and removes it; one that is not there is fine.
func (b *lazyBed) end(namespace, id string) {
	ctx, cancel := contextOf(20 * time.Second)
	defer cancel()
	_, _ = b.c.Ctr(ctx, "-n", namespace, "task", "kill", "-s", "SIGKILL", id)
	for range 100 {
		if _, err := b.c.Ctr(ctx, "-n", namespace, "task", "rm", id); err == nil || strings.Contains(err.Error(), "not found") {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	_, _ = b.c.Ctr(ctx, "-n", namespace, "container", "rm", id)
}

// rootfs is where a container's root is on the host.
func (b *lazyBed) rootfs(namespace, id string) string {
	return filepath.Join(b.c.Dir, "state", "io.containerd.runtime.v2.task", namespace, id, "rootfs")
}

// answers waits until the server in a container answers, and gives what it says.
func answers(t *testing.T, url string) string {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	var last error
	for begin := time.Now(); time.Since(begin) < time.Minute; time.Sleep(10 * time.Millisecond) {
		res, err := client.Get(url)
		if last = err; err != nil {
			continue
		}
		said, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err == nil && res.StatusCode == http.StatusOK {
			return string(said)
		}
		last = fmt.Errorf("%s: %w", res.Status, err)
	}
	t.Fatalf("%s does not answer: %v", url, last)
	return ""
}

// lazyMounts are the node's EROFS mounts.
func (b *lazyBed) lazyMounts() []*mountinfo.Info {
	b.t.Helper()
	at, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "erofs" || !strings.HasPrefix(m.Mountpoint, b.node.dir), false
	})
	must(b.t, err)
	return at
}

// holders are the processes that serve the node's mounts.
func (b *lazyBed) holders() []int {
	b.t.Helper()
	list, err := filepath.Glob("/proc/[0-9]*/cmdline")
	must(b.t, err)
	var pids []int
	for _, path := range list {
		line, err := os.ReadFile(path)
		args := strings.Split(string(line), "\x00")
		if err != nil || len(args) < 5 || args[1] != "node" || args[2] != "holder" || args[4] != filepath.Join(b.node.dir, "run") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		must(b.t, err)
		pids = append(pids, pid)
	}
	return pids
}

// clear takes away what a node leaves on purpose: mounts and the process that serves them.
func (b *lazyBed) clear() {
	b.node.kill()
	for _, pid := range b.holders() {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			b.t.Error(err)
		}
	}
	at, err := mountinfo.GetMounts(mountinfo.PrefixFilter(b.node.dir))
	must(b.t, err)
	for i := len(at) - 1; i >= 0; i-- {
		if at[i].Mountpoint == filepath.Join(b.node.dir, "data") {
			continue // a test's own file system
		}
		if err := unix.Unmount(at[i].Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
			b.t.Errorf("unmount %s: %v", at[i].Mountpoint, err)
		}
	}
}

// requireLazy requires that all of an image's layers are mounted by EROFS, and that the registry delivered
// nothing of the source's.
func (b *lazyBed) requireLazy(ref string, img v1.Image) {
	b.t.Helper()
	sizes := layerSizes(b.t, img)
	if at := b.lazyMounts(); len(at) < len(sizes) {
		b.t.Errorf("%d EROFS mounts for %s, want %d\n%s", len(at), ref, len(sizes), b.node.log)
	}
	delivered := b.reg.Delivered()
	for d := range sizes {
		if n := delivered.Blobs[d]; n > 0 {
			b.t.Errorf("the registry delivered %d bytes of layer %s, which is converted", n, d)
		}
	}
}

// requireTree requires that a container's root is the source's tree, but for what ctr puts there.
func (b *lazyBed) requireTree(root string, want map[string]string) {
	b.t.Helper()
	got := walk(b.t, root)
	same := map[string]string{}
	for path, is := range want {
		same[path] = is
	}
	for _, path := range []string{"etc", "etc/hosts", "etc/resolv.conf"} { // bind mounts' places
		delete(same, path)
		delete(got, path)
	}
	compare(b.t, same, got)
}
