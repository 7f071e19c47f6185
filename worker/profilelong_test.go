package worker_test

import (
	"os"
	"slices"
	"testing"
	"time"

	"accel"
	"accel/internal/debimage"
	"accel/profile"
	"accel/readiness"
	"accel/registry"
	"accel/worker"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/prometheus/client_golang/prometheus"
)

// TestPredictionOfARealImage converts a Debian image with Python, once with all its layers at
// hand, and once more with another program on top, when they are in the registry alone.
func TestPredictionOfARealImage(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("the Debian images are made in make test-long (ACCEL_TEST_LONG=1)")
	}
	for name, make := range map[string]func() (v1.Image, error){
		"pyweb": func() (v1.Image, error) { return debimage.PyWeb(t.Context(), os.Stderr) },
		"pyapp": func() (v1.Image, error) { return debimage.PyApp(t.Context(), os.Stderr) },
	} {
		t.Run(name, func(t *testing.T) {
			img, err := make()
			must(t, err)
			metrics := prometheus.NewRegistry()
			b := newProfileBed(t, func(_ *bed, _ *readiness.Options, _ *registry.Options, o *worker.Options) { o.Registerer = metrics })
			for n, tag := range []string{"v1", "v2"} {
				if n > 0 {
					img, err = mutate.AppendLayers(img, layerOf(t, map[string]string{"etc/new": "1"}))
					must(t, err)
				}
				began := time.Now()
				d := b.upload("team/app:"+tag, img)
				b.tell("team/app:"+tag, d, time.Now(), ociManifest)
				rec := b.wait("team/app:"+tag, accel.Ready)
				ready := time.Since(began)
				_, _, err := b.profiles.Profile(b.ctx, d)
				p := b.profile(d, accel.ProfilePredicted)
				t.Logf("%s: Ready after %v (%v converted, %v pushed, %v read back); predicted %d parts, %d bytes; there at Ready: %v, else %v later",
					tag, ready, rec.Result.Convert, rec.Result.Push, rec.Result.Verify, len(p.Items), p.Bytes(), err == nil, time.Since(began)-ready)
				if !slices.ContainsFunc(p.Items, func(i accel.ProfileItem) bool { return i.Path == "usr/bin/python3.11" }) {
					t.Errorf("the interpreter is not predicted: %v", paths(p)[:min(20, len(p.Items))])
				}
				artifact := b.published("team/app", p)
				desc, err := b.client.Head(b.ctx, rec.Repository, artifact.String())
				must(t, err)
				encoded, err := profile.Encode(p)
				must(t, err)
				took, err := metrics.Gather()
				must(t, err)
				for _, m := range took {
					if m.GetName() == "accel_profile_prediction_seconds" {
						t.Logf("%s: predictions took %.2f s until now", tag, m.Metric[0].Histogram.GetSampleSum())
					}
				}
				t.Logf("%s: encoded in %d bytes, packed %d, manifest of the artifact %d", tag, len(encoded), len(profile.Pack(encoded)), desc.Size)
			}
		})
	}
}
