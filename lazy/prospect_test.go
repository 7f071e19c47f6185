package lazy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"accel"
	"accel/registry"

	lru "github.com/hashicorp/golang-lru/v2"
)

// TestExpectedImages are asked about once, before containerd asks, and boundedly; what failed is asked again.
func TestExpectedImages(t *testing.T) {
	var listings atomic.Int64
	var broken atomic.Bool
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/referrers/") {
			listings.Add(1)
		}
		if broken.Load() {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
		w.WriteHeader(http.StatusNotFound)
	}))
	defer upstream.Close()
	host := strings.TrimPrefix(upstream.URL, "http://")
	client, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: host, PlainHTTP: true}}, Attempts: 1})
	must(t, err)
	defer client.Close()
	l := recorder(t, "")
	l.o.Registry, l.o.Except, l.expected = client, []string{host + "/never"}, map[imageKey]*prospect{}
	l.answers, err = lru.New[imageKey, *answer](maxAnswers)
	must(t, err)

	manifest := named("manifest")
	l.Expect(host+"/app", manifest) // before Run
	if len(l.expected) > 0 {
		t.Fatal("an image is expected before the node runs")
	}
	ctx, cancel := context.WithCancel(t.Context())
	l.running = ctx
	defer func() {
		cancel()
		l.work.Wait()
		if len(l.expected) > 0 {
			t.Errorf("%d images are expected by a node that has ended", len(l.expected))
		}
	}()
	source, err := client.Source(host+"/app", "")
	must(t, err)
	key := imageKey{host + "/app", manifest}
	take := func() *prospect {
		t.Helper()
		p := l.prospect(ctx, source, key)
		t.Cleanup(p.cancel)
		if _, err := p.mapping(t.Context()); err == nil {
			t.Error("there is a mapping")
		}
		<-p.profile
		return p
	}
	l.Expect(host+"/app", manifest)
	l.Expect(host+"/app", manifest)
	l.Expect(host+"/never", manifest)
	l.Expect("elsewhere.test/app", manifest)
	if p := take(); !errors.Is(p.err, accel.ErrNotFound) || listings.Load() != 1 {
		t.Errorf("%v after %d listings, want one", p.err, listings.Load())
	}
	if take(); listings.Load() != 2 {
		t.Errorf("an answer was given twice")
	}

	broken.Store(true)
	l.Expect(host+"/app", manifest)
	<-l.expected[key].mapped
	broken.Store(false)
	if p := take(); !errors.Is(p.err, accel.ErrNotFound) {
		t.Errorf("an old failure is believed: %v", p.err)
	}

	for i := range 2 * maxExpected {
		l.Expect(host+"/app", named(fmt.Sprint(i)))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.expected) != maxExpected {
		t.Errorf("%d images are expected", len(l.expected))
	}
}
