package ledger_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/profile"
	"accel/profile/ledger"

	"github.com/prometheus/client_golang/prometheus"
)

func TestWhichProfileStands(t *testing.T) {
	b := newBed(t, ledger.Options{})
	ctx := t.Context()
	if _, _, err := b.Profile(ctx, manifest("a")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("the profile of an unknown image is %v", err)
	}
	b.learn("a", ledger.Given{})
	if _, _, err := b.Profile(ctx, manifest("a")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("the profile of an image about which nothing is known is %v", err)
	}
	b.learn("a", ledger.Given{Listed: items(t, "0:model:0:100")})
	b.expect("a", accel.ProfileListed, "0:model:0:100")
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:10")})
	b.expect("a", accel.ProfilePredicted, "0:bin/a:0:10", "0:model:0:100")
	b.learn("a", ledger.Given{Inherited: items(t, "1:bin/b:0:10")})
	b.expect("a", accel.ProfileInherited, "1:bin/b:0:10", "0:model:0:100")
	must(t, b.Import(ctx, manifest("a"), accel.Profile{Items: items(t, "2:bin/c:0:10", "3:not/there:0:10")}))
	b.expect("a", accel.ProfileImported, "2:bin/c:0:10", "0:model:0:100")

	partial := report("a", 1, "n1", items(t, "0:bin/d:0:10"))
	partial.Complete = false
	b.report(partial) // adds, and says nothing about the rest
	b.expect("a", accel.ProfileRecorded, "0:bin/d:0:10", "2:bin/c:0:10", "0:model:0:100")
	b.report(report("a", 2, "n2", items(t, "0:bin/e:0:10")))
	b.restart()
	b.expect("a", accel.ProfileRecorded, "0:bin/d:0:10", "0:bin/e:0:10", "0:model:0:100")

	must(t, b.Import(ctx, manifest("a"), accel.Profile{Items: items(t, "2:bin/c:0:10")}))
	b.expect("a", accel.ProfileImported, "2:bin/c:0:10", "0:model:0:100")
	must(t, b.Remove(ctx, manifest("a")))
	if _, _, err := b.Profile(ctx, manifest("a")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a removed profile is %v", err)
	}
	if known, err := b.Knows(ctx, manifest("a"), imageOf("a")); err != nil || !known {
		t.Errorf("an image whose profile was removed is predicted again: %v, %v", known, err)
	}
	b.report(report("a", 3, "n2", items(t, "0:bin/f:0:10")))
	b.expect("a", accel.ProfileRecorded, "0:bin/f:0:10")
}

// startOf is what a program reads when it starts: most of it always, some by chance.
func startOf(r *rand.Rand) (list []accel.ProfileItem) {
	for f := range 100 {
		if f%10 == 0 && r.IntN(2) == 0 {
			continue
		}
		list = append(list, accel.ProfileItem{Layer: f % layers, Path: fmt.Sprintf("lib/f%d.so", f), Bytes: 4096 * (1 + int64(f%7))})
	}
	for n := range list {
		if m := n + r.IntN(3); m < len(list) {
			list[n], list[m] = list[m], list[n]
		}
	}
	return list
}

