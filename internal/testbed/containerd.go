package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"text/template"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	startPatience = time.Minute      // until a containerd answers
	stopPatience  = 20 * time.Second // until it ends by itself
	probeEvery    = 50 * time.Millisecond
)

// ContainerdOptions says how a containerd is to be.
type ContainerdOptions struct {
	// Version is one of those above.
	Version string
	// HostsDir is its config_path, as /etc/containerd/certs.d on a real node: a
	// directory for each registry with a hosts.toml. Empty for none.
	HostsDir string
	// SandboxImage is what pods' sandboxes run, for RunCRI. Empty for no pods.
	SandboxImage string
	// Extra is added to its config.toml.
	Extra string
}

// Containerd is one running containerd with the CRI plugin. Close ends it.
type Containerd struct {
	// Dir has everything that is this one's: root, state, config.toml and sockets.
	Dir string

	ctr           string
	program, file string // what Start runs, with which configuration
	cmd           *exec.Cmd
	log           lockedBuffer
	ended         chan struct{} // closed when the process has ended
	conn          *grpc.ClientConn
	images        runtime.ImageServiceClient
	failed        error // of the process, after ended
}

// lockedBuffer takes a process's output while others read it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Namespaces do not see each other's blobs, so that a pull into one is a pull
// whatever the others hold. A machine may not let root make a process less likely to be killed than
// itself (CAP_SYS_RESOURCE), which sandboxes ask for.
var configs = map[string]*template.Template{
	Containerd2: template.Must(template.New("").Parse(`version = 4
root = '{{.Dir}}/root'
state = '{{.Dir}}/state'
temp = '{{.Dir}}/temp'
[plugins.'io.containerd.server.v1.grpc']
  address = '{{.Socket}}'
[plugins.'io.containerd.server.v1.ttrpc']
  address = '{{.Socket}}.ttrpc'
[plugins.'io.containerd.metadata.v1.bolt']
  content_sharing_policy = 'isolated'
[plugins.'io.containerd.internal.v1.opt']
  path = '{{.Dir}}/opt'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = '{{.Dir}}/s'
[plugins.'io.containerd.transfer.v1.local']
  config_path = '{{.HostsDir}}'
{{with .SandboxImage}}[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{{.}}'
{{end}}[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '{{.HostsDir}}'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{{.Dir}}/cni/bin']
  conf_dir = '{{.Dir}}/cni/net.d'
{{.Extra}}`)),
	Containerd16: template.Must(template.New("").Parse(`version = 2
root = '{{.Dir}}/root'
state = '{{.Dir}}/state'
temp = '{{.Dir}}/temp'
[grpc]
  address = '{{.Socket}}'
[plugins.'io.containerd.metadata.v1.bolt']
  content_sharing_policy = 'isolated'
[plugins.'io.containerd.internal.v1.opt']
  path = '{{.Dir}}/opt'
[plugins.'io.containerd.grpc.v1.cri']
  restrict_oom_score_adj = true
{{with .SandboxImage}}  sandbox_image = '{{.}}'
{{end}}[plugins.'io.containerd.grpc.v1.cri'.registry]
  config_path = '{{.HostsDir}}'
[plugins.'io.containerd.grpc.v1.cri'.cni]
  bin_dir = '{{.Dir}}/cni/bin'
  conf_dir = '{{.Dir}}/cni/net.d'
{{.Extra}}`)),
}

