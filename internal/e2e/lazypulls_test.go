package e2e

import (
	"testing"
	"time"

	"accel"
	"accel/internal/testbed"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// TestLazyPullsAreListed: each by itself and as long as it took its client, of two images that share all layers, in two namespaces, and of
// one image in a row.
func TestLazyPullsAreListed(t *testing.T) {
	b := newLazyBed(t, testbed.Containerd2)
	img := withLayers(t, readerImage(t, 1), "amd64", gzipped(t, tarOf(t, file("note", "the topmost layer", 0o644))))
	one, _ := pushTo(t, b.reg, "team/one:v1", img)
	config, err := img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.Config.Env = append(config.Config.Env, "ANOTHER=1")
	img, err = mutate.ConfigFile(img, config)
	must(t, err)
	two, _ := pushTo(t, b.reg, "team/two:v1", img)
	b.convert(one)
	b.convert(two)

	var images []string
	var took []time.Duration
	pull := func(namespace, ref string) {
		t.Helper()
		began := time.Now()
		_, err := b.c.Ctr(t.Context(), "-n", namespace, "images", "pull", "--snapshotter", "accel", "--user", reader+":"+readerPassword, ref)
		must(t, err)
		images, took = append(images, ref), append(took, time.Since(began))
	}
	pull("default", one)
	pull("other", two)
	_, err = b.c.Ctr(t.Context(), "-n", "other", "images", "rm", "--sync", two)
	must(t, err)
	for range 3 {
		must(t, b.c.RemoveCtr(t.Context(), one))
		pull("default", one)
	}
	for i, p := range b.node.reported(b.server, len(images)) {
		if p.Mode != accel.PullLazy || p.Image != images[i] || p.Duration <= 0 || p.Duration > took[i] {
			t.Errorf("pull %d of %s took %v; listed is %+v", i, images[i], took[i], p)
		}
	}
}
