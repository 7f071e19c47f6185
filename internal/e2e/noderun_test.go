package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"accel/internal/testbed"
)

// nodeRun is one `accel node` with all that is its own.
type nodeRun struct {
	t      *testing.T
	config string // the file
	dir    string
	mirror string // "host:port"
	// snapshotter is the socket for containerd; empty: there is none.
	snapshotter string
	cmd         *exec.Cmd
	log         *lockedBuffer
	ended       chan error
}

// quiet is when the nodes here take a pull for ended.
const quiet = 400 * time.Millisecond

// newNode configures a node for one registry. With a user, that is the node's
// own credential. More are further lines of the configuration, of its snapshotter where they are indented.
func newNode(t *testing.T, reg *testbed.Registry, server, user, password string, more ...string) *nodeRun {
	t.Helper()
	return newNodeAt(t, reg, server, user, password, "", more...)
}

// newNodeAt is newNode that has containerd's snapshots on a socket of that name in its directory; empty: it has
// none.
func newNodeAt(t *testing.T, reg *testbed.Registry, server, user, password, snapshotter string, more ...string) *nodeRun {
	t.Helper()
	// Not the test's own directory: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "accel-node-")
	must(t, err)
	n := &nodeRun{t: t, dir: dir, config: filepath.Join(dir, "node.yaml"), mirror: freeAddress(t)}
	t.Cleanup(func() {
		n.kill()
		if t.Failed() && n.log != nil {
			t.Logf("node:\n%s", n.log)
		}
		os.RemoveAll(dir)
	})
	if snapshotter != "" {
		n.snapshotter = filepath.Join(dir, snapshotter)
	}
	own := ""
	if user != "" {
		file := filepath.Join(dir, "password")
		must(t, os.WriteFile(file, []byte(password), 0o600))
		own = fmt.Sprintf(", username: %s, password_file: %s", user, file)
	}
	must(t, os.WriteFile(n.config, fmt.Appendf(nil, `name: node-1
labels: {zone: a}
listen: %s
data: %s
socket: %s
registries: [{host: %q, plain_http: true%s}]
default_registry: %q
server: {url: %q}
heartbeat: 1s
cache: {budget: 2GB, free_floor: 1MB}
mirror: {tag_ttl: 0s}
pulls: {quiet: %s}
snapshotter:
  socket: %q
  runtime: %s
%s
`, n.mirror, filepath.Join(dir, "data"), n.socket(), reg.Host(), own, reg.Host(), server, quiet, n.snapshotter, filepath.Join(dir, "run"), strings.Join(more, "\n")), 0o600))
	return n
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

func (n *nodeRun) socket() string { return filepath.Join(n.dir, "node.sock") }

// start runs the node and waits until it answers.
func (n *nodeRun) start() *nodeRun {
	n.t.Helper()
	path, err := binary()
	must(n.t, err)
	n.log, n.ended = &lockedBuffer{}, make(chan error, 1)
	n.cmd = exec.Command(path, "node", "--config", n.config)
	// The keychain of whoever runs the tests is none of theirs.
	n.cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+n.dir, "HOME="+n.dir)
	n.cmd.Stderr = n.log
	must(n.t, n.cmd.Start())
	go func(cmd *exec.Cmd, ended chan error) { ended <- cmd.Wait() }(n.cmd, n.ended)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.socket())
	}}}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if res, err := client.Get("http://node/healthz"); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return n
			}
		}
		select {
		case err := <-n.ended:
			n.ended <- err
			n.t.Fatalf("accel node ended: %v\n%s", err, n.log)
		default:
		}
		if time.Since(begin) > patience {
			n.t.Fatalf("accel node does not answer\n%s", n.log)
		}
	}
}

// kill ends the process as a power cut would. Killing twice, or before it was
// started, is fine.
func (n *nodeRun) kill() {
	if n.cmd == nil {
		return
	}
	if err := n.cmd.Process.Kill(); err == nil {
		<-n.ended
	}
}

// stop asks the node to end and requires that it does so well.
func (n *nodeRun) stop() {
	n.t.Helper()
	must(n.t, n.cmd.Process.Signal(syscall.SIGTERM))
	if err := <-n.ended; err != nil {
		n.t.Errorf("accel node ended with %v after SIGTERM\n%s", err, n.log)
	}
}

// metrics are the node's, as Prometheus reads them.
func (n *nodeRun) metrics() string {
	n.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.socket())
	}}}
	res, err := client.Get("http://node/metrics")
	must(n.t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	must(n.t, err)
	return string(text)
}

// accel runs the program with a node's configuration and gives what it said on
// standard output.
func (n *nodeRun) accel(args ...string) string {
	n.t.Helper()
	out, err := accelCommand(append(args, "--config", n.config)...)
	must(n.t, err)
	return out
}

func accelCommand(args ...string) (string, error) {
	path, err := binary()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(path, args...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("accel %s: %w: %s%s", strings.Join(args, " "), err, out, said.String())
	}
	return string(out), nil
}

// installed has `accel node install` write the hosts.toml files that containerd
// reads, and gives their directory.
func (n *nodeRun) installed() string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "certs.d")
	n.accel("node", "install", "--no-unit", "--no-snapshotter", "--containerd-config-dir", dir)
	return dir
}
