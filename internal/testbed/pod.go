package testbed

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is a pod with one container that runs, on the host's network. Remove ends it.
type Pod struct {
	runtime            runtime.RuntimeServiceClient
	sandbox, container string
}

var pods atomic.Int64 // a pod's name may not come twice

// RunCRI starts a container as a kubelet does. The containerd has to be told of a sandbox image that it can pull.
func (c *Containerd) RunCRI(ctx context.Context, image string, command ...string) (_ *Pod, err error) {
	p := &Pod{runtime: runtime.NewRuntimeServiceClient(c.conn)}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("CRI run of %s: %w", image, err), p.Remove(context.WithoutCancel(ctx)))
		}
	}()
	name := fmt.Sprintf("pod-%d", pods.Add(1))
	hostNetwork := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER}
	pod := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: name, Uid: name, Namespace: "default"},
		Linux:    &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: hostNetwork}},
	}
	sandbox, err := p.runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return nil, err
	}
	p.sandbox = sandbox.PodSandboxId
	container, err := p.runtime.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId: p.sandbox, SandboxConfig: pod,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "main"}, Image: &runtime.ImageSpec{Image: image}, Command: command,
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: hostNetwork}},
		},
	})
	if err != nil {
		return nil, err
	}
	p.container = container.ContainerId
	_, err = p.runtime.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: p.container})
	return p, err
}

// Exec runs a program in the container to its end and gives what it said.
func (p *Pod) Exec(ctx context.Context, command ...string) (string, error) {
	r, err := p.runtime.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: p.container, Cmd: command})
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("%q ended with %d: %s", command, r.ExitCode, r.Stderr)
	}
	return string(r.Stdout), nil
}

// Remove ends and removes the container and the pod. Removing twice is fine.
func (p *Pod) Remove(ctx context.Context) error {
	if p.sandbox == "" {
		return nil
	}
	_, stopped := p.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	_, removed := p.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	p.sandbox = ""
	return errors.Join(stopped, removed)
}
