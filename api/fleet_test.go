package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/fleet"

	"github.com/opencontainers/go-digest"
)

// withFleet gives the handler a real fleet.
func withFleet(t *testing.T) func(*api.Options) {
	return func(o *api.Options) {
		f, err := fleet.Open(filepath.Join(t.TempDir(), "fleet.db"), fleet.Options{})
		must(t, err)
		t.Cleanup(func() { must(t, f.Close()) })
		o.Fleet = f
	}
}

func aNode(name string) accel.Node {
	return accel.Node{
		Name: name, Labels: map[string]string{"pool": "web"}, Version: "v1", StartedAt: time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC),
		Cache: accel.CacheUsage{BudgetBytes: 100, UsedBytes: 50, FreeBytes: 1000, Blobs: 3},
	}
}

func TestNodesOverHTTP(t *testing.T) {
	b := newBed(t, withFleet(t))
	n := aNode("worker-1.example")
	must(t, b.client.Heartbeat(b.ctx, n))
	got, err := b.client.Node(b.ctx, n.Name)
	must(t, err)
	if got.Silent || got.SeenAt.IsZero() || got.Labels["pool"] != "web" || got.Cache != n.Cache || !got.StartedAt.Equal(n.StartedAt) {
		t.Errorf("the node is told as %+v", got)
	}
	must(t, b.client.Heartbeat(b.ctx, aNode("a")))
	all, err := b.client.Nodes(b.ctx)
	must(t, err)
	if len(all) != 2 || all[0].Name != "a" || all[1].Name != n.Name {
		t.Errorf("nodes: %+v", all)
	}
	if _, err := b.client.Node(b.ctx, "nobody"); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("unknown node: %v", err)
	}
	if err := b.client.Heartbeat(b.ctx, accel.Node{Name: "a b"}); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("odd name: %v", err)
	}
	for name, c := range map[string]struct {
		path, body string
		status     int
	}{
		"a newer node": {"/v1/nodes/x", `{"name":"x","version":"v9","gpus":4,"cache":{"tiers":["ssd"]}}`, 200},
		"other name":   {"/v1/nodes/x", `{"name":"y"}`, 400},
		"no JSON":      {"/v1/nodes/x", `{`, 400},
		"wrong type":   {"/v1/nodes/x", `{"name":"x","version":3}`, 400},
		"huge":         {"/v1/nodes/x", `{"name":"x","version":"` + strings.Repeat("x", 300<<10) + `"}`, 413},
	} {
		status, _, body := b.do(http.MethodPut, c.path, c.body, "Content-Type", "application/json")
		if status != c.status && (c.status != 400 || status != 422) {
			t.Errorf("%s: %d %s, want %d", name, status, body, c.status)
		}
	}
}

func TestWarmOverHTTP(t *testing.T) {
	b := newBed(t, withFleet(t))
	image := host + "/app:v1"
	if _, err := b.client.Warm(b.ctx, image); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("without nodes: %v", err)
	}
	if _, err := b.client.Warm(b.ctx, "not a reference"); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("malformed: %v", err)
	}
	must(t, b.client.Heartbeat(b.ctx, aNode("n1")))
	must(t, b.client.Heartbeat(b.ctx, aNode("n2")))
	got := make(chan []accel.Warm, 1)
	go func() {
		next, err := b.client.NextWarms(b.ctx, "n1", patience)
		if err != nil {
			t.Error(err)
		}
		got <- next
	}()
	warms, err := b.client.Warm(b.ctx, image)
	must(t, err)
	if len(warms) != 2 || warms[0].State != accel.WarmPending || warms[0].Image != image {
		t.Fatalf("asked for: %+v", warms)
	}
	next := <-got
	if len(next) != 1 || next[0] != warms[0] {
		t.Fatalf("the node was given %+v", next)
	}
	w := next[0]
	for _, w.State = range []accel.WarmState{accel.WarmFetching, accel.WarmDone} {
		w.TotalBytes, w.FetchedBytes, w.Digest = 100, 40, digest.FromString("one")
		must(t, b.client.ReportWarm(b.ctx, w))
	}
	fails := warms[1]
	fails.State, fails.Reason = accel.WarmFailed, "no space"
	must(t, b.client.ReportWarm(b.ctx, fails))
	ended, err := b.client.WaitWarms(b.ctx, image, warms, patience)
	must(t, err)
	if ended[0].State != accel.WarmDone || ended[0].FetchedBytes != 40 || ended[1].State != accel.WarmFailed || ended[1].Reason != "no space" {
		t.Errorf("in the end: %+v", ended)
	}
	w.State = accel.WarmFetching
	if err := b.client.ReportWarm(b.ctx, w); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("Fetching after the end: %v", err)
	}
	w.ID = "unknown"
	if err := b.client.ReportWarm(b.ctx, w); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	// The server that a node will be upgraded for may tell more than we know.
	if status, _, body := b.do(http.MethodPut, "/v1/warms/"+warms[1].ID, `{"state":"Failed","reason":"x","peers":3}`, "Content-Type", "application/json"); status != 200 {
		t.Errorf("a newer node's report: %d %s", status, body)
	}
	if next, err := b.client.NextWarms(b.ctx, "n1", 0); err != nil || len(next) != 0 {
		t.Errorf("all is done, and there is %+v, %v", next, err)
	}
	for _, wait := range []string{"x", "-1s", "11m"} {
		if status, _, _ := b.do(http.MethodGet, "/v1/nodes/n1/warms?wait="+wait, ""); status != 400 {
			t.Errorf("wait=%s: %d", wait, status)
		}
	}
	if _, err := b.client.Warm(b.ctx, "nowhere.test/app:v1", "n1"); err != nil {
		t.Errorf("an image of a registry that only nodes know: %v", err)
	}
}

