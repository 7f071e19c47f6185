package fleet_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/fleet"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestRestartKeepsEverything(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything()})
	b.seen(node("n1", "pool=web"), node("n2"))
	b.ready("a", "v1")
	w := b.want(repository+":v2", "n2")[0]
	before, err := b.Warms(t.Context(), fleet.Filter{})
	must(t, err)
	nodes := b.Nodes()
	b.restart()
	after, err := b.Warms(t.Context(), fleet.Filter{})
	must(t, err)
	if fmt.Sprint(before) != fmt.Sprint(after) || fmt.Sprint(nodes) != fmt.Sprint(b.Nodes()) {
		t.Errorf("before: %v %v\nafter:  %v %v", before, nodes, after, b.Nodes())
	}
	b.report(w, accel.WarmDone) // the node goes on where it was
	b.seen(node("n3"))          // and a new one is caught up with
	b.expect("n3", "a")
}

func TestDaemonThatStartsAnew(t *testing.T) {
	b := newBed(t, fleet.Options{})
	n := node("n1")
	b.seen(n)
	b.report(b.want(repository+"@"+source("a").String(), "n1")[0], accel.WarmFetching)
	b.seen(n)
	b.restart()
	b.seen(n) // the same daemon, which is still at it
	b.expect("n1", "")
	n.StartedAt = n.StartedAt.Add(time.Hour)
	b.seen(n)
	b.expect("n1", "a")
	b.seen(n)
	b.expect("n1", "a")
}

func TestStalledIsGivenAgain(t *testing.T) {
	b := newBed(t, fleet.Options{StallAfter: time.Minute})
	b.seen(node("n1"))
	w := b.report(b.want(repository+"@"+source("a").String(), "n1")[0], accel.WarmFetching)
	b.clock.pass(50 * time.Second)
	b.report(w, accel.WarmFetching)
	b.clock.pass(50 * time.Second)
	must(t, b.Prune(t.Context()))
	b.expect("n1", "")
	b.clock.pass(50 * time.Second)
	must(t, b.Prune(t.Context()))
	b.expect("n1", "a")
	b.report(w, accel.WarmDone) // it was only slow
	b.expect("n1", "")
}

func TestFinishedIsForgotten(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything(), KeepFinished: 48 * time.Hour, SilentAfter: 1000 * time.Hour})
	b.seen(node("n1"))
	b.report(b.want(repository+":v1", "n1")[0], accel.WarmDone)
	b.want(repository+":v2", "n1")
	b.ready("a", "v3")
	b.clock.pass(47 * time.Hour)
	must(t, b.Prune(t.Context()))
	if got := b.states(fleet.Filter{}); strings.Count(got, "n1") != 3 {
		t.Errorf("too early: %s", got)
	}
	b.clock.pass(2 * time.Hour)
	must(t, b.Prune(t.Context()))
	if got := b.states(fleet.Filter{}); got != "n1 Pending, n1 Pending" {
		t.Errorf("left: %s", got)
	}
	if n, err := b.Size(); err != nil || n != 0 {
		t.Errorf("%d images for catch-ups are left: %v", n, err)
	}
}

func TestSilentNodesAreForgotten(t *testing.T) {
	b := newBed(t, fleet.Options{SilentAfter: time.Minute, ForgetAfter: time.Hour})
	b.seen(node("n1"), node("n2"))
	b.want(repository + ":v1")
	b.clock.pass(59 * time.Minute)
	b.seen(node("n2"))
	b.clock.pass(2 * time.Minute)
	if _, err := b.Want(t.Context(), ref(t, repository), nil); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("all are silent: %v", err)
	}
	must(t, b.Prune(t.Context()))
	if got := b.states(fleet.Filter{}); got != "n2 Pending" || len(b.Nodes()) != 1 {
		t.Errorf("left: %s of %v", got, b.Nodes())
	}
	if _, err := b.Node("n1"); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a forgotten node: %v", err)
	}
	b.clock.pass(30 * 24 * time.Hour) // the server was off
	b.restart()
	must(t, b.Prune(t.Context())) // nobody had the time to say something
	if len(b.Nodes()) != 1 || b.Nodes()[0].Silent {
		t.Errorf("after a long pause of the server: %+v", b.Nodes())
	}
	b.clock.pass(2 * time.Minute)
	must(t, b.Prune(t.Context()))
	if len(b.Nodes()) != 0 {
		t.Errorf("left: %+v", b.Nodes())
	}
}

