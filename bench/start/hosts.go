package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"accel/internal/testbed"
)

const (
	daemonPatience = time.Minute // until a daemon serves, and until it ends when asked
	daemonPoll     = 5 * time.Millisecond
)

// host is a node in one variant's way: a containerd and what gives it snapshots,
// both with roots of their own that were empty at the start.
type host struct {
	containerd  *testbed.Containerd
	daemon      *daemon // nil where containerd does it by itself
	snapshotter string
	hostsDir    string // hosts.toml files for containerd
	dir         string // the daemon's; removed with it
}

// startHost starts a host of system s, which pulls from b's registry.
func (b *bed) startHost(ctx context.Context, s system) (_ *host, err error) {
	// A short path: that of a socket has at most 107 bytes.
	h := &host{snapshotter: string(s)}
	if h.dir, err = os.MkdirTemp("", "accel-bench-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start a host of %s: %w", s, err), h.close())
		}
	}()
	h.hostsDir = filepath.Join(h.dir, "certs.d")
	o := testbed.ContainerdOptions{Version: testbed.Containerd2, HostsDir: h.hostsDir}
	socket := filepath.Join(h.dir, "snapshots.sock")
	switch s {
	case overlayfs:
	case stargz, stargzTuned:
		h.snapshotter = string(stargz)
		h.daemon, err = b.startStargz(ctx, stargzOrder{Root: filepath.Join(h.dir, "root"), Socket: socket, Tuned: s == stargzTuned})
	case accelNode:
		h.daemon, err = b.startNode(ctx, h.dir, socket, o.HostsDir)
	}
	if err != nil {
		return nil, err
	}
	if s != accelNode {
		if err := b.writeHostsFile(o.HostsDir); err != nil {
			return nil, err
		}
	}
	if h.daemon != nil {
		o.Extra = proxyPlugin(h.snapshotter, socket, h.dir)
	}
	h.containerd, err = testbed.StartContainerd(ctx, o)
	return h, err
}

// writeHostsFile has containerd ask the registry over plain HTTP, as stock users of
// such a registry configure it.
func (b *bed) writeHostsFile(dir string) error {
	dir = filepath.Join(dir, b.link.Host())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = %q\n", "http://"+b.link.Host()), 0o600)
}

// proxyPlugin is what containerd's configuration says of a remote snapshotter.
func proxyPlugin(name, socket, root string) string {
	return fmt.Sprintf(`
[proxy_plugins.%[1]s]
  type = 'snapshot'
  address = '%[2]s'
  [proxy_plugins.%[1]s.exports]
    root = '%[3]s'
    enable_remote_snapshot_annotations = 'true'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/amd64'
  snapshotter = 'overlayfs'
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/amd64'
  snapshotter = '%[1]s'
`, name, socket, root)
}

func (b *bed) startStargz(ctx context.Context, o stargzOrder) (*daemon, error) {
	order, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, string(order)) //nolint:noctx // its life is close's matter
	cmd.Env = append(os.Environ(), partVariable+"="+stargzPart)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	return b.startDaemon(ctx, cmd, in.Close, func(ctx context.Context) bool {
		c, err := new(net.Dialer).DialContext(ctx, "unix", o.Socket)
		return err == nil && c.Close() == nil
	})
}

// nodeConfig is the configuration of `accel node`: the registry, and lazy mounts
// of what the benchmark's key has signed.
func (b *bed) nodeConfig(dir, socket, mirror string) string {
	return fmt.Sprintf(`name: bench
listen: %[1]s
data: %[2]s/data
socket: %[2]s/node.sock
registries: [{host: %[3]q, plain_http: true}]
default_registry: %[3]q
cache: {budget: 0, free_floor: 0}
snapshotter: {socket: %[4]q, keys: %[5]q, runtime: %[2]s/run}
`, mirror, dir, b.link.Host(), socket, b.keysFile)
}

