package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"accel"
)

const (
	sampleEvery  = 100 * time.Millisecond
	nodePatience = time.Minute
)

// nodeProcess is one running `accel node`, with its log kept for error messages.
type nodeProcess struct {
	cmd     *exec.Cmd
	log     bytes.Buffer
	mirror  string
	admin   *http.Client  // over the node's socket
	started time.Duration // from exec to the first good /healthz
}

// startNode runs bin/accel in dir for one registry.
func startNode(ctx context.Context, dir, registry string, ownCredential bool) (*nodeProcess, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	n := &nodeProcess{mirror: l.Addr().String()}
	if err := l.Close(); err != nil { // the port was free just now
		return nil, err
	}
	own := ""
	if ownCredential {
		file := filepath.Join(dir, "password")
		if err := os.WriteFile(file, []byte(password), 0o600); err != nil {
			return nil, err
		}
		own = fmt.Sprintf(", username: %s, password_file: %s", user, file)
	}
	socket, config := filepath.Join(dir, "node.sock"), filepath.Join(dir, "node.yaml")
	text := fmt.Sprintf("name: bench\nlisten: %s\ndata: %s\nsocket: %s\nregistries: [{host: %q, plain_http: true%s}]\ndefault_registry: %q\ncache: {budget: 0, free_floor: 0}\n",
		n.mirror, filepath.Join(dir, "data"), socket, registry, own, registry)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	n.cmd = exec.CommandContext(ctx, filepath.Join("bin", "accel"), "node", "--config", config)
	n.cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+dir, "HOME="+dir) // whoever runs this has keychains
	n.cmd.Stdout, n.cmd.Stderr = &n.log, &n.log
	n.admin = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	begin := time.Now()
	if err := n.cmd.Start(); err != nil {
		return nil, err
	}
	for ctx.Err() == nil && time.Since(begin) < nodePatience {
		if n.healthy(ctx) {
			n.started = time.Since(begin)
			return n, nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return nil, errors.Join(fmt.Errorf("the node did not get ready; its log:\n%s", n.log.String()), n.stop())
}

func (n *nodeProcess) ask(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node"+path, nil)
	if err != nil {
		return nil, err
	}
	return n.admin.Do(req)
}

func (n *nodeProcess) healthy(ctx context.Context) bool {
	res, err := n.ask(ctx, "/healthz")
	if err != nil {
		return false
	}
	return res.Body.Close() == nil && res.StatusCode == http.StatusOK
}

// requireBlobs is an error where the node's cache has not so many blobs.
func (n *nodeProcess) requireBlobs(ctx context.Context, want int) error {
	res, err := n.ask(ctx, "/v1/node")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	var self accel.Node
	if err := json.NewDecoder(res.Body).Decode(&self); err != nil {
		return err
	}
	if self.Cache.Blobs != want {
		return fmt.Errorf("the node has %d blobs, want %d; its log:\n%s", self.Cache.Blobs, want, n.log.String())
	}
	return nil
}

func (n *nodeProcess) stop() error {
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return n.cmd.Wait()
}

// throughNode has the clients pull through a node that has nothing, and through
// the same one again.
func throughNode(ctx context.Context, s setting, reg *registryProcess) (cold, warm outcome, err error) {
	dir, err := os.MkdirTemp(s.dir, "node-")
	if err != nil {
		return cold, warm, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	n, err := startNode(ctx, dir, reg.host, s.nodeCredential)
	if err != nil {
		return cold, warm, err
	}
	defer func() { err = errors.Join(err, n.stop()) }()
	if cold, err = n.watched(func() (outcome, error) { return reg.pullAll(ctx, s, n.mirror, !s.nodeCredential) }); err != nil {
		return cold, warm, fmt.Errorf("cold mirror: %w\n%s", err, n.log.String())
	}
	if warm, err = n.watched(func() (outcome, error) { return reg.pullAll(ctx, s, n.mirror, !s.nodeCredential) }); err != nil {
		return cold, warm, fmt.Errorf("warm mirror: %w\n%s", err, n.log.String())
	}
	return cold, warm, nil
}

// memory of a process that is resident, in MB.
type memory struct {
	anonymous float64
	index     float64 // pages of *.db files that are mapped
}

// watched samples the node's memory while do runs, and adds the most to its outcome.
func (n *nodeProcess) watched(do func() (outcome, error)) (outcome, error) {
	done := make(chan struct{})
	sampled := make(chan error, 1)
	var peak memory
	go func() {
		for {
			m, err := n.memory()
			if err != nil {
				sampled <- err
				return
			}
			peak.anonymous, peak.index = max(peak.anonymous, m.anonymous), max(peak.index, m.index)
			select {
			case <-done:
				sampled <- nil
				return
			case <-time.After(sampleEvery):
			}
		}
	}()
	o, err := do()
	close(done)
	err = errors.Join(err, <-sampled)
	o.memory = peak
	return o, err
}

// memory reads smaps: what it says of each mapping sums up to smaps_rollup, and
// the index's mappings are told by their file.
func (n *nodeProcess) memory() (memory, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", n.cmd.Process.Pid))
	if err != nil {
		return memory{}, err
	}
	var m memory
	ofIndex := false
	for line := range strings.Lines(string(raw)) {
		fields := strings.Fields(line)
		if !strings.HasSuffix(fields[0], ":") { // "address perms offset dev inode path"
			ofIndex = strings.HasSuffix(fields[len(fields)-1], ".db")
			continue
		}
		var sum *float64
		switch {
		case fields[0] == "Anonymous:":
			sum = &m.anonymous
		case fields[0] == "Rss:" && ofIndex:
			sum = &m.index
		default:
			continue
		}
		kib, err := strconv.ParseFloat(fields[1], 64)
		if err != nil {
			return memory{}, err
		}
		*sum += kib * 1024 / megabyte
	}
	return m, nil
}