func TestWaitWarmsTimesOutAndSeesDrops(t *testing.T) {
	b := newBed(t, withFleet(t))
	must(t, b.client.Heartbeat(b.ctx, aNode("n1")))
	image := host + "/app:v1"
	warms, err := b.client.Warm(b.ctx, image)
	must(t, err)
	if got, err := b.client.WaitWarms(b.ctx, image, warms, time.Millisecond); !errors.Is(err, context.DeadlineExceeded) || got[0].State != accel.WarmPending {
		t.Errorf("nobody fetches it: %+v, %v", got, err)
	}
	warms[0].ID = "dropped"
	got, err := b.client.WaitWarms(b.ctx, image, warms, patience)
	must(t, err)
	if got[0].State != accel.WarmFailed || got[0].Reason == "" {
		t.Errorf("one that is gone: %+v", got)
	}
}

func TestWarmsAreListed(t *testing.T) {
	b := newBed(t, withFleet(t))
	must(t, b.client.Heartbeat(b.ctx, aNode("n1")))
	d := digest.FromString("one")
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: "x", Registry: host, Repository: "app", Tag: "v1", Digest: d})
	must(t, err)
	b.becomeReady()
	for _, image := range []string{host + "/app@" + d.String(), host + "/app:v1", host + "/app:v2", host + "/other:v1"} {
		_, err := b.client.Warm(b.ctx, image)
		must(t, err)
	}
	count := func(o api.WarmOptions) (n int) {
		for _, err := range b.client.Warms(b.ctx, o) {
			must(t, err)
			n++
		}
		return n
	}
	for name, c := range map[string]struct {
		o    api.WarmOptions
		want int
	}{
		"all": {api.WarmOptions{}, 4}, "by tag, and what it is": {api.WarmOptions{Image: host + "/app:v1"}, 2}, "by digest": {api.WarmOptions{Image: host + "/app@" + d.String()}, 1},
		"not known to the server": {api.WarmOptions{Image: host + "/app:v2", Node: "n1"}, 1}, "node": {api.WarmOptions{Node: "n1"}, 4}, "nobody": {api.WarmOptions{Node: "n2"}, 0},
	} {
		if n := count(c.o); n != c.want {
			t.Errorf("%s: %d, want %d", name, n, c.want)
		}
	}
	seen := 0
	for path := "/v1/warms?limit=3"; path != ""; {
		status, _, body := b.do(http.MethodGet, path, "")
		var page api.WarmList
		must(t, json.Unmarshal([]byte(body), &page))
		if status != 200 || len(page.Warms) > 3 {
			t.Fatalf("%d %s", status, body)
		}
		seen += len(page.Warms)
		path = ""
		if page.Next != "" {
			path = "/v1/warms?limit=3&cursor=" + page.Next
		}
	}
	if seen != 4 {
		t.Errorf("pages have %d warms, want 4", seen)
	}
}

func TestDrainAnswersNodes(t *testing.T) {
	b := newBed(t, withFleet(t))
	done := make(chan error, 1)
	go func() {
		next, err := b.client.NextWarms(b.ctx, "n1", 10*time.Minute)
		if len(next) > 0 {
			t.Errorf("there is %+v", next)
		}
		done <- err
	}()
	b.drain()
	must(t, <-done)
}

func TestFleetRoutesAskForScopes(t *testing.T) {
	b := newBed(t, withFleet(t), func(o *api.Options) {
		o.Open, o.Tokens = false, []api.Token{{Name: "r", Scope: api.ScopeRead, SHA256: api.HashToken("reader")}}
	})
	for _, c := range []struct {
		method, path, token string
		status              int
	}{
		{"PUT", "/v1/nodes/n1", "reader", 403}, {"PUT", "/v1/warms/x", "reader", 403}, {"POST", "/v1/warms", "reader", 403},
		{"GET", "/v1/nodes", "reader", 200}, {"GET", "/v1/warms", "reader", 200}, {"GET", "/v1/nodes/n1/warms", "reader", 200},
		{"GET", "/v1/nodes", "", 401}, {"GET", "/v1/nodes/n1/warms", "", 401}, {"GET", "/v1/nodes/n1", "wrong", 401},
	} {
		if status, _, body := b.do(c.method, c.path, "{}", "Content-Type", "application/json", "Authorization", "Bearer "+c.token); status != c.status {
			t.Errorf("%s %s by %q: %d %s, want %d", c.method, c.path, c.token, status, body, c.status)
		}
	}
}

