package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"accel/internal/testbed"

	"github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	core "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// recorder is an ordinary snapshotter that notes of which image containerd says layers are.
type recorder struct {
	core.Snapshotter
	mu   sync.Mutex
	told []string // "IMAGE MANIFEST LAYER"
}

func (r *recorder) Prepare(ctx context.Context, key, parent string, opts ...core.Opt) ([]mount.Mount, error) {
	var info core.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return nil, err
		}
	}
	if l := info.Labels; l["containerd.io/snapshot.ref"] != "" {
		const prefix = "containerd.io/snapshot/cri."
		r.mu.Lock()
		r.told = append(r.told, l[prefix+"image-ref"]+" "+l[prefix+"manifest-digest"]+" "+l[prefix+"layer-digest"])
		r.mu.Unlock()
	}
	return r.Snapshotter.Prepare(ctx, key, parent, opts...)
}

func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	told := r.told
	r.told = nil
	return told
}

// machine is one on which a real containerd runs, with the files of a person and of install.
type machine struct {
	*bed
	dir, tools string
	images     cri.ImageServiceClient
	conn       *grpc.ClientConn
	cmd        *exec.Cmd
	log        bytes.Buffer // read when the process has ended
}

// places are what keeps a containerd apart from others; the rest is its defaults.
var places = map[string]string{
	testbed.Containerd2: `version = 3
root = '%[1]s/root'
state = '%[1]s/state'
%[2]s
[grpc]
  address = '%[1]s/c'
[plugins.'io.containerd.internal.v1.opt']
  path = '%[1]s/opt'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = '%[1]s/s'
`,
	testbed.Containerd16: `version = 2
root = '%[1]s/root'
state = '%[1]s/state'
%[2]s
[grpc]
  address = '%[1]s/c'
[plugins.'io.containerd.internal.v1.opt']
  path = '%[1]s/opt'
`,
}

func newMachine(t *testing.T, version, imports, extra string) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: containerd needs root")
	}
	root, err := testbed.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "install") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := newBed(t)
	b.o.Registries, b.o.Unit, b.o.ContainerdVersion = []Registry{{Name: "docker.io"}}, nil, version
	b.o.Snapshotter = &Snapshotter{Socket: filepath.Join(dir, "a"), Root: filepath.Join(dir, "snapshots")}
	b.write(DefaultContainerdConfig, fmt.Sprintf(places[version], dir, imports)+extra)
	return &machine{bed: b, dir: dir, tools: filepath.Join(root, ".tools", "containerd-"+version)}
}

func (m *machine) config() string { return m.path(DefaultContainerdConfig) }

