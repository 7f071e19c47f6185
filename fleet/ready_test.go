package fleet_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/fleet"
)

func TestRulesChooseNodes(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: []fleet.Rule{
		{Name: "team", Repositories: []string{"other.test/**", "registry.test/team/*"}, Nodes: map[string]string{"pool": "web"}},
		{Name: "both", Repositories: []string{"*/**"}, Nodes: map[string]string{"pool": "web", "zone": "a"}, Forms: []fleet.Form{fleet.FormSource, fleet.FormTarget}},
		{Name: "target", Repositories: []string{"registry.test/**"}, Nodes: map[string]string{"pool": "batch"}, Forms: []fleet.Form{fleet.FormTarget}},
		{Name: "elsewhere", Repositories: []string{"registry.test/other/*"}},
	}})
	b.seen(node("web", "pool=web"), node("web-a", "pool=web", "zone=a", "more=x"), node("batch", "pool=batch"), node("bare"))
	for range 2 {
		b.ready("a", "v1")
		b.expect("web", "a")
		b.expect("web-a", "a a'")
		b.expect("batch", "a'")
		b.expect("bare", "")
	}
	page, err := b.Warms(t.Context(), fleet.Filter{Node: "web-a"})
	must(t, err)
	rules := map[string]string{}
	for _, w := range page.Warms {
		rules[said([]accel.Warm{w}, "a")] = w.Rule
	}
	if rules["a"] != "team" || rules["a'"] != "both" {
		t.Errorf("rules: %v", rules)
	}
}

func TestReadyIsJudged(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything()})
	b.seen(node("n1"))
	rec := b.record("a", "v1")
	rec.State = accel.Failed
	if err := b.Ready(t.Context(), rec); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a Failed record: %v", err)
	}
	old := b.record("a", "v1")
	old.UpdatedAt = b.clock.Now().Add(-25 * time.Hour)
	must(t, b.Ready(t.Context(), old))
	b.expect("n1", "")
	none := b.record("b")
	none.Target = accel.Target{}
	must(t, b.Ready(t.Context(), none))
	b.expect("n1", "b")
}

func TestFinishedStaysFinishedForRules(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything()})
	b.seen(node("n1"), node("n2"))
	b.ready("a", "v1")
	for _, w := range []struct {
		node string
		end  accel.WarmState
	}{{"n1", accel.WarmDone}, {"n2", accel.WarmFailed}} {
		warms, err := b.Next(t.Context(), w.node, 0)
		must(t, err)
		b.report(warms[0], w.end)
	}
	b.restart()
	b.seen(node("n1"), node("n2")) // caught up with: both stay
	b.expect("n1", "")
	b.expect("n2", "")
	b.ready("a", "v1") // its target was gone, and is there again: worth another try
	b.expect("n1", "")
	b.expect("n2", "a")
}

func TestCatchUp(t *testing.T) {
	rule := fleet.Rule{Name: "web", Repositories: []string{"registry.test/**"}, Nodes: map[string]string{"pool": "web"}}
	b := newBed(t, fleet.Options{Rules: []fleet.Rule{rule}, SilentAfter: time.Minute})
	b.ready("a", "v1")
	b.clock.pass(23 * time.Hour)
	b.ready("b", "v2")
	b.ready("c", "v3")
	b.ready("d", "v3") // the tag moved on: c is no longer wanted
	b.seen(node("n1", "pool=web"), node("n2"))
	b.expect("n1", "a b d")
	b.expect("n2", "")
	b.clock.pass(2 * time.Hour) // a is too old by now
	b.seen(node("n2", "pool=web"))
	b.expect("n2", "b d")

	b.clock.pass(10 * time.Minute) // n1 and n2 are silent, and are brought nothing
	b.ready("c", "v4")
	b.expect("n1", "a b d")
	b.expect("n2", "b d")
	b.seen(node("n2", "pool=web"))
	b.expect("n2", "b c d")
	for _, n := range b.Nodes() {
		if n.Silent != (n.Name == "n1") {
			t.Errorf("node %s: silent %t", n.Name, n.Silent)
		}
	}

	b.o.Rules = []fleet.Rule{{Name: "all", Repositories: []string{"registry.test/**"}}}
	b.seen(node("n3"))
	b.expect("n3", "")
	b.restart() // with other rules
	b.seen(node("n3"))
	b.expect("n3", "b c d")
	if n, err := b.Node("n1"); err != nil || n.Silent {
		t.Errorf("time in which the server was not running counts: %+v, %v", n, err)
	}
}

