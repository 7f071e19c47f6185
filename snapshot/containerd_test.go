package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel/internal/testbed"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	registry "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// toolSource is the program of all images here: a container's main process, its tool, and the sandbox's pause.
const toolSource = `package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) < 2 || os.Args[1] == "wait" {
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
		<-c
		return
	}
	for _, path := range os.Args[2:] {
		if os.Args[1] == "owner" {
			var st syscall.Stat_t
			fmt.Println(path, syscall.Stat(path, &st), st.Uid, st.Gid)
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			println(err.Error())
			os.Exit(1)
		}
		os.Stdout.Write(b)
	}
}
`

// tool builds that program once.
var tool = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "accel-tool-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(toolSource), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", "tool", "main.go")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "tool"))
})

// node is a containerd that asks a snapshotter, with a registry that counts what it delivers.
type node struct {
	*bed
	containerd *testbed.Containerd
	registry   *testbed.Registry
	http       *http.Transport
	stop       func() // the serving of the snapshotter
}

// setup is what an administrator writes into containerd's configuration.
func setup(version, socket, root string) string {
	if version == testbed.Containerd16 {
		return fmt.Sprintf(`
[proxy_plugins.accel]
  type = 'snapshot'
  address = '%s'
[plugins.'io.containerd.grpc.v1.cri'.containerd]
  snapshotter = 'accel'
  disable_snapshot_annotations = false
`, socket)
	}
	return fmt.Sprintf(`
[proxy_plugins.accel]
  type = 'snapshot'
  address = '%s'
  capabilities = ['remap-ids']
[proxy_plugins.accel.exports]
  root = '%s'
  enable_remote_snapshot_annotations = 'true'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/amd64'
  snapshotter = 'overlayfs'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/amd64'
  snapshotter = 'accel'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'accel'
`, socket, root)
}

// ownPull, behind setup, has CRI pull by itself and not through the transfer service.
const ownPull = `  use_local_image_pull = true
  disable_snapshot_annotations = false
`

// newNode starts all of it, and pushes the sandbox's image.
func newNode(t *testing.T, version string, extra string, change ...func(*Options)) *node {
	t.Helper()
	n := &node{bed: newBed(t, change...), http: &http.Transport{}}
	r, err := testbed.StartRegistry(testbed.RegistryOptions{Dir: t.TempDir()})
	n.check(err)
	n.registry = r
	t.Cleanup(func() {
		n.http.CloseIdleConnections()
		n.check(r.Close())
	})
	n.serve()
	t.Cleanup(func() { n.stop() })
	program, err := tool()
	n.check(err)
	pause := n.push("pause:1", map[string]string{"pause": string(program)})
	n.containerd, err = testbed.StartContainerd(n.ctx, testbed.ContainerdOptions{Version: version, SandboxImage: pause, Extra: setup(version, n.socket(), n.o.Dir) + extra})
	n.check(err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("containerd %s:\n%s", version, n.containerd.Log())
		}
		n.check(n.containerd.Close())
	})
	return n
}

func (n *node) socket() string { return filepath.Join(n.dir, "sock") }

// serve serves the snapshotter until stop.
func (n *node) serve() {
	n.Helper()
	l, err := Listen(n.ctx, n.socket())
	n.check(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	s := n.Snapshotter
	go func() { done <- s.Serve(ctx, l) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		n.check(<-done)
	})
}

// push pushes an image of gzip layers with those files, keeps each layer's tree, and returns the reference.
func (n *node) push(path string, layers ...map[string]string) string {
	n.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, files := range layers {
		raw := tarOf(n.T, files)
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }, tarball.WithMediaType(types.OCILayer))
		n.check(err)
		h, err := layer.Digest()
		n.check(err)
		n.unpack(digest.Digest(h.String()), files)
		img, err = mutate.AppendLayers(img, layer)
		n.check(err)
	}
	config, err := img.ConfigFile()
	n.check(err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config = v1.Config{Cmd: []string{"/pause"}}
	img, err = mutate.ConfigFile(img, config)
	n.check(err)
	ref, err := name.ParseReference(n.registry.Host()+"/"+path, name.Insecure)
	n.check(err)
	n.check(registry.Write(ref, img, registry.WithContext(n.ctx), registry.WithTransport(n.http)))
	n.registry.Reset()
	return ref.Name()
}