// TestNodesSpeakForThemselves: what is told of a node is taken from a token that is bound to its name, and such
// a token does nothing else.
func TestNodesSpeakForThemselves(t *testing.T) {
	token := func(name string, scope api.Scope, nodes ...string) api.Token {
		return api.Token{Name: name, Scope: scope, Nodes: nodes, SHA256: api.HashToken(name)}
	}
	b := newBed(t, withFleet(t), withLedger(t), func(o *api.Options) {
		o.Open = false
		o.Tokens = []api.Token{token("writer", api.ScopeWrite), token("reader", api.ScopeRead), token("one", api.ScopeNode, "web-1"), token("web", api.ScopeNode, "web-*", "spare")}
	})
	as := func(name string) *api.Client {
		c, err := api.NewClient(b.url, api.WithToken(name), api.WithHTTPClient(b.http))
		must(t, err)
		return c
	}
	for who, speaksFor := range map[string]string{"one": "web-1", "web": "web-1 web-2 spare", "writer": "", "reader": ""} {
		c := as(who)
		for _, name := range []string{"web-1", "web-2", "spare", "spare-2", "batch-1"} {
			pull := measured(0, func(p *accel.Pull) { p.Node = name })
			for what, err := range map[string]error{
				"a heartbeat": c.Heartbeat(b.ctx, aNode(name)),
				"pulls":       c.ReportPulls(b.ctx, []accel.Pull{measured(0, func(p *accel.Pull) { p.Node = strings.Split(speaksFor+" ", " ")[0] }), pull}),
			} {
				if slices.Contains(strings.Fields(speaksFor), name) {
					must(t, err)
				} else if !errors.Is(err, accel.ErrForbidden) || speaksFor != "" && !strings.Contains(err.Error(), "does not speak for node \""+name) {
					t.Errorf("%s of %s by %s: %v", what, name, who, err)
				}
			}
		}
	}
	nodes, err := as("reader").Nodes(b.ctx)
	must(t, err)
	if len(nodes) != 3 {
		t.Errorf("nodes %+v", nodes)
	}
	warms, err := as("writer").Warm(b.ctx, host+"/app:v1", "web-1", "web-2")
	must(t, err)
	one := as("one")
	next, err := one.NextWarms(b.ctx, "web-1", 0)
	must(t, err)
	if len(next) != 1 || next[0].Node != "web-1" {
		t.Errorf("the node is given %+v", next)
	}
	_, err = one.Node(b.ctx, "web-1")
	must(t, err)
	_, errNext := one.NextWarms(b.ctx, "web-2", 0)
	_, errNode := one.Node(b.ctx, "web-2")
	_, errNodes := one.Nodes(b.ctx)
	_, errWarm := one.Warm(b.ctx, host+"/app:v2", "web-1")
	_, errSubmit := one.Submit(b.ctx, host+"/app:v2")
	for what, err := range map[string]error{"another's warms": errNext, "another node": errNode, "all nodes": errNodes, "a wish": errWarm, "an image": errSubmit} {
		if !errors.Is(err, accel.ErrForbidden) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, w := range warms {
		w.State = accel.WarmFetching
		if err := one.ReportWarm(b.ctx, w); (w.Node == "web-1") != (err == nil) || err != nil && !errors.Is(err, accel.ErrForbidden) {
			t.Errorf("the warm of %s: %v", w.Node, err)
		}
		w.Node = "web-1" // a lie for the other
		if err := one.ReportWarm(b.ctx, w); w.ID != warms[0].ID && !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("a warm of another, said to be its own: %v", err)
		}
		w.Node = ""
		if err := one.ReportWarm(b.ctx, w); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("a warm of nobody: %v", err)
		}
	}
	for name, bad := range map[string]api.Token{
		"without nodes": token("x", api.ScopeNode), "empty": token("x", api.ScopeNode, ""), "no pattern": token("x", api.ScopeNode, "web-["),
		"write with nodes": token("x", api.ScopeWrite, "*"), "odd scope": token("x", "admin"),
	} {
		if err := bad.Validate(); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWithoutFleetThereAreNoNodes(t *testing.T) {
	b := newBed(t)
	if status, _, _ := b.do(http.MethodGet, "/v1/nodes", ""); status != 404 {
		t.Errorf("/v1/nodes: %d", status)
	}
	withNodes := newBed(t, withFleet(t))
	_, _, spec := withNodes.do(http.MethodGet, "/openapi.json", "")
	if strings.Contains(spec, `"name":"Authorization"`) {
		t.Error("the document has the credential as a parameter too")
	}
	for _, path := range []string{"/v1/nodes", "/v1/nodes/{name}", "/v1/nodes/{name}/warms", "/v1/warms", "/v1/warms/{id}"} {
		if !strings.Contains(spec, `"`+path+`"`) {
			t.Errorf("%s is not in the document", path)
		}
	}
}