func TestTagsThatMove(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything(fleet.FormSource, fleet.FormTarget)})
	b.seen(node("n1"), node("n2"), node("n3"))
	b.ready("a", "v1", "latest")
	b.ready("b", "v2", "latest")
	b.expect("n1", "a a' b b'") // v1 still is a
	warms, err := b.Next(t.Context(), "n2", 0)
	must(t, err)
	for _, w := range warms {
		b.report(w, accel.WarmFetching)
	}
	b.want(repository+"@"+source("c").String(), "n3")
	b.ready("c", "v1")
	b.expect("n1", "b b' c c'")
	b.expect("n2", "c c'")
	if got := b.states(fleet.Filter{Node: "n2", Images: []accel.Reference{ref(t, repository+"@"+source("a").String())}}); got != "n2 Fetching" {
		t.Errorf("what is being fetched is %q", got)
	}
	b.ready("d", "v1")
	b.expect("n3", "b b' c d d'") // a person wants c there
}

// TestTagsGoWithDigests: nodes are told by which tags an image will be asked for, in both forms and in catch-ups.
func TestTagsGoWithDigests(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything(fleet.FormSource, fleet.FormTarget)})
	told := func(node, want string) {
		t.Helper()
		if got := b.waiting(node); got != want {
			t.Errorf("%s is to fetch %q, want %q", node, got, want)
		}
	}
	at := func(tag string) string { return ":" + tag + "@" + source("a").String() }
	converted := "-esgz:v1-esgz@" + target("a").String()
	rec := b.record("a", "v1")
	rec.Target.Tags = []string{"v1-esgz"}
	b.seen(node("n1"))
	must(t, b.Ready(t.Context(), rec))
	told("n1", converted+" "+at("v1"))
	rec.Tags = []string{"latest", "v1"} // another tag points there too
	must(t, b.Ready(t.Context(), rec))
	told("n1", converted+" "+at("latest")+" "+at("v1"))
	b.seen(node("n2"))
	told("n2", converted+" "+at("latest")+" "+at("v1"))
	b.ready("b", "latest")
	for _, n := range []string{"n1", "n2"} {
		if got := b.waiting(n, "b"); got != converted+" "+at("v1")+" b b'" {
			t.Errorf("when a tag moved on, %s is to fetch %q", n, got)
		}
	}
	b.seen(node("n3"))
	b.expect("n3", "a a' b b'")
	page, err := b.Warms(t.Context(), fleet.Filter{Node: "n3", Images: []accel.Reference{ref(t, repository+"@"+source("a").String())}})
	must(t, err)
	if len(page.Warms) != 1 || page.Warms[0].Image != repository+at("v1") {
		t.Errorf("by digest: %+v", page.Warms)
	}
	var tags []string
	for i := range 100 {
		tags = append(tags, fmt.Sprint("v", i))
	}
	b.ready("c", tags...)
	warms, err := b.Next(t.Context(), "n3", 0)
	must(t, err)
	if len(warms) > 25 {
		t.Errorf("an image with 100 tags is %d warms", len(warms))
	}
}

func TestReadyMeetsNewNodes(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything()})
	const nodes, images = 20, 20
	var wg sync.WaitGroup
	for i := range nodes {
		wg.Go(func() {
			if _, err := b.Seen(t.Context(), node(fmt.Sprint("n", i))); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range images {
		wg.Go(func() {
			if err := b.Ready(t.Context(), b.record(fmt.Sprint("image", i), fmt.Sprint("v", i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range nodes {
		warms, err := b.Next(t.Context(), fmt.Sprint("n", i), 0)
		must(t, err)
		if len(warms) != images {
			t.Errorf("node %d is to fetch %d of %d images", i, len(warms), images)
		}
	}
}

func TestCheckRules(t *testing.T) {
	good := fleet.Rule{Name: "a", Repositories: []string{"r.test/**"}}
	for name, rules := range map[string][]fleet.Rule{
		"no name":         {{Repositories: good.Repositories}},
		"odd name":        {{Name: "a b", Repositories: good.Repositories}},
		"twice":           {good, good},
		"no repositories": {{Name: "a"}},
		"empty glob":      {{Name: "a", Repositories: []string{""}}},
		"bad glob":        {{Name: "a", Repositories: []string{"r.test/[x"}}},
		"bad form":        {{Name: "a", Repositories: good.Repositories, Forms: []fleet.Form{"both"}}},
	} {
		if err := fleet.CheckRules(rules); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := fleet.Open(t.TempDir()+"/f.db", fleet.Options{Rules: rules}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s, opened: %v", name, err)
		}
	}
	must(t, fleet.CheckRules([]fleet.Rule{good}))
}

func TestPosition(t *testing.T) {
	b := newBed(t, fleet.Options{})
	for _, want := range []uint64{0, 7, 1 << 40} {
		if want > 0 {
			must(t, b.SetPosition(t.Context(), want))
		}
		b.restart()
		if got, err := b.Position(t.Context()); err != nil || got != want {
			t.Errorf("position %d, %v; want %d", got, err, want)
		}
	}
}
