package testbed

import (
	"context"
	"fmt"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PullCRI pulls as a kubelet does, and gives the reference by digest that
// containerd answers with. Without a name, no credentials go with it.
func (c *Containerd) PullCRI(ctx context.Context, image, name, password string) (string, error) {
	spec := &runtime.ImageSpec{Image: image}
	request := &runtime.PullImageRequest{Image: spec}
	if name != "" {
		request.Auth = &runtime.AuthConfig{Username: name, Password: password}
	}
	pulled, err := c.images.PullImage(ctx, request)
	if err != nil {
		return "", fmt.Errorf("CRI pull of %s: %w", image, err)
	}
	status, err := c.images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: pulled.ImageRef}})
	if err != nil {
		return "", err
	}
	if status.Image == nil || len(status.Image.RepoDigests) == 0 {
		return "", fmt.Errorf("CRI pull of %s: containerd does not know %s afterwards", image, pulled.ImageRef)
	}
	return status.Image.RepoDigests[0], nil
}

// RemoveCRI removes an image that was pulled by PullCRI, with its blobs.
func (c *Containerd) RemoveCRI(ctx context.Context, image string) error {
	_, err := c.images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: image}})
	return err
}

// PullCtr pulls with ctr into the default namespace and unpacks: by the transfer
// service, in a containerd that has it. Without a hostsDir the containerd's own
// setting counts.
func (c *Containerd) PullCtr(ctx context.Context, image, hostsDir, name, password string) error {
	args := []string{"images", "pull"}
	if hostsDir != "" {
		args = append(args, "--hosts-dir", hostsDir)
	}
	if name != "" {
		args = append(args, "--user", name+":"+password)
	}
	_, err := c.Ctr(ctx, append(args, image)...)
	return err
}

// RemoveCtr removes an image from the default namespace, with its blobs.
func (c *Containerd) RemoveCtr(ctx context.Context, image string) error {
	_, err := c.Ctr(ctx, "images", "rm", "--sync", image)
	return err
}