func tarOf(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(content)), ModTime: time.Unix(1_700_000_000, 0)})
		if _, e := io.WriteString(w, content); err != nil || e != nil {
			t.Fatal(err, e)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack keeps a layer's tree, from which it is mounted.
func (n *node) unpack(layer digest.Digest, files map[string]string) {
	n.Helper()
	for name, content := range files {
		path := filepath.Join(n.layers.tree(layer), name)
		n.check(errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o755)))
	}
}

// app pushes an image that can run, of some layers with a file each.
func (n *node) app(path string, count int) string {
	n.Helper()
	program, err := tool()
	n.check(err)
	layers := []map[string]string{{"tool": string(program), "first": path + " 0\n"}}
	for i := 1; i < count; i++ {
		layers = append(layers, map[string]string{fmt.Sprintf("dir/file%d", i): fmt.Sprintf("%s %d\n", path, i)})
	}
	return n.push(path, layers...)
}

// pullCtr pulls with ctr: by the transfer service, where there is one.
func (n *node) pullCtr(image string) error {
	_, err := n.containerd.Ctr(n.ctx, "images", "pull", "--snapshotter", "accel", image)
	return err
}

// runCtr runs the tool in a container to its end.
func (n *node) runCtr(image, id string, command ...string) string {
	n.Helper()
	out, err := n.containerd.Ctr(n.ctx, append([]string{"run", "--rm", "--snapshotter", "accel", image, id, "/tool"}, command...)...)
	n.check(err)
	return out
}

// requireLazy requires that the registry delivered no layer.
func (n *node) requireLazy() {
	n.Helper()
	for blob := range n.registry.Delivered().Blobs {
		if _, err := os.Stat(n.layers.tree(blob)); err == nil {
			n.Errorf("layer %s was downloaded", blob)
		}
	}
}

func TestPullAndRun(t *testing.T) {
	n := newNode(t, testbed.Containerd2, "")
	image := n.app("team/app:v1", 3)
	n.check(n.pullCtr(image))
	n.requireLazy()
	if got := n.runCtr(image, "one", "cat", "/first", "/dir/file1", "/dir/file2"); !strings.HasSuffix(got, "team/app:v1 0\nteam/app:v1 1\nteam/app:v1 2\n") {
		t.Errorf("the container reads %q", got)
	}
	r := n.event(0).Request
	if r.Reference != image || r.Namespace != "default" || r.Manifest == "" || len(r.Layers) != 3 || r.DiffID == "" || r.Chain == "" {
		t.Errorf("the request is %+v", r)
	}
	n.consistent()
	if _, err := n.containerd.Ctr(n.ctx, "images", "rm", "--sync", image); err != nil {
		t.Fatal(err)
	}
	if left := n.Lazy(); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
	n.consistent()
}

func TestRunByCRI(t *testing.T) {
	for _, c := range []struct{ name, version, extra string }{
		{testbed.Containerd2, testbed.Containerd2, ""},
		{testbed.Containerd2 + " by its own pull", testbed.Containerd2, ownPull},
		{testbed.Containerd16, testbed.Containerd16, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, c.version, c.extra)
			image := n.app("team/app:v1", 2)
			_, err := n.containerd.PullCRI(n.ctx, image, "", "")
			n.check(err)
			n.requireLazy()
			if r := n.event(0).Request; r.Reference != image || r.Namespace != "k8s.io" || r.Manifest == "" || len(r.Layers) != 2 || r.DiffID == "" || r.Chain == "" {
				t.Errorf("the request is %+v", r)
			}
			pod, err := n.containerd.RunCRI(n.ctx, image, "/tool", "wait")
			n.check(err)
			got, err := pod.Exec(n.ctx, "/tool", "cat", "/first", "/dir/file1")
			n.check(err)
			if got != "team/app:v1 0\nteam/app:v1 1\n" {
				t.Errorf("the container reads %q", got)
			}
			n.requireLazy() // the sandbox too
			n.check(pod.Remove(n.ctx))
			n.consistent()
			n.check(n.containerd.RemoveCRI(n.ctx, image))
			n.until("the image's layers are gone", func() bool {
				return !strings.Contains(fmt.Sprint(n.Lazy()), "team/app")
			})
			n.consistent()
		})
	}
}

// until waits for something to become true.
func (n *node) until(what string, true func() bool) {
	n.Helper()
	for !true() {
		select {
		case <-n.ctx.Done():
			n.Fatalf("waited in vain until %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
