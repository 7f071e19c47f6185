package doctor

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel/install"
	"accel/internal/testbed"
	"accel/node"
	"accel/registry"

	"github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
)

func TestMain(m *testing.M) {
	logrus.SetOutput(io.Discard)                                                                         // the registry of the tests logs to it
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run")) // distribution never ends it
}

// TestRunningContainerd asks real ones, whose configuration is as a person's would be.
func TestRunningContainerd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: containerd needs root")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for _, version := range []string{testbed.Containerd2, testbed.Containerd16} {
		t.Run(version, func(t *testing.T) {
			m := newMachine(t)
			m.o.Root = "" // the real one: containerd's folder is its own
			hosts := t.TempDir()
			c, err := testbed.StartContainerd(ctx, testbed.ContainerdOptions{Version: version, HostsDir: hosts})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}()
			m.o.Install.ConfigDir, m.o.ContainerdConfig, m.o.ContainerdSocket = hosts, filepath.Join(c.Dir, "config.toml"), c.Socket()
			found := m.o.containerd(ctx)
			m.want(found, OK, "version "+version)
			m.want(found, OK, "looks for hosts.toml files in "+hosts)
			m.want(found, Fail, "does not ask the node")
			plan, err := install.Plan(m.o.Install)
			if err == nil {
				err = install.Apply(plan)
			}
			if err != nil {
				t.Fatal(err)
			}
			m.allOK(m.o.containerd(ctx))
			m.o.Install.ConfigDir = t.TempDir()
			m.want(m.o.containerd(ctx), Fail, "not in "+m.o.Install.ConfigDir)
		})
	}
}

// TestRunningContainerdThatMountsLazily looks at real ones, with the configuration that install
// writes or tells a person to, before and after the node answers.
func TestRunningContainerdThatMountsLazily(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: containerd needs root")
	}
	for version, text := range map[string]string{
		testbed.Containerd2: `
[proxy_plugins.accel]
  type = "snapshot"
  address = "SOCKET"
[proxy_plugins.accel.exports]
  enable_remote_snapshot_annotations = "true"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "accel"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "accel"
  differ = "walking"
`,
		testbed.Containerd16: `
[proxy_plugins.accel]
  type = "snapshot"
  address = "SOCKET"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "accel"
  disable_snapshot_annotations = false
`,
	} {
		t.Run(version, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			dir, err := os.MkdirTemp("", "doctor") // short, for the socket
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			m := newMachine(t)
			m.o.Root = ""
			s := install.Snapshotter{Socket: filepath.Join(dir, "s"), Root: filepath.Join(dir, "snapshots")}
			c, err := testbed.StartContainerd(ctx, testbed.ContainerdOptions{Version: version, Extra: strings.ReplaceAll(text, "SOCKET", s.Socket)})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}()
			if err := os.MkdirAll(filepath.Join(c.Dir, "root", "io.containerd.snapshotter.v1.accel"), 0o700); err != nil { // 1.x looks for its disk there
				t.Fatal(err)
			}
			m.o.ContainerdConfig, m.o.ContainerdSocket = filepath.Join(c.Dir, "config.toml"), c.Socket()
			found := m.o.asked(ctx, s)
			m.want(found, OK, "asks for snapshots at")
			m.want(found, OK, "runs with the snapshotter accel")
			m.want(found, Fail, "no container starts")

			inner, err := native.NewSnapshotter(s.Root)
			if err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", s.Socket)
			if err != nil {
				t.Fatal(err)
			}
			server := grpc.NewServer()
			snapshots.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(inner))
			ended := make(chan error, 1)
			go func() { ended <- server.Serve(l) }()
			m.allOK(m.o.asked(ctx, s))
			server.Stop()
			if err := errors.Join(<-ended, inner.Close()); err != nil {
				t.Error(err)
			}
			// What a person has written since containerd started.
			m.o.ContainerdConfig = filepath.Join(dir, "config.toml")
			m.write(m.o.ContainerdConfig, "version = 3\n")
			m.want(m.o.asked(ctx, s), Warn, "no proxy plugin")
		})
	}
}

// TestContainerdThatWasNotRestarted has the snapshotter in its configuration only.
func TestContainerdThatWasNotRestarted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: containerd needs root")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	c, err := testbed.StartContainerd(ctx, testbed.ContainerdOptions{Version: testbed.Containerd2})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	m := newMachine(t)
	m.o.Root, m.o.ContainerdConfig, m.o.ContainerdSocket = "", filepath.Join(t.TempDir(), "config.toml"), c.Socket()
	m.write(m.o.ContainerdConfig, "version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'accel'\n")
	m.want(m.o.asked(ctx, install.Snapshotter{Socket: "/no/such", Root: "/r"}), Fail, "runs without the snapshotter")
}

// TestRunningNode examines a daemon and what it depends on, all real.
func TestRunningNode(t *testing.T) {
	m := newMachine(t)
	dir, err := os.MkdirTemp("", "doctor") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	reg, err := testbed.StartRegistry(testbed.RegistryOptions{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	hosts := []registry.Host{{Name: reg.Host(), PlainHTTP: true}}
	client, err := registry.New(registry.Options{Hosts: hosts, Attempts: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	n, err := node.Open(node.Options{Name: "n1", Version: "test", Dir: dir, Registry: client, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	mirror, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	admin, err := node.ListenAdmin(ctx, filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		err := n.Run(ctx, node.Listeners{Mirror: mirror, Admin: admin})
		ended <- errors.Join(err, n.Close())
	}()
	m.o.Node = node.NewClient(filepath.Join(dir, "s"))
	defer m.o.Node.Close()
	m.o.Install.Mirror = "http://" + mirror.Addr().String()
	m.o.Registries, m.o.Client = hosts, client
	found := m.o.daemon(ctx)
	m.want(found, OK, "n1 runs since")
	m.want(found, OK, "the mirror answers")
	if os.Geteuid() == 0 {
		m.want(m.o.served(ctx), OK, "runs as root")
	}
	m.o.Install.Mirror = "http://127.0.0.1:1"
	m.want(m.o.daemon(ctx), Fail, "does not answer")
	m.o.HTTP.CloseIdleConnections()
	stop()
	if err := errors.Join(<-ended, reg.Close()); err != nil {
		t.Error(err)
	}
	m.want(Examine(context.Background(), m.o), Fail, "does not run")
}
