package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/fleet"

	"github.com/opencontainers/go-digest"
)

const (
	warmHost = "r.test:5000"
	patience = 30 * time.Second
)

// serviceBed is the service as `serve` wires it, without its workers: the test says what is
// converted, and plays the nodes.
type serviceBed struct {
	*service
	t      *testing.T
	ctx    context.Context
	client *api.Client
	stop   func()
}

// newServiceBed starts the service over a data directory, and stops it at the end of the test.
func newServiceBed(t *testing.T, data string) *serviceBed {
	t.Helper()
	return newServiceBedAt(t, data, warmHost)
}

// newServiceBedAt is newServiceBed beside another registry.
func newServiceBedAt(t *testing.T, data, host string) *serviceBed {
	t.Helper()
	conf := defaultConfig()
	conf.Data = data
	conf.Registries = []registryConfig{{Host: host, PlainHTTP: true}}
	conf.Warm = []fleet.Rule{{Name: "web", Repositories: []string{"*/team/*"}, Nodes: map[string]string{"pool": "web"}}}
	must(t, conf.finish())
	s, err := openService(conf, slog.New(slog.DiscardHandler))
	must(t, err)
	must(t, s.wire(nil, nil))
	server := httptest.NewServer(s.handler)
	b := &serviceBed{service: s, t: t}
	var cancel context.CancelFunc
	b.ctx, cancel = context.WithTimeout(t.Context(), patience)
	b.client, err = api.NewClient(server.URL, api.WithHTTPClient(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}))
	must(t, err)
	stopped := false
	b.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		s.drain()
		server.Close()
		must(t, s.close())
	}
	t.Cleanup(func() { b.stop() })
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// startFollowing runs the following of readiness events until the returned function is called.
func (b *serviceBed) startFollowing() (stop func()) {
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan error, 1)
	go func() { done <- b.followReady(ctx) }()
	return func() {
		cancel()
		must(b.t, <-done)
	}
}

func (b *serviceBed) heartbeat(name string) {
	b.t.Helper()
	must(b.t, b.client.Heartbeat(b.ctx, accel.Node{Name: name, Labels: map[string]string{"pool": "web"}, StartedAt: time.Unix(1, 0)}))
}

// becomes pushes an image and works it off as a worker would.
func (b *serviceBed) becomes(what string) string {
	b.t.Helper()
	d := digest.FromString(what)
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: warmHost, Repository: "team/app", Tag: what, Digest: d})
	must(b.t, err)
	w, err := b.tracker.Claim(b.ctx)
	must(b.t, err)
	must(b.t, b.tracker.Finish(b.ctx, w, accel.Target{Repository: w.Repository, Digest: digest.FromString(what + " converted")}, accel.Result{}, nil))
	return warmHost + "/team/app:" + what + "@" + d.String()
}

// expect waits until the node is given exactly the image, which it fetches then.
func (b *serviceBed) expect(node, image string) {
	b.t.Helper()
	next, err := b.client.NextWarms(b.ctx, node, patience)
	must(b.t, err)
	if len(next) != 1 || next[0].Image != image || next[0].Rule != "web" {
		b.t.Fatalf("node %s is given %+v, want %s", node, next, image)
	}
	next[0].State = accel.WarmDone
	must(b.t, b.client.ReportWarm(b.ctx, next[0]))
}

func TestReadyImagesAreFollowed(t *testing.T) {
	data := t.TempDir()
	b := newServiceBed(t, data)
	b.heartbeat("n1")
	stop := b.startFollowing()
	b.expect("n1", b.becomes("one"))
	b.expect("n1", b.becomes("two"))
	stop()
	missed := b.becomes("three") // nobody follows; as after a crash between the two files
	b.stop()

	b = newServiceBed(t, data)
	b.heartbeat("n1")
	stop = b.startFollowing()
	b.expect("n1", missed)
	stop()
	b.stop()

	// The records are lost, so that their events begin anew.
	must(t, os.Remove(filepath.Join(data, "readiness.db")))
	b = newServiceBed(t, data)
	b.heartbeat("n1")
	stop = b.startFollowing()
	b.expect("n1", b.becomes("four"))
	stop()
}

func TestLostEventsAreMadeUpFor(t *testing.T) {
	b := newServiceBed(t, t.TempDir())
	b.heartbeat("n1")
	image := b.becomes("one")
	for batch := range 11 { // more than are kept
		evs := make([]accel.PushEvent, 1000)
		for i := range evs {
			evs[i] = accel.PushEvent{Source: "x", Registry: warmHost, Repository: "team/other", Tag: fmt.Sprint(batch, "-", i), Digest: digest.FromString(fmt.Sprint(batch, "-", i))}
		}
		_, err := b.tracker.Push(b.ctx, evs...)
		must(t, err)
	}
	defer b.startFollowing()()
	b.expect("n1", image)
}

