package node_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"accel/api"
	"accel/internal/testbed"
	"accel/node"
	"accel/registry"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
)

// patience bounds every wait of a test; none is expected to come near it.
const patience = time.Minute

// The test binary runs itself again as a daemon that is killed.
const (
	dirVariable      = "ACCEL_NODE_TEST_DIR"
	registryVariable = "ACCEL_NODE_TEST_REGISTRY"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(dirVariable); dir != "" {
		beDaemon(dir, os.Getenv(registryVariable))
		return
	}
	logrus.SetOutput(io.Discard)                                                                         // the registry of the tests logs to it
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run")) // distribution never ends it
}

// beDaemon runs a node until it is killed, and says where its mirror is.
func beDaemon(dir, upstream string) {
	d, err := start(context.Background(), dir, upstream, nil)
	if err != nil {
		panic(err)
	}
	fmt.Println(d.host)
	panic(<-d.ended)
}

// daemon is a node that runs.
type daemon struct {
	host   string // of its mirror
	socket string
	cancel context.CancelFunc
	ended  chan error
	client *node.Client
}

// start runs a node in this process.
func start(ctx context.Context, dir, upstream string, change func(*node.Options)) (*daemon, error) {
	client, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: upstream, PlainHTTP: true}}, Attempts: 1})
	if err != nil {
		return nil, err
	}
	o := node.Options{
		Name: "n1", Labels: map[string]string{"zone": "a"}, Version: "test", Dir: dir, Registry: client, DefaultRegistry: upstream,
		Quiet: 50 * time.Millisecond, Log: slog.New(slog.DiscardHandler), Drain: time.Second, Heartbeat: 100 * time.Millisecond,
	}
	if change != nil {
		change(&o)
	}
	n, err := node.Open(o)
	if err != nil {
		client.Close()
		return nil, err
	}
	d := &daemon{socket: filepath.Join(dir, "s"), ended: make(chan error, 1)}
	mirror, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	admin, err := node.ListenAdmin(ctx, d.socket)
	if err != nil {
		return nil, errors.Join(err, mirror.Close(), n.Close())
	}
	d.host, d.client = mirror.Addr().String(), node.NewClient(d.socket)
	ctx, d.cancel = context.WithCancel(ctx)
	go func() {
		err := n.Run(ctx, node.Listeners{Mirror: mirror, Admin: admin})
		client.Close()
		d.ended <- errors.Join(err, n.Close())
	}()
	return d, nil
}

func (d *daemon) stop() error {
	d.cancel()
	d.client.Close()
	err := <-d.ended
	d.ended <- err // for the next stop
	return err
}

// bed is a registry with images, and a folder for nodes.
type bed struct {
	*testing.T
	ctx      context.Context
	registry *testbed.Registry
	dir      string
	http     *http.Transport
}

func newBed(t *testing.T) *bed {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	r, err := testbed.StartRegistry(testbed.RegistryOptions{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "node") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{T: t, ctx: ctx, registry: r, dir: dir, http: &http.Transport{}}
	t.Cleanup(func() {
		b.http.CloseIdleConnections()
		b.check(errors.Join(r.Close(), os.RemoveAll(dir)))
	})
	return b
}

func (b *bed) check(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// start runs a node until the test ends, or stop.
func (b *bed) start(change func(*node.Options)) *daemon {
	b.Helper()
	d, err := start(b.ctx, b.dir, b.registry.Host(), change)
	b.check(err)
	b.Cleanup(func() { b.check(d.stop()) })
	return d
}

// push puts an image of random layers into the registry, and returns its reference.
func (b *bed) push(path string, layerBytes ...int) (string, v1.Image) {
	b.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	for _, n := range layerBytes {
		content := make([]byte, n)
		_, err := rand.Read(content)
		b.check(err)
		img, err = mutate.AppendLayers(img, static.NewLayer(content, types.OCIUncompressedLayer))
		b.check(err)
	}
	ref := b.registry.Host() + "/" + path
	at, err := name.ParseReference(ref, name.Insecure)
	b.check(err)
	b.check(remote.Write(at, img, remote.WithContext(b.ctx), remote.WithTransport(b.http)))
	b.registry.Reset()
	return ref, img
}

// pull pulls an image of the registry through a mirror, whole, and returns how many layer bytes came.
func (b *bed) pull(mirror, path string) (layerBytes int64, err error) {
	at, err := name.ParseReference(mirror+"/"+path, name.Insecure)
	if err != nil {
		return 0, err
	}
	img, err := remote.Image(at, remote.WithContext(b.ctx), remote.WithTransport(b.http), remote.WithRetryBackoff(remote.Backoff{Steps: 1}))
	if err != nil {
		return 0, err
	}
	layers, err := img.Layers()
	if err != nil {
		return 0, err
	}
	if _, err := img.RawConfigFile(); err != nil {
		return 0, err
	}
	for _, l := range layers {
		c, err := l.Compressed() // verified on the way
		if err != nil {
			return layerBytes, err
		}
		n, err := io.Copy(io.Discard, c)
		layerBytes += n
		if err = errors.Join(err, c.Close()); err != nil {
			return layerBytes, err
		}
	}
	return layerBytes, nil
}

// server is a client of an accel server, on a transport of the bed's.
func (b *bed) client(url string) *api.Client {
	b.Helper()
	c, err := api.NewClient(url, api.WithHTTPClient(&http.Client{Transport: b.http}))
	b.check(err)
	return c
}

// until waits for something to become true.
func (b *bed) until(what string, true func() bool) {
	b.Helper()
	for !true() {
		select {
		case <-b.ctx.Done():
			b.Fatalf("waited in vain until %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
