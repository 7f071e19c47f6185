package mirror_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/registry"
)

func TestWarm(t *testing.T) {
	ctx := context.Background()
	up := newUpstream(t)
	img, other := image(t, 3<<20, 5), image(t, 777)
	d := up.push(t, "public/app", index(t, img, other), "v1")
	single := up.push(t, "public/single", image(t, 44), "v1")
	n := newNode(t, up)
	var mu sync.Mutex
	var last, total int64
	progress := func(fetched, all int64) {
		mu.Lock()
		defer mu.Unlock()
		if fetched < last {
			t.Errorf("progress goes back from %d to %d", last, fetched)
		}
		last, total = fetched, all
	}
	tally, got, err := n.mirror.Warm(ctx, up.host+"/public/app:v1", "linux/amd64", progress)
	if err != nil || got != d {
		t.Fatalf("%s, %v", got, err)
	}
	if last != 3<<20+5 || total != last || tally.RegistryBytes < last || tally.CacheBytes != 0 {
		t.Errorf("progress %d of %d, tally %+v", last, total, tally)
	}
	if secret, _ := layer(t, other, 0); len(up.requests(secret.String())) > 2 { // HEAD and POST of its push
		t.Error("another platform was brought too")
	}
	last = 0
	tally, _, err = n.mirror.Warm(ctx, up.host+"/public/app@"+d.String(), "linux/amd64", progress)
	if err != nil || tally.RegistryBytes != 0 || last != 0 {
		t.Errorf("a second time: %+v, progress %d, %v", tally, last, err)
	}
	if _, got, err := n.mirror.Warm(ctx, up.host+"/public/single:v1", "", nil); err != nil || got != single {
		t.Errorf("an image without an index: %s, %v", got, err)
	}
	// Now a pull needs nobody.
	up.srv.Close()
	if err := n.pull("public/app", "v1"); err != nil {
		t.Errorf("pull afterwards: %v", err)
	}
	if tally, got, err := n.mirror.Warm(ctx, up.host+"/public/app:v1", "linux/amd64", nil); err != nil || got != d || tally.RegistryBytes > 0 {
		t.Errorf("offline: %s, %+v, %v", got, tally, err)
	}
}

// TestWarmByTagAndDigest: what a rule asks for is pulled by its tag while the registry is away, and by no tag
// that the registry did not confirm.
func TestWarmByTagAndDigest(t *testing.T) {
	ctx := context.Background()
	up := newUpstream(t)
	d := up.push(t, "public/app", index(t, image(t, 1000)), "v1", "moved")
	newer := up.push(t, "public/app", index(t, image(t, 50)), "moved")
	n := newNode(t, up)
	at := up.host + "/public/app:"
	for _, tag := range []string{"v1", "moved", "gone"} {
		if _, got, err := n.mirror.Warm(ctx, at+tag+"@"+d.String(), "linux/amd64", nil); err != nil || got != d {
			t.Fatalf("%s: %s, %v", tag, got, err)
		}
	}
	if _, err := n.store.Manifest(newer); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("what the tag moved on to was brought too: %v", err)
	}
	up.srv.Close()
	n.wait(time.Hour)
	if err := n.pull("public/app", "v1"); err != nil {
		t.Errorf("by tag, with the registry away: %v", err)
	}
	for _, tag := range []string{"moved", "gone"} {
		if r := n.get("public/app/manifests/" + tag); r.status < 400 {
			t.Errorf("%s, which does not point there: %d", tag, r.status)
		}
		if _, _, err := n.mirror.Warm(ctx, at+tag+"@"+d.String(), "linux/amd64", nil); !registry.Unreachable(err) {
			t.Errorf("%s, again: %v", tag, err)
		}
	}
	if _, _, err := n.mirror.Warm(ctx, at+"v1@"+d.String(), "linux/amd64", nil); err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestWarmFails(t *testing.T) {
	ctx := context.Background()
	up := newUpstream(t)
	img := image(t, 1000)
	d := up.push(t, "public/app", index(t, img), "v1")
	secret, _ := layer(t, img, 0)
	n := newNode(t, up)
	for name, c := range map[string]struct {
		image, platform string
		want            error
		fault           fault
		known           bool
	}{
		"malformed":          {image: "::", want: accel.ErrInvalid},
		"registry not known": {image: "evil.example/app:v1", want: accel.ErrRegistryNotAllowed},
		"no such tag":        {image: up.host + "/public/app:nothing", want: accel.ErrNotFound},
		"not ours":           {image: up.host + "/alice/app:v1", want: accel.ErrUnauthenticated},
		"malformed platform": {image: up.host + "/public/app:v1", platform: "a/b/c/d/e", want: accel.ErrInvalid},
		"another platform":   {image: up.host + "/public/app:v1", platform: "linux/s390x", want: accel.ErrNotFound, known: true},
		"layer is gone": {image: up.host + "/public/app:v1", platform: "linux/amd64", want: accel.ErrNotFound, known: true,
			fault: on(http.MethodGet, secret.String(), 0, status(404, "Docker-Distribution-Api-Version", "registry/2.0"))},
	} {
		up.set(c.fault)
		_, got, err := n.mirror.Warm(ctx, c.image, c.platform, nil)
		if !errors.Is(err, c.want) || c.known != (got == d) {
			t.Errorf("%s: %s, %v, want %v", name, got, err, c.want)
		}
		if name == "another platform" && !strings.Contains(err.Error(), "linux/amd64") {
			t.Errorf("does not say what there is: %v", err)
		}
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, _, err := n.mirror.Warm(ended, up.host+"/public/app:v1", "linux/amd64", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("ended: %v", err)
	}
}