// play takes a node's part: it fetches what the server wants, and fails where the
// image's name says so.
func (b *serviceBed) play(name string) {
	b.t.Helper()
	b.heartbeat(name)
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			next, err := b.client.NextWarms(ctx, name, patience)
			if err != nil {
				continue
			}
			for _, w := range next {
				w.State, w.TotalBytes, w.FetchedBytes = accel.WarmDone, 2e6, 1e6
				if strings.Contains(w.Image, "broken") && name == "n2" {
					w.State, w.Reason = accel.WarmFailed, "the registry says no"
				}
				if err := b.client.ReportWarm(ctx, w); err != nil && !errors.Is(err, context.Canceled) {
					b.t.Error(err)
				}
			}
		}
	}()
	b.t.Cleanup(func() { cancel(); <-done })
}

func TestWarmCommand(t *testing.T) {
	b := newServiceBed(t, t.TempDir())
	accelAt := func(args ...string) (int, string, string) {
		return accelRun(t, append(args, "--server", b.client.Server())...)
	}
	image := warmHost + "/team/app:v1"
	if code, _, said := accelAt("warm", image); code != exitFailed || !strings.Contains(said, "no node") {
		t.Errorf("without nodes: exit %d, %s", code, said)
	}
	b.play("n1")
	b.play("n2")
	if code, out, said := accelAt("warm", image, "--wait"); code != exitOK || strings.Count(out, "Warm") != 2 || !strings.Contains(out, "2.0 MB") {
		t.Errorf("warm: exit %d, %s%s", code, out, said)
	}
	code, out, said := accelAt("warm", warmHost+"/team/broken:v1", "--wait")
	if code != exitFailed || !strings.Contains(out, "the registry says no") || !strings.Contains(said, "1 of 2 nodes") {
		t.Errorf("a node that fails: exit %d, %s%s", code, out, said)
	}
	if code, out, said := accelAt("warm", "status", warmHost+"/team/broken:v1"); code != exitFailed || strings.Count(out, "n2") != 1 {
		t.Errorf("status of what failed: exit %d, %s%s", code, out, said)
	}
	code, out, said = accelAt("warm", "status", "--node", "n1", "-o", "json")
	var warms []accel.Warm
	if code != exitOK || json.Unmarshal([]byte(out), &warms) != nil || len(warms) != 2 {
		t.Errorf("status of a node: exit %d, %s%s", code, out, said)
	}
	if code, out, said := accelAt("warm", warmHost+"/team/broken:v1", "--node", "n1", "--wait"); code != exitOK || strings.Contains(out, "n2") {
		t.Errorf("one node: exit %d, %s%s", code, out, said)
	}
	b.heartbeat("n3") // lives and does nothing
	if code, out, said := accelAt("warm", image, "--wait", "--timeout", "20ms"); code != exitTimeout || !strings.Contains(out, "Pending") {
		t.Errorf("a node that takes its time: exit %d, %s%s", code, out, said)
	}
	for _, args := range [][]string{{"warm"}, {"warm", "a b"}, {"warm", "status", "x", "y"}, {"warm", "status", "a b"}, {"nodes", "x"}, {"warm", image, "--timeout", "soon"}} {
		if code, _, said := accelAt(args...); code != exitUsage || said == "" {
			t.Errorf("accel %v: exit %d, %q", args, code, said)
		}
	}
	if code, out, said := accelAt("nodes"); code != exitOK || strings.Count(out, "live") != 3 || !strings.Contains(out, "pool=web") {
		t.Errorf("nodes: exit %d, %s%s", code, out, said)
	}
	code, out, said = accelAt("nodes", "-o", "json")
	var nodes []api.NodeStatus
	if code != exitOK || json.Unmarshal([]byte(out), &nodes) != nil || len(nodes) != 3 || nodes[0].Name != "n1" {
		t.Errorf("nodes as JSON: exit %d, %s%s", code, out, said)
	}
}

func TestWarmConfiguration(t *testing.T) {
	for name, c := range map[string]struct{ text, says string }{
		"good":        {"warm: [{name: web, repositories: ['r.test/**'], nodes: {pool: web}, forms: [source, target]}]\n", ""},
		"no name":     {"warm: [{repositories: ['r.test/**']}]\n", "warm[0]"},
		"no images":   {"warm: [{name: web}]\n", "repositories"},
		"bad form":    {"warm: [{name: web, repositories: ['r.test/**'], forms: [both]}]\n", "source or target"},
		"unknown key": {"warm: [{name: web, repos: ['r.test/**']}]\n", "unknown key repos"},
		"too short":   {"fleet: {keep_finished: 1h}\n", "fleet.catch_up"},
		"no time":     {"fleet: {silent_after: 0s}\n", "fleet.silent_after"},
		"no nodes":    {"fleet: {max_nodes: 0}\n", "fleet.max_nodes"},
	} {
		code, out, said := accelRun(t, "serve", "--check-config", "--config", configFile(t, "registries: [{host: r.test}]\n"+c.text))
		if c.says == "" && code != exitOK {
			t.Errorf("%s: exit %d, %s%s", name, code, out, said)
		}
		if c.says != "" && (code != exitUsage || !strings.Contains(said, c.says)) {
			t.Errorf("%s: exit %d, says %q, want 2 and %q", name, code, said, c.says)
		}
	}
}
