package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"accel"
	"accel/api"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func TestKilledAtManyInstants(t *testing.T) { killLoop(t, 50) }

func TestLongKilledAtManyInstants(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("SKIPPED here: the long kill loop runs in `make test-long`")
	}
	killLoop(t, 200)
	t.Log("killed 200 times")
}

// killLoop pushes an image, kills the service at a random instant between push
// and Ready, starts it again, waits for Ready, and so on: every image whose push was answered
// becomes Ready, once, and nothing is left over.
func killLoop(t *testing.T, kills int) {
	data := t.TempDir()
	const seed = 20
	rnd := rand.New(rand.NewPCG(seed, seed))
	u := start(t, data, "127.0.0.1:0", "--verify", "digest")
	host := u.registry
	// How long one image takes here decides how the instants are spread.
	u.push("warm:v0", killImage(t, 0))
	begin := time.Now()
	u.ready("warm:v0")
	span := max(time.Since(begin), 50*time.Millisecond)

	before := map[string]int{}
	for i := 1; i <= kills; i++ {
		img := killImage(t, uint64(i))
		u.push(fmt.Sprintf("app:v%d", i), img)
		instant := time.Duration(rnd.Int64N(int64(span)))
		time.Sleep(instant) // the instant of the kill, not a wait for anything
		if img, err := u.client.Readiness(context.Background(), fmt.Sprintf("%s/app:v%d", host, i), 0); err != nil {
			before["before intake"]++
		} else {
			before[string(img.State)]++
			if img.State == accel.Ready {
				span -= span / 10 // too late: the instants are to lie before Ready
			} else {
				span += span / 10
			}
		}
		u.kill()
		u = start(t, data, host, "--verify", "digest")
		u.ready(fmt.Sprintf("app:v%d", i))
	}
	t.Logf("killed %d times, at the end within %s after a push; states just before: %v", kills, span, before)
	if early := kills - before[string(accel.Ready)]; early < kills/4 {
		t.Errorf("only %d of %d kills came before Ready", early, kills)
	}
	seen := map[string]bool{}
	for i := 1; i <= kills; i++ {
		got := u.ready(fmt.Sprintf("app:v%d", i))
		if seen[got.ID] {
			t.Errorf("two pushes ended in record %s", got.ID)
		}
		seen[got.ID] = true
		requireWhole(t, u, got)
	}
	n := 0
	for img, err := range u.client.Images(context.Background(), api.ListOptions{}) {
		must(t, err)
		if n++; img.State != accel.Ready {
			t.Errorf("%s is %s: %s", img.Image, img.State, img.Reason)
		}
	}
	if n != kills+1 {
		t.Errorf("%d images in all, want %d: one for each push", n, kills+1)
	}
	u.stop()
}

func killImage(t *testing.T, seed uint64) v1.Image {
	return image(t, "amd64", gzipped(t, tarOf(t, file("f", noise(1000+seed, 4<<20), 0o644))), gzipped(t, tarOf(t, file("g", noise(5000+seed, 1<<20), 0o644))))
}

// requireWhole pulls a target's manifest by tag and digest, and its layers.
func requireWhole(t *testing.T, u *up, got api.Image) {
	t.Helper()
	if got.Target == nil || len(got.Target.Tags) != 1 {
		t.Errorf("%s has no target tag: %+v", got.Image, got.Target)
		return
	}
	ref, err := name.ParseReference(got.Target.Repository+":"+got.Target.Tags[0], name.Insecure)
	must(t, err)
	img, err := remote.Image(ref)
	if err != nil {
		t.Errorf("%s: %v", ref, err)
		return
	}
	d, err := img.Digest()
	must(t, err)
	if d.String() != got.Target.Digest {
		t.Errorf("%s is %s, want %s", ref, d, got.Target.Digest)
	}
	layers, err := img.Layers()
	must(t, err)
	for _, l := range layers {
		rc, err := l.Uncompressed()
		must(t, err)
		_, err = io.Copy(io.Discard, rc)
		if err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		rc.Close()
	}
}
