package doctor

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"accel/install"
	"accel/internal/testbed"
	"accel/node"
	"accel/registry"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
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
		err := n.Run(ctx, mirror, admin)
		ended <- errors.Join(err, n.Close())
	}()
	m.o.Node = node.NewClient(filepath.Join(dir, "s"))
	defer m.o.Node.Close()
	m.o.Install.Mirror = "http://" + mirror.Addr().String()
	m.o.Registries, m.o.Client = hosts, client
	found := m.o.daemon(ctx)
	m.want(found, OK, "n1 runs since")
	m.want(found, OK, "the mirror answers")
	m.o.Install.Mirror = "http://127.0.0.1:1"
	m.want(m.o.daemon(ctx), Fail, "does not answer")
	m.o.HTTP.CloseIdleConnections()
	stop()
	if err := errors.Join(<-ended, reg.Close()); err != nil {
		t.Error(err)
	}
	m.want(Examine(context.Background(), m.o), Fail, "does not run")
}
