package mirror_test

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"accel/mirror"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// containerd is its client, with a user's credentials, that is told of the mirror alone.
func containerd(n *node, user string) remotes.Resolver {
	authorizer := docker.NewDockerAuthorizer(docker.WithAuthCreds(func(string) (string, string, error) { return user, users[user], nil }))
	return docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{Client: http.DefaultClient, Authorizer: authorizer, Host: strings.TrimPrefix(n.url, "http://"),
			Scheme: "http", Path: "/v2", Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve}}, nil
	}})
}

// TestContainerdsClient, with the credentials of an imagePullSecret that the node does not
// have, goes through the registry's token service and pulls by way of the mirror alone.
func TestContainerdsClient(t *testing.T) {
	ctx := context.Background()
	up := newUpstream(t)
	img := image(t, 2<<20, 10)
	want := up.push(t, "alice/app", img, "v1")
	n := newNode(t, up)
	resolver := func(user string) (ocispec.Descriptor, func(ocispec.Descriptor) ([]byte, error), error) {
		r := containerd(n, user)
		ref := up.host + "/alice/app:v1"
		_, desc, err := r.Resolve(ctx, ref)
		if err != nil {
			return desc, nil, err
		}
		fetcher, err := r.Fetcher(ctx, ref)
		return desc, func(d ocispec.Descriptor) ([]byte, error) {
			rc, err := fetcher.Fetch(ctx, d)
			if err != nil {
				return nil, err
			}
			defer rc.Close()
			return io.ReadAll(rc)
		}, err
	}
	desc, fetch, err := resolver("alice")
	if err != nil || desc.Digest != want {
		t.Fatalf("resolved to %s, %v", desc.Digest, err)
	}
	if raw, err := fetch(desc); err != nil || digest.FromBytes(raw) != want {
		t.Errorf("manifest: %v", err)
	}
	for i := range 2 {
		d, content := layer(t, img, i)
		got, err := fetch(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: int64(len(content))})
		if err != nil || digest.FromBytes(got) != d {
			t.Errorf("layer %d: %d bytes, %v", i, len(got), err)
		}
	}
	for _, x := range n.seen() {
		if !x.Complete || x.Err != nil || x.Client != n.seen()[0].Client {
			t.Errorf("transfer %+v", x)
		}
	}
	if _, _, err := resolver("bob"); err == nil {
		t.Error("bob resolves alice's image")
	}
}

// TestCranesClient names the registry within the image's name, or not at all.
func TestCranesClient(t *testing.T) {
	up := newUpstream(t)
	want := up.push(t, "alice/app", image(t, 2<<20, 10), "v1")
	rich, def := newNode(t, up, own("alice")), newNode(t, up, func(o *mirror.Options) { o.Default = up.host })
	pull := func(n *node, image string, auth authn.Authenticator) (v1.Image, error) {
		ref, err := name.ParseReference(strings.TrimPrefix(n.url, "http://")+"/"+image, name.Insecure)
		if err != nil {
			return nil, err
		}
		return remote.Image(ref, remote.WithAuth(auth))
	}
	for title, c := range map[string]struct {
		n     *node
		image string
		auth  authn.Authenticator
		fails bool
	}{
		"by the node's credentials":   {n: rich, image: strings.Replace(up.host, ":", "_", 1) + "/alice/app:v1", auth: authn.Anonymous},
		"by its own":                  {n: def, image: "alice/app:v1", auth: authn.FromConfig(authn.AuthConfig{Username: "alice", Password: users["alice"]})},
		"by none":                     {n: def, image: "alice/app:v1", auth: authn.Anonymous, fails: true},
		"by somebody else's":          {n: def, image: "alice/app:v1", auth: authn.FromConfig(authn.AuthConfig{Username: "bob", Password: users["bob"]}), fails: true},
		"by the node's, by digest":    {n: rich, image: strings.Replace(up.host, ":", "_", 1) + "/alice/app@" + want.String(), auth: authn.Anonymous},
		"by the node's, not for this": {n: rich, image: strings.Replace(up.host, ":", "_", 1) + "/bob/app:v1", auth: authn.Anonymous, fails: true},
	} {
		img, err := pull(c.n, c.image, c.auth)
		if c.fails {
			if err == nil {
				t.Errorf("%s: succeeds", title)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", title, err)
			continue
		}
		if got := digestOf(t, img); got != want {
			t.Errorf("%s: %s", title, got)
		}
		for i := range 2 {
			layer(t, img, i) // whose reader checks the digest
		}
	}
}