func TestBounds(t *testing.T) {
	reg := prometheus.NewRegistry()
	b := newBed(t, fleet.Options{Rules: everything(), MaxNodes: 2, MaxPending: 3, MaxWarms: 5, SilentAfter: time.Minute, Registerer: reg})
	b.seen(node("n1"), node("n2"))
	if _, err := b.Seen(t.Context(), node("n3")); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("one node too many: %v", err)
	}
	for i := range 4 {
		b.want(fmt.Sprint(repository, ":v", i), "n1")
		b.clock.pass(time.Second)
	}
	b.expect("n1", ":v1 :v2 :v3") // the oldest gave way
	if got := b.states(fleet.Filter{Images: []accel.Reference{ref(t, repository+":v0")}}); got != "n1 Failed" {
		t.Errorf("what gave way is %q", got)
	}
	b.want(repository+":v1", "n2")
	b.want(repository+":v2", "n2") // takes the place of what is finished
	if _, err := b.Want(t.Context(), ref(t, repository+":v3"), []string{"n2"}); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("one wish too many: %v", err)
	}
	b.ready("a", "v9") // a rule's is only counted
	b.expect("n2", ":v1 :v2")
	must(t, testutil.GatherAndCompare(reg, strings.NewReader(`# HELP accel_warms_dropped_total Wishes that a bound refused, by which (node: the oldest of a node gave way; fleet: a rule's was not kept).
# TYPE accel_warms_dropped_total counter
accel_warms_dropped_total{bound="fleet"} 2
accel_warms_dropped_total{bound="node"} 1
# HELP accel_nodes Nodes by state (live, silent).
# TYPE accel_nodes gauge
accel_nodes{state="live"} 2
accel_nodes{state="silent"} 0
# HELP accel_warms Images that nodes are to have, by state.
# TYPE accel_warms gauge
accel_warms{state="Failed"} 0
accel_warms{state="Fetching"} 0
accel_warms{state="Pending"} 5
accel_warms{state="Warm"} 0
`), "accel_warms_dropped_total", "accel_nodes", "accel_warms"))
	b.clock.pass(2 * time.Minute)
	b.seen(node("n1"), node("n3")) // n2 is the longest silent one
	if nodes := b.Nodes(); len(nodes) != 2 || nodes[0].Name != "n1" || nodes[1].Name != "n3" {
		t.Errorf("nodes: %+v", nodes)
	}
	b.expect("n2", "")
}

func TestNodesAreJudged(t *testing.T) {
	b := newBed(t, fleet.Options{})
	many := map[string]string{}
	for i := range 200 {
		many[fmt.Sprint(i)] = ""
	}
	for name, change := range map[string]func(*accel.Node){
		"no name":       func(n *accel.Node) { n.Name = "" },
		"path":          func(n *accel.Node) { n.Name = "../x" },
		"long name":     func(n *accel.Node) { n.Name = strings.Repeat("x", 300) },
		"many labels":   func(n *accel.Node) { n.Labels = many },
		"long label":    func(n *accel.Node) { n.Labels = map[string]string{"a": strings.Repeat("x", 600)} },
		"empty label":   func(n *accel.Node) { n.Labels = map[string]string{"": "x"} },
		"no UTF-8":      func(n *accel.Node) { n.Labels = map[string]string{"a": "\xff"} },
		"negative":      func(n *accel.Node) { n.Cache.UsedBytes = -1 },
		"long version":  func(n *accel.Node) { n.Version = strings.Repeat("x", 300) },
		"dropped pulls": func(n *accel.Node) { n.DroppedPulls = -1 },
	} {
		n := node("n1")
		change(&n)
		if _, err := b.Seen(t.Context(), n); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	lying := node("n1")
	lying.SeenAt = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	n, err := b.Seen(t.Context(), lying)
	must(t, err)
	if !n.SeenAt.Equal(b.clock.Now()) {
		t.Errorf("seen at %s", n.SeenAt)
	}
}

func TestDamageIsSetAside(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"empty":     func([]byte) []byte { return nil },
		"truncated": func(b []byte) []byte { return b[:len(b)/2] },
		"noise": func(b []byte) []byte {
			for i := range b {
				b[i] = byte(rand.Uint32())
			}
			return b
		},
		"noise after the head": func(b []byte) []byte {
			for i := 3 * 4096; i < len(b); i++ {
				b[i] = byte(rand.Uint32())
			}
			return b
		},
		"a row that was changed": func(b []byte) []byte {
			return []byte(strings.ReplaceAll(string(b), `"state":"Pending"`, `"state":"Fetched"`))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, fleet.Options{Rules: everything()})
			b.seen(node("n1"))
			b.ready("a", "v1")
			must(t, b.Close())
			raw, err := os.ReadFile(b.path)
			must(t, err)
			must(t, os.WriteFile(b.path, damage(raw), 0o600))
			b.open()
			if len(b.Nodes()) != 0 {
				t.Errorf("nodes of a damaged file: %+v", b.Nodes())
			}
			b.seen(node("n1"))
			b.ready("a", "v1")
			b.expect("n1", "a")
			if _, err := os.Stat(b.path + ".damaged"); (err != nil) != (name == "empty") {
				t.Errorf("the damaged file: %v", err)
			}
		})
	}
}

func TestLocked(t *testing.T) {
	b := newBed(t, fleet.Options{})
	if _, err := fleet.Open(b.path, b.o); !errors.Is(err, fleet.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
}
