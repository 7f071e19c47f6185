package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"accel"
	"accel/node"
	"accel/registry"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	// dialTime bounds reaching containerd, endTime taking a container away.
	dialTime = 10 * time.Second
	endTime  = 30 * time.Second
	// askEvery is how often a program that starts is asked for an answer: what a start's time is exact to.
	askEvery = 5 * time.Millisecond
	// outputBytes of a container's end are kept, to be shown where it does not come up.
	outputBytes = 4 << 10
)

// containers pulls images and starts containers by containerd's API, in a namespace of its own.
type containers struct {
	client   *containerd.Client
	resolver remotes.Resolver
	owner    *owner
}

func (c *containers) close() error { return errors.Join(c.client.Close(), c.owner.close()) }

// containers connects to the containerd that the configuration names, and removes what others like it that were killed left
// in the namespace. Close it.
func (c *nodeConfig) containers(ctx context.Context, namespace string, live *node.Client, say func(string)) (*containers, context.Context, error) {
	client, err := containerd.New(c.Containerd.Socket, containerd.WithTimeout(dialTime))
	if err != nil {
		return nil, ctx, fmt.Errorf("containerd does not answer on %s (--containerd-socket): %w", c.Containerd.Socket, err)
	}
	resolver, err := c.resolver(ctx, c.Containerd.ConfigDir)
	if err != nil {
		return nil, ctx, errors.Join(err, client.Close())
	}
	o, err := newOwner(ctx)
	if err != nil {
		return nil, ctx, errors.Join(err, client.Close())
	}
	all, ctx := &containers{client, resolver, o}, namespaces.WithNamespace(ctx, namespace)
	if err := all.clear(ctx, namespace, live, say); err != nil {
		return nil, ctx, errors.Join(err, all.close())
	}
	return all, ctx, nil
}

// resolver asks registries with the node's credentials, by way of the mirrors that hosts.toml files name; without them where
// configDir is empty.
func (c *nodeConfig) resolver(ctx context.Context, configDir string) (remotes.Resolver, error) {
	hosts, err := registryHosts(c.Registries)
	if err != nil {
		return nil, usage(err)
	}
	// For its credentials alone; containerd's own client asks, also for registries that the node does not mirror.
	own, err := registry.New(registry.Options{Hosts: hosts, AllowAny: true, Keychain: registry.DefaultKeychain()})
	if err != nil {
		return nil, usage(err)
	}
	plain := func(host string) bool {
		return slices.ContainsFunc(hosts, func(h registry.Host) bool {
			return h.PlainHTTP && (h.Name == host || slices.Contains(h.Aliases, host))
		})
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: func(host string) ([]docker.RegistryHost, error) {
		o := dockerconfig.HostOptions{Credentials: func(host string) (string, string, error) { return credentials(ctx, own, host) }}
		if plain(host) {
			o.DefaultScheme = "http"
		}
		if configDir != "" {
			o.HostDir = dockerconfig.HostDirFromRoot(configDir)
		}
		return dockerconfig.ConfigureHosts(ctx, o)(host)
	}}), nil
}

// credentials are the node's own for a registry, as containerd takes them.
func credentials(ctx context.Context, own *registry.Client, host string) (user, secret string, err error) {
	a, err := own.Credentials(ctx, host)
	switch {
	case err != nil:
		return "", "", err
	case a.RegistryToken != "":
		return "", a.RegistryToken, nil
	case a.IdentityToken != "":
		return "", a.IdentityToken, nil
	default:
		return a.Username, a.Password, nil
	}
}

// pullName is what an image is pulled by.
func pullName(image string) (string, error) {
	ref, err := accel.ParseReference(image)
	if err != nil {
		return "", usage(err)
	}
	if ref.Digest != "" {
		return ref.Name() + "@" + ref.Digest.String(), nil
	}
	return ref.Name() + ":" + ref.Tag, nil
}

// pull brings an image for a snapshotter, asking it for every layer first.
func (c *containers) pull(ctx context.Context, image, snapshotter string) (containerd.Image, error) {
	name, err := pullName(image)
	if err != nil {
		return nil, err
	}
	img, err := c.client.Pull(ctx, name, containerd.WithPullUnpack, containerd.WithPullSnapshotter(snapshotter), containerd.WithResolver(c.resolver),
		containerd.WithPullLabel(labelOwner, c.owner.name),
		containerd.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(name)))
	if err != nil {
		// One that broke off while it was unpacked has the image's name already.
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
		defer cancel()
		return nil, errors.Join(fmt.Errorf("pull %s with snapshotter %s: %w", name, snapshotter, err), c.removeNamed(ending, name))
	}
	return img, nil
}

// remove takes an image away, and waits for containerd to have let go of it.
func (c *containers) remove(ctx context.Context, img containerd.Image) error {
	return c.removeNamed(ctx, img.Name())
}