// dump is what containerd itself makes of its files.
func (m *machine) dump() string {
	m.Helper()
	out, err := exec.Command(filepath.Join(m.tools, "containerd"), "--config", m.config(), "config", "dump").CombinedOutput()
	if err != nil {
		m.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// start returns when CRI answers.
func (m *machine) start(ctx context.Context) {
	m.Helper()
	m.cmd = exec.Command(filepath.Join(m.tools, "containerd"), "--config", m.config())
	m.cmd.Stdout, m.cmd.Stderr = &m.log, &m.log
	if err := m.cmd.Start(); err != nil {
		m.Fatal(err)
	}
	m.Cleanup(m.stop)
	var err error
	m.conn, err = grpc.NewClient("unix://"+filepath.Join(m.dir, "c"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		m.Fatal(err)
	}
	m.images = cri.NewImageServiceClient(m.conn)
	for {
		_, err := m.images.ListImages(ctx, &cri.ListImagesRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			m.stop()
			m.Fatalf("%v; its log:\n%s", err, m.log.String())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (m *machine) stop() {
	if m.cmd == nil {
		return
	}
	err := errors.Join(m.conn.Close(), m.cmd.Process.Signal(syscall.SIGTERM))
	var exit *exec.ExitError
	if ended := m.cmd.Wait(); err != nil || ended != nil && !errors.As(ended, &exit) {
		m.Error(errors.Join(err, ended))
	}
	m.cmd = nil
}

// serve answers on the node's socket.
func (m *machine) serve() *recorder {
	m.Helper()
	inner, err := native.NewSnapshotter(m.o.Snapshotter.Root)
	if err != nil {
		m.Fatal(err)
	}
	r := &recorder{Snapshotter: inner}
	l, err := net.Listen("unix", m.o.Snapshotter.Socket)
	if err != nil {
		m.Fatal(err)
	}
	s := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(s, snapshotservice.FromSnapshotter(r))
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	m.Cleanup(func() {
		s.Stop()
		if err := errors.Join(<-ended, inner.Close()); err != nil {
			m.Error(err)
		}
	})
	return r
}

// image is one in a registry, with what a snapshotter is to be told when it is pulled.
func image(t *testing.T, host, repository string) (reference string, told []string) {
	t.Helper()
	img, err := random.Image(1<<10, 3)
	if err != nil {
		t.Fatal(err)
	}
	at, err := name.ParseReference(host+"/"+repository+":v1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(at, img); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		told = append(told, fmt.Sprint(at.Name(), " ", d, " ", l.Digest))
	}
	return at.Name(), told
}

// TestContainerdAsksForSnapshots: real ones, with what install writes or tells a person to.
func TestContainerdAsksForSnapshots(t *testing.T) {
	const parts = "imports = ['conf.d/*.toml']"
	for name, c := range map[string]struct{ version, imports, extra string }{
		"2.4":                 {testbed.Containerd2, parts, ""},
		"2.4 pulls by itself": {testbed.Containerd2, parts, "[plugins.'io.containerd.cri.v1.images']\nmax_concurrent_downloads = 5\n"},
		"2.4 has a list":      {testbed.Containerd2, parts, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'native'\n"},
		"1.6":                 {testbed.Containerd16, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			m := newMachine(t, c.version, c.imports, c.extra)
			m.install()
			conf, err := ReadContainerd(m.o.Root, DefaultContainerdConfig, c.version)
			if err != nil {
				t.Fatal(err)
			}
			if problem, mend := conf.SnapshotterProblem(*m.o.Snapshotter); problem != "" {
				if c.version != testbed.Containerd16 {
					t.Fatalf("left: %s: %s", problem, mend)
				}
				_, text, _ := strings.Cut(mend, "\n\n")
				text, links, _ := strings.Cut(text, "\n\nthen ln -s ")
				m.write(DefaultContainerdConfig, m.read(DefaultContainerdConfig)+text+"\n")
				words := strings.Fields(links)
				if err := errors.Join(os.MkdirAll(filepath.Dir(m.path(words[1])), 0o700), os.Symlink(words[0], m.path(words[1]))); err != nil {
					t.Fatal(err)
				}
			}
			if dump := m.dump(); !strings.Contains(dump, m.o.Snapshotter.Socket) || strings.Contains(dump, "unknown key") {
				t.Errorf("containerd makes of its files:\n%s", dump)
			}
			reg, err := testbed.StartRegistry(testbed.RegistryOptions{Dir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := reg.Close(); err != nil {
					t.Error(err)
				}
			})
			m.start(ctx) // while nobody answers for snapshots
			r := m.serve()
			pull := func(repository string, pull func(reference string) error) {
				t.Helper()
				reference, want := image(t, reg.Host(), repository)
				if err := pull(reference); err != nil {
					t.Error(err)
				}
				told := r.take()
				slices.Sort(told)
				slices.Sort(want)
				if !slices.Equal(slices.Compact(told), want) {
					t.Errorf("the snapshotter is told\n%s\nof a pull of\n%s", strings.Join(told, "\n"), strings.Join(want, "\n"))
				}
			}
			pull("by/cri", func(reference string) error {
				_, err := m.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: reference}})
				return err
			})
			if c.version == testbed.Containerd16 {
				return // its ctr says nothing of images, and has no transfer service
			}
			pull("by/ctr", func(reference string) error {
				out, err := exec.CommandContext(ctx, filepath.Join(m.tools, "ctr"), "--address", filepath.Join(m.dir, "c"), "images", "pull", "--snapshotter", SnapshotterName, "--plain-http", reference).CombinedOutput()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
				return err
			})
		})
	}
}