// startNode runs bin/accel in dir and has it write containerd's hosts.toml files.
func (b *bed) startNode(ctx context.Context, dir, socket, hostsDir string) (*daemon, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	if err := l.Close(); err != nil { // the port was free just now
		return nil, err
	}
	config := filepath.Join(dir, "node.yaml")
	if err := os.WriteFile(config, []byte(b.nodeConfig(dir, socket, l.Addr().String())), 0o600); err != nil {
		return nil, err
	}
	// Whoever runs this has keychains.
	env := append(os.Environ(), "DOCKER_CONFIG="+dir, "HOME="+dir)
	install := exec.CommandContext(ctx, accelProgram, "node", "install", "--no-unit", "--no-snapshotter", "--containerd-config-dir", hostsDir, "--config", config)
	install.Env = env
	if out, err := install.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("accel node install: %w: %s", err, out)
	}
	cmd := exec.Command(accelProgram, "node", "--config", config) //nolint:noctx // its life is close's matter
	cmd.Env = env
	admin := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "node.sock"))
	}}}
	ask := func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	return b.startDaemon(ctx, cmd, ask, func(ctx context.Context) bool {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node/healthz", nil)
		if err != nil {
			return false
		}
		res, err := admin.Do(req)
		if err != nil || res.Body.Close() != nil || res.StatusCode != http.StatusOK {
			return false
		}
		_, err = os.Stat(socket)
		return err == nil
	})
}

// daemon is a snapshotter's process, and what it has left to live on by itself.
type daemon struct {
	cmd   *exec.Cmd
	log   string // a file
	ask   func() error
	ended chan error
}

func (b *bed) startDaemon(ctx context.Context, cmd *exec.Cmd, ask func() error, serves func(context.Context) bool) (*daemon, error) {
	log, err := os.CreateTemp(b.dir, "daemon-*.log")
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Start()
	if err := errors.Join(err, log.Close()); err != nil {
		return nil, err
	}
	d := &daemon{cmd: cmd, log: log.Name(), ask: ask, ended: make(chan error, 1)}
	go func() { d.ended <- cmd.Wait() }()
	for begin := time.Now(); !serves(ctx); {
		select {
		case err := <-d.ended:
			d.ended <- err
			return nil, fmt.Errorf("%s ended: %w; its log:\n%s", cmd.Path, err, d.said())
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), d.end())
		case <-time.After(daemonPoll):
		}
		if time.Since(begin) > daemonPatience {
			return nil, errors.Join(fmt.Errorf("%s does not serve; its log:\n%s", cmd.Path, d.said()), d.end())
		}
	}
	return d, nil
}

// saidBytes of a log are the most that an error quotes.
const saidBytes = 4000

func (d *daemon) said() string {
	raw, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return string(raw[max(0, len(raw)-saidBytes):])
}

// end asks the process to end, and kills it where that does not do.
func (d *daemon) end() error {
	err := d.ask()
	select {
	case died := <-d.ended:
		return errors.Join(err, died)
	case <-time.After(daemonPatience):
	}
	err = errors.Join(errors.New("a daemon did not end when asked"), err, d.cmd.Process.Kill())
	return errors.Join(err, <-d.ended)
}

// pids are the daemons that belong to a host: containerd first, then the
// snapshotter, then the processes that this one has left by themselves.
func (h *host) pids() ([]int, error) {
	pids, err := processesNaming(filepath.Join(h.containerd.Dir, "config.toml"))
	if err != nil {
		return nil, err
	}
	if len(pids) != 1 {
		return nil, fmt.Errorf("%d processes are the containerd of %s", len(pids), h.containerd.Dir)
	}
	if h.daemon == nil {
		return pids, nil
	}
	more, err := processesNaming(h.dir)
	if err != nil {
		return nil, err
	}
	pids = append(pids, h.daemon.cmd.Process.Pid)
	for _, pid := range more {
		if !slices.Contains(pids, pid) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// cpu is what all of a host's daemons have used so far.
func (h *host) cpu() (time.Duration, error) {
	pids, err := h.pids()
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, pid := range pids {
		d, err := cpuOf(pid)
		if err != nil {
			return 0, err
		}
		sum += d
	}
	return sum, nil
}

// close ends everything and removes it: containers, containerd, the snapshotter
// with what it mounted.
func (h *host) close() error {
	var errs []error
	if h.containerd != nil {
		errs = append(errs, h.containerd.Close())
	}
	if h.daemon != nil {
		errs = append(errs, h.daemon.end())
	}
	left, err := processesNaming(h.dir) // a holder of mounts outlives its daemon by design
	errs = append(errs, err)
	errs = append(errs, testbed.UnmountBelow(h.dir))
	for _, pid := range left {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("end %d: %w", pid, err))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(h.dir))...)
}