// A hundred nodes report, some more than once, in any order and at once: what is served and
// published in the end is the same.
func TestAnyOrderGivesTheSameProfile(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var reports []profile.Report
	for n := range 100 {
		reports = append(reports, report("a", n, fmt.Sprint("node-", n%40), startOf(r)))
		reports[n].Complete = n%5 > 0
	}
	reports = append(reports, reports[7], reports[50], reports[51])
	var want accel.Profile
	for round := range 4 {
		b := newBed(t, ledger.Options{})
		b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:10")})
		r.Shuffle(len(reports), func(i, j int) { reports[i], reports[j] = reports[j], reports[i] })
		var g sync.WaitGroup
		for at := range slices.Chunk(reports, 13) {
			g.Go(func() {
				for _, one := range at {
					if _, err := b.Report(t.Context(), one); err != nil {
						t.Error(err)
					}
				}
			})
		}
		g.Wait()
		got := b.served("a")
		if round == 0 {
			want = got
		}
		if profile.Version(got) != profile.Version(want) || len(got.Items) < 90 || got.Origin != accel.ProfileRecorded {
			t.Errorf("round %d: %d items of %s, version %s, want %s", round, len(got.Items), got.Origin, profile.Version(got), profile.Version(want))
		}
		b.publish()
		b.clock.pass(2 * time.Hour) // small changes have settled
		b.publish()
		b.expectNoneDue()
		st, err := b.Status(t.Context(), manifest("a"))
		must(t, err)
		if st.Starts != 100 {
			t.Errorf("%d starts counted, want 100", st.Starts)
		}
		if st.Coverage == nil || st.Coverage.Share < .9 {
			t.Errorf("coverage %+v", st.Coverage)
		}
	}
}