func (c *containers) removeNamed(ctx context.Context, name string) error {
	err := c.client.ImageService().Delete(ctx, name, images.SynchronousDelete())
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// started is a container whose program runs.
type started struct {
	container containerd.Container
	task      containerd.Task
	exited    <-chan containerd.ExitStatus
	output    *tail
	began     time.Time // when its snapshot was about to be made
	created   time.Duration
}

// start makes a container on the host's network and starts it. args, if any, take the place of the image's command.
func (c *containers) start(ctx context.Context, img containerd.Image, snapshotter, id string, args []string) (s *started, err error) {
	s = &started{output: &tail{}, began: time.Now()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.end(ctx))
		}
	}()
	spec := []oci.SpecOpts{
		oci.WithImageConfigArgs(img, args), oci.WithHostNamespace(specs.NetworkNamespace), oci.WithHostHostsFile, oci.WithHostResolvconf,
	}
	s.container, err = c.client.NewContainer(ctx, id, containerd.WithImage(img), containerd.WithSnapshotter(snapshotter),
		containerd.WithContainerLabels(map[string]string{labelOwner: c.owner.name}), containerd.WithNewSnapshot(id, img), containerd.WithNewSpec(spec...))
	if err != nil {
		return s, fmt.Errorf("create a container: %w", err)
	}
	s.task, err = s.container.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, s.output, s.output)))
	if err != nil {
		return s, fmt.Errorf("create a container: %w", err)
	}
	if s.exited, err = s.task.Wait(ctx); err != nil {
		return s, err
	}
	s.created = time.Since(s.began)
	if err := s.task.Start(ctx); err != nil {
		return s, fmt.Errorf("start the container: %w", err)
	}
	return s, nil
}

// end kills what runs and takes the container away with its snapshot.
func (s *started) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	var errs []error
	if s.task != nil {
		if _, err := s.task.Delete(ctx, containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	if s.container != nil {
		if err := s.container.Delete(ctx, containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// answers waits until the program answers HTTP on a port, whatever it says. The error tells what is the matter otherwise.
func (s *started) answers(ctx context.Context, port int, limit time.Duration) (after time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	url := fmt.Sprintf("http://127.0.0.1:%d/", port)
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return 0, err
		}
		res, err := client.Do(req)
		if err == nil {
			after = time.Since(s.began)
			_ = res.Body.Close() // that it answers is enough
			return after, s.reachable(ctx, port)
		}
		select {
		case <-tick.C:
		case e := <-s.exited:
			return 0, fmt.Errorf("the program ended with exit code %d before it answered on port %d%s", e.ExitCode(), port, s.output.quoted())
		case <-ctx.Done():
			if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
				return 0, cause
			}
			return 0, s.silent(port, limit)
		}
	}
}

// reachable requires that it is this program that has the port open, and to more than the machine itself.
func (s *started) reachable(ctx context.Context, port int) error {
	open, err := listening(s.task.Pid())
	if err != nil {
		return err
	}
	infos, err := s.task.Pids(ctx)
	if err != nil {
		return err
	}
	pids := make([]uint32, 0, len(infos))
	for _, p := range infos {
		pids = append(pids, p.Pid)
	}
	var only []string
	for _, at := range open {
		if at.Port != port || !holds(pids, at.inode) {
			continue
		}
		if !at.IP.IsLoopback() {
			return nil
		}
		only = append(only, at.String())
	}
	if len(only) == 0 {
		return fmt.Errorf("something else on this machine answers on port %d, whose network the container uses; end that, or choose another port with --port", port)
	}
	return fmt.Errorf("the program listens on %s only, where nobody outside of its machine reaches it; have it listen on 0.0.0.0:%d", strings.Join(only, ", "), port)
}

// silent says why nobody answered in time.
func (s *started) silent(port int, limit time.Duration) error {
	open, err := listening(s.task.Pid())
	if err != nil {
		return err
	}
	for _, at := range open {
		if at.Port == port {
			return fmt.Errorf("the program listens on %s, but answered no HTTP request within %s (--startup-timeout)%s", at.String(), limit, s.output.quoted())
		}
	}
	return fmt.Errorf("nothing listens on port %d after %s (--startup-timeout): does the program serve HTTP there (--port)?%s", port, limit, s.output.quoted())
}

// free requires that nobody listens on a port of this machine yet.
func free(ctx context.Context, port int) error {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("something listens on port %d of this machine already, and the container would use its network; end that, or choose another port with --port", port)
	}
	return err
}

// tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if n := len(t.b) - outputBytes; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// quoted is that, to stand at the end of an error.
func (t *tail) quoted() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if said := bytes.TrimSpace(t.b); len(said) > 0 {
		return fmt.Sprintf("; its last words:\n%s", said)
	}
	return "; it said nothing"
}

// manifestOf is the manifest that this machine runs of an image.
func (c *containers) manifestOf(ctx context.Context, img containerd.Image) (ocispec.Manifest, error) {
	return images.Manifest(ctx, c.client.ContentStore(), img.Target(), img.Platform())
}

// manifestDigest is the digest of that.
func (c *containers) manifestDigest(ctx context.Context, img containerd.Image) (found digest.Digest, err error) {
	platform := img.Platform()
	target := img.Target()
	if !images.IsIndexType(target.MediaType) {
		return target.Digest, nil
	}
	members, err := images.Children(ctx, c.client.ContentStore(), target)
	if err != nil {
		return "", err
	}
	best, err := registry.Member(members, platform)
	if err != nil {
		return "", fmt.Errorf("index %s: %w", target.Digest, err)
	}
	return best.Digest, nil
}