// StartContainerd starts a containerd and waits until it and its CRI plugin
// answer. It needs root.
func StartContainerd(ctx context.Context, o ContainerdOptions) (_ *Containerd, err error) {
	config, ok := configs[o.Version]
	if !ok {
		return nil, fmt.Errorf("containerd %q: no such version here", o.Version)
	}
	program, err := tool(filepath.Join("containerd-"+o.Version, "containerd"))
	if err != nil {
		return nil, err
	}
	// Not a test's own directory: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "accel-containerd-")
	if err != nil {
		return nil, err
	}
	// A container in a user namespace has to get to its root file system below.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	c := &Containerd{Dir: dir, ctr: filepath.Join(filepath.Dir(program), "ctr")}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("containerd %s: %w; its log:\n%s", o.Version, err, c.log.String()), c.Close())
		}
	}()
	var text bytes.Buffer
	err = config.Execute(&text, map[string]string{"Dir": dir, "Socket": c.Socket(), "HostsDir": o.HostsDir, "SandboxImage": o.SandboxImage, "Extra": o.Extra})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, text.Bytes(), 0o600); err != nil {
		return nil, err
	}
	c.conn, err = grpc.NewClient("unix://"+c.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	c.images = runtime.NewImageServiceClient(c.conn)
	c.program, c.file = program, file
	return c, c.Start(ctx)
}

// Start starts it again after Crash.
func (c *Containerd) Start(ctx context.Context) error {
	c.ended = make(chan struct{})
	// Its life is Close's matter, not the context's.
	c.cmd = exec.Command(c.program, "--config", c.file) //nolint:noctx // see above
	c.cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(c.program)+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	c.cmd.Stdout, c.cmd.Stderr = &c.log, &c.log
	if err := c.cmd.Start(); err != nil {
		c.cmd = nil
		return err
	}
	go func(cmd *exec.Cmd, ended chan struct{}) {
		defer close(ended)
		c.failed = cmd.Wait()
	}(c.cmd, c.ended)
	return c.answers(ctx)
}

// Crash ends it and its containers as a machine's end does, without asking, and unmounts what was mounted
// below Dir. What is on disk stays, for Start.
func (c *Containerd) Crash() error {
	if c.cmd == nil {
		return nil
	}
	err := c.cmd.Process.Kill()
	<-c.ended
	c.cmd = nil
	return errors.Join(err, endShims(c.Socket()), UnmountBelow(c.Dir), os.RemoveAll(filepath.Join(c.Dir, "state")))
}

// answers waits for the CRI plugin, which is the last to get ready.
func (c *Containerd) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	for {
		_, err := c.images.ListImages(ctx, &runtime.ListImagesRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return nil
		}
		select {
		case <-c.ended:
			return fmt.Errorf("it ended: %w", c.failed)
		case <-ctx.Done():
			return fmt.Errorf("does not answer: %w", err)
		case <-time.After(probeEvery):
		}
	}
}

// Socket is where it listens.
func (c *Containerd) Socket() string { return filepath.Join(c.Dir, "c.sock") }

// Log is what it has said so far.
func (c *Containerd) Log() string { return c.log.String() }

// Ctr runs the ctr of the same version, in the default namespace, and gives what
// it said.
func (c *Containerd) Ctr(ctx context.Context, args ...string) (string, error) {
	out, err := c.CtrCommand(ctx, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// CtrCommand is what Ctr runs.
func (c *Containerd) CtrCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.ctr, append([]string{"--address", c.Socket()}, args...)...)
}

// Close ends the daemon and the containers that it started, unmounts what is
// mounted below Dir, and removes Dir. Closing twice is fine.
func (c *Containerd) Close() error {
	var errs []error
	if c.conn != nil {
		errs = append(errs, c.conn.Close())
		c.conn = nil
	}
	if c.cmd != nil {
		errs = append(errs, c.end())
		c.cmd = nil
	}
	if c.Dir != "" {
		errs = append(errs, endShims(c.Socket()), UnmountBelow(c.Dir), os.RemoveAll(c.Dir))
	}
	return errors.Join(errs...)
}

// end has the process stop, by force where asking does not do.
func (c *Containerd) end() error {
	select {
	case <-c.ended:
		return nil
	default:
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-c.ended:
		return nil
	case <-time.After(stopPatience):
	}
	err := c.cmd.Process.Kill()
	<-c.ended
	return err
}
