package e2e

import (
	"strings"
	"testing"

	"accel/internal/testbed"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func indexOf(t *testing.T, images ...v1.Image) v1.ImageIndex {
	t.Helper()
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, img := range images {
		cfg, err := img.ConfigFile()
		must(t, err)
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: cfg.Architecture}}})
	}
	return idx
}

// TestClientsWithoutNode shows that the parts themselves work, so that what
// fails in the tests of the node is the node's.
func TestClientsWithoutNode(t *testing.T) {
	needsClients(t)
	reg := startRegistry(t)
	amd := image(t, "amd64", program(t), gzipped(t, tarOf(t, file("data", noise(1, 4<<20), 0o644))))
	want, hash := pushTo(t, reg, "team/app:v1", indexOf(t, amd, image(t, "arm64", gzipped(t, tarOf(t, file("arm", noise(2, 1<<20), 0o644))))))
	platform, err := amd.Digest()
	must(t, err)
	for _, c := range newClients(t, route{}) {
		t.Run(c.name, func(t *testing.T) {
			for _, who := range [][2]string{{"", ""}, {other, otherPassword}, {reader, "wrong"}} {
				if _, err := c.pull(want, who[0], who[1]); err == nil {
					t.Errorf("%q pulled without the right to it", who)
				}
			}
			reg.Reset()
			got, err := c.pull(want, reader, readerPassword)
			must(t, err)
			if got != hash && got != platform.String() {
				t.Errorf("it has %s, want %s or %s", got, hash, platform)
			}
			requireOnce(t, reg.Delivered(), amd)
			must(t, c.forget(want))
			must(t, reg.Stop())
			if _, err := c.pull(want, reader, readerPassword); err == nil {
				t.Error("it pulled from a registry that is stopped: it had not forgotten the image")
			}
			must(t, reg.Start())
		})
	}
}

// requireOnce requires that a registry delivered each of an image's layers once.
func requireOnce(t *testing.T, d testbed.Delivered, img v1.Image) {
	t.Helper()
	for h, size := range layerSizes(t, img) {
		if got := d.Blobs[h]; got != size {
			t.Errorf("layer %s: %d bytes delivered, want %d", h, got, size)
		}
	}
}

func TestContainersRunAfterPull(t *testing.T) {
	needsClients(t)
	reg := startRegistry(t)
	ref, _ := pushTo(t, reg, "team/app:v1", image(t, "amd64", program(t)))
	for _, version := range []string{testbed.Containerd2, testbed.Containerd16} {
		t.Run(version, func(t *testing.T) {
			c := startContainerd(t, version, "")
			must(t, c.PullCtr(t.Context(), ref, "", reader, readerPassword))
			said, err := c.Ctr(t.Context(), "run", "--rm", ref, "one", "/hello")
			must(t, err)
			if !strings.Contains(said, greeting) {
				t.Errorf("the container says %q", said)
			}
		})
	}
}