func TestHostileReports(t *testing.T) {
	b := newBed(t, ledger.Options{Registerer: prometheus.NewRegistry()})
	ctx := t.Context()
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:10")})
	good := report("a", 1, "n", items(t, "0:bin/a:0:10"))
	for what, change := range map[string]func(*profile.Report){
		"an unknown image": func(r *profile.Report) { r.Manifest = manifest("b") },
		"no id":            func(r *profile.Report) { r.ID = "" },
		"no digest":        func(r *profile.Report) { r.Manifest = "sha256:../../etc" },
		"a path upwards":   func(r *profile.Report) { r.Items = items(t, "0:../etc/passwd:0:1") },
		"too many items": func(r *profile.Report) {
			r.Items = nil
			for n := range profile.MaxItems + 1 {
				r.Items = append(r.Items, accel.ProfileItem{Path: "f", Offset: int64(n) * 2, Bytes: 1})
			}
		},
		"a start of a year": func(r *profile.Report) { r.End, r.Took = profile.EndAnswered, 365*24*time.Hour },
	} {
		r := good
		change(&r)
		if _, err := b.Report(ctx, r); !errors.Is(err, accel.ErrNotFound) && !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	b.expect("a", accel.ProfilePredicted, "0:bin/a:0:10")

	b.report(report("a", 500, "n", nil)) // a start that read nothing is no start
	b.expect("a", accel.ProfilePredicted, "0:bin/a:0:10")

	// One node that says what it likes has a bounded share, and what it names is bounded.
	for n := range 200 {
		b.report(report("a", n, "hostile", items(t, fmt.Sprintf("1:huge%d:0:%d", n%3, int64(1)<<40), "400:no/such/layer:0:10")))
	}
	for n := range 6 {
		b.report(report("a", n, fmt.Sprint("honest", n), items(t, "0:bin/a:0:10")))
	}
	b.expect("a", accel.ProfileRecorded, "0:bin/a:0:10")
	u, err := b.Usage(ctx)
	must(t, err)
	if u.Images != 1 || u.Bytes > 64<<10 {
		t.Errorf("reports of one node take %+v", u)
	}
	if p := b.served("a"); p.Bytes() > profile.MaxHotBytes {
		t.Errorf("a profile of %d bytes", p.Bytes())
	}
}

// The program is started with other arguments from some day on: the profile follows.
func TestNewUseIsRecordedAnew(t *testing.T) {
	b := newBed(t, ledger.Options{})
	b.learn("a", ledger.Given{})
	old, now := items(t, "0:bin/a:0:10", "0:lib/old:0:100"), items(t, "0:bin/a:0:10", "0:lib/new:0:300")
	for n := range 40 {
		b.report(report("a", n, fmt.Sprint("node", n%20), old))
	}
	b.expect("a", accel.ProfileRecorded, "0:bin/a:0:10", "0:lib/old:0:100")
	if b.report(report("a", 50, "node3", old)).WantMore {
		t.Error("a settled profile wants more")
	}
	for n := range 3 { // one node's odd starts change nothing
		b.report(report("a", 100+n, "odd", now))
	}
	b.expect("a", accel.ProfileRecorded, "0:bin/a:0:10", "0:lib/old:0:100")
	if !b.report(report("a", 110, "node1", now)).WantMore {
		t.Error("new use is suspected, and no more is wanted")
	}
	for n := range 8 {
		b.report(report("a", 120+n, fmt.Sprint("node", n), now))
	}
	b.expect("a", accel.ProfileRecorded, "0:bin/a:0:10", "0:lib/new:0:300")
	st, err := b.Status(t.Context(), manifest("a"))
	must(t, err)
	if st.Coverage.Share < .5 {
		t.Errorf("coverage stays at %+v", st.Coverage)
	}
}

func TestEffectAndCoverage(t *testing.T) {
	b := newBed(t, ledger.Options{})
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:80", "0:bin/vain:0:40")})
	r := report("a", 1, "n1", items(t, "0:bin/a:0:100"))
	r.End, r.Took = profile.EndAnswered, 3*time.Second
	b.report(r)
	r.ID, r.Took, r.Profile = report("a", 2, "", nil).ID, time.Second, manifest("some profile")
	b.report(r)
	if again := b.report(r); !again.Duplicate {
		t.Error("a report counted twice")
	}
	st, err := b.Status(t.Context(), manifest("a"))
	must(t, err)
	if st.With.Count != 1 || st.With.MeanSeconds != 1 || st.Without.Count != 1 || st.Without.MeanSeconds != 3 {
		t.Errorf("with %+v, without %+v", st.With, st.Without)
	}
	if share := .8 + .25*(1-.8); st.Coverage == nil || math.Abs(st.Coverage.Share-share) > 1e-9 || st.Coverage.VainBytes != 30 {
		t.Errorf("coverage %+v, want %v and 30 bytes in vain", st.Coverage, share)
	}
}

func TestPredictionsThatFailAreGivenUp(t *testing.T) {
	b := newBed(t, ledger.Options{})
	for n := range 6 {
		known, err := b.Knows(t.Context(), manifest("a"), imageOf("a"))
		must(t, err)
		if known != (n == 5) {
			t.Errorf("after %d tries it is given up: %v", n, known)
		}
		b.learn("a", ledger.Given{}) // one that was stopped does not count
		b.learn("a", ledger.Given{Failed: true})
	}
}

// What a person lists stands beside what the maker lists, whatever is learned, imported or recorded.
func TestPersonsList(t *testing.T) {
	b := newBed(t, ledger.Options{})
	ctx := t.Context()
	if err := b.List(ctx, manifest("a"), items(t, "0:x:0:1")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a list for an unknown image: %v", err)
	}
	if _, err := b.Place(ctx, manifest("a")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("the place of an unknown image: %v", err)
	}
	b.learn("a", ledger.Given{})
	if at, err := b.Place(ctx, manifest("a")); err != nil || at != imageOf("a") {
		t.Errorf("%+v, %v", at, err)
	}
	must(t, b.List(ctx, manifest("a"), items(t, "0:model:0:100", "9:no/such/layer:0:1")))
	b.expect("a", accel.ProfileListed, "0:model:0:100")
	b.expectDue("a")
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:10"), Listed: items(t, "0:label:0:5")})
	b.expect("a", accel.ProfilePredicted, "0:bin/a:0:10", "0:label:0:5", "0:model:0:100")
	b.report(report("a", 1, "n", items(t, "0:bin/b:0:10")))
	b.restart()
	b.expect("a", accel.ProfileRecorded, "0:bin/b:0:10", "0:label:0:5", "0:model:0:100")
	if a, err := b.Ancestor(ctx, repository, "linux/amd64", manifest("b")); err != nil || written(a.Profile.Items) != "0:bin/b:0:10" {
		t.Errorf("inherited would be %v, %v", a.Profile.Items, err)
	}
	must(t, b.List(ctx, manifest("a"), items(t, "0:other:0:7")))
	b.expect("a", accel.ProfileRecorded, "0:bin/b:0:10", "0:label:0:5", "0:other:0:7")
	must(t, b.List(ctx, manifest("a"), nil))
	b.expect("a", accel.ProfileRecorded, "0:bin/b:0:10", "0:label:0:5")
	must(t, b.List(ctx, manifest("a"), items(t, "0:other:0:7")))
	must(t, b.Remove(ctx, manifest("a")))
	if _, _, err := b.Profile(ctx, manifest("a")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a removed profile is %v", err)
	}
}

func TestOldestUnusedMakeRoom(t *testing.T) {
	b := newBed(t, ledger.Options{MaxImages: 10})
	for n := range 30 {
		b.learn(fmt.Sprint(n), ledger.Given{Predicted: items(t, "0:bin/a:0:10")})
		b.clock.pass(2 * time.Hour)
		b.served("0") // in use
	}
	for n := range 30 {
		_, _, err := b.Profile(t.Context(), manifest(fmt.Sprint(n)))
		if kept := n == 0 || n > 20; kept != (err == nil) {
			t.Errorf("image %d: %v", n, err)
		}
	}
	u, err := b.Usage(t.Context())
	must(t, err)
	if u.Images != 10 {
		t.Errorf("%d images", u.Images)
	}

	b.o.MaxBytes = 2000
	b.restart()
	b.learn("last", ledger.Given{Predicted: items(t, "0:bin/a:0:10")})
	if u, err = b.Usage(t.Context()); err != nil || u.Bytes > 2000 || u.Images == 0 {
		t.Errorf("%+v, %v", u, err)
	}
	b.served("last")
}

func TestAncestor(t *testing.T) {
	b := newBed(t, ledger.Options{})
	ctx := t.Context()
	for _, name := range []string{"v1", "v2", "other", "v3"} {
		at := imageOf(name)
		if name == "other" {
			at.Platform = "linux/arm64"
		}
		must(t, b.Learn(ctx, manifest(name), at, layers, ledger.Given{Predicted: items(t, "0:predicted:0:1")}))
		b.clock.pass(time.Second)
	}
	if _, err := b.Ancestor(ctx, repository, "linux/amd64", manifest("v3")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("an ancestor without recorded starts: %v", err)
	}
	for n, name := range []string{"v1", "v2", "other"} {
		b.report(report(name, n, "n", items(t, "0:"+name+":0:1")))
	}
	for _, c := range []struct {
		first []string
		want  string
	}{{nil, "v2"}, {[]string{"v1"}, "v1"}, {[]string{"other", "nobody"}, "v2"}} {
		var first []ledger.Image
		for _, f := range c.first {
			first = append(first, imageOf(f))
		}
		a, err := b.Ancestor(ctx, repository, "linux/amd64", manifest("v3"), digests(first)...)
		must(t, err)
		if a.Manifest != manifest(c.want) || written(a.Profile.Items) != "0:"+c.want+":0:1" || !a.Prediction || len(a.Predicted.Items) != 1 {
			t.Errorf("after %v: %+v, want %s", c.first, a, c.want)
		}
	}
	if _, err := b.Ancestor(ctx, "registry.test/else", "linux/amd64", manifest("v3")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("an ancestor of another repository: %v", err)
	}
}

func TestLockedAndDamaged(t *testing.T) {
	b := newBed(t, ledger.Options{})
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:10")})
	if _, err := ledger.Open(b.path, ledger.Options{}); !errors.Is(err, ledger.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	must(t, b.Close())
	whole, err := os.ReadFile(b.path)
	must(t, err)
	for what, content := range map[string][]byte{
		"cut":      whole[:len(whole)/2],
		"nonsense": []byte(strings.Repeat("nonsense", 4096)),
		"changed":  []byte(strings.ReplaceAll(string(whole), `"layers":3`, `"layers":x`)),
	} {
		must(t, os.WriteFile(b.path, content, 0o600))
		b.open()
		if _, _, err := b.Profile(t.Context(), manifest("a")); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Stat(b.path + ".damaged"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		must(t, b.Close())
	}
	b.open()
}
