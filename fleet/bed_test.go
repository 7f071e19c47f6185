package fleet_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/fleet"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(roleVariable) != "" {
		beKilled(os.Getenv(pathVariable), os.Getenv(roleVariable))
		return
	}
	goleak.VerifyTestMain(m)
}

const repository = "registry.test/team/app"

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// bed is a fleet over a file, under a clock; every test ends with a check of all rows.
type bed struct {
	*fleet.Fleet
	t     *testing.T
	path  string
	clock *clock
	o     fleet.Options
}

func newBed(t *testing.T, o fleet.Options) *bed {
	t.Helper()
	b := &bed{t: t, path: filepath.Join(t.TempDir(), "made", "fleet.db"), clock: &clock{now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}, o: o}
	b.o.Now = b.clock.Now
	b.open()
	t.Cleanup(func() {
		must(t, b.Check())
		must(t, b.Close())
		must(t, b.Close())
	})
	return b
}

func (b *bed) open() {
	b.t.Helper()
	f, err := fleet.Open(b.path, b.o)
	must(b.t, err)
	b.Fleet = f
}

// restart ends the server and starts it again.
func (b *bed) restart() {
	b.t.Helper()
	must(b.t, b.Close())
	b.o.Registerer = nil // the former one has its metrics
	b.open()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var dayOne = time.Date(2026, 3, 1, 6, 0, 0, 0, time.UTC)

// node is a node with labels written "k=v".
func node(name string, labels ...string) accel.Node {
	n := accel.Node{Name: name, Version: "1", StartedAt: dayOne, Cache: accel.CacheUsage{UsedBytes: 5, FreeBytes: 7}}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		if n.Labels == nil {
			n.Labels = map[string]string{}
		}
		n.Labels[k] = v
	}
	return n
}

func (b *bed) seen(nodes ...accel.Node) {
	b.t.Helper()
	for _, n := range nodes {
		_, err := b.Seen(b.t.Context(), n)
		must(b.t, err)
	}
}

func ref(t testing.TB, s string) accel.Reference {
	t.Helper()
	r, err := accel.ParseReference(s)
	must(t, err)
	return r
}

func (b *bed) want(image string, nodes ...string) []accel.Warm {
	b.t.Helper()
	all, err := b.Want(b.t.Context(), ref(b.t, image), nodes)
	must(b.t, err)
	return all
}

func (b *bed) report(w accel.Warm, state accel.WarmState) accel.Warm {
	b.t.Helper()
	w.State = state
	w, err := b.Report(b.t.Context(), w)
	must(b.t, err)
	return w
}

func source(what string) digest.Digest { return digest.FromString(what) }
func target(what string) digest.Digest { return digest.FromString(what + " converted") }

// record is an image that is Ready just now.
func (b *bed) record(what string, tags ...string) accel.Record {
	return accel.Record{
		ID: what, Repository: repository, Digest: source(what), Tags: tags, State: accel.Ready, UpdatedAt: b.clock.Now(),
		Target: accel.Target{Repository: repository + "-esgz", Digest: target(what)},
	}
}

func (b *bed) ready(what string, tags ...string) {
	b.t.Helper()
	must(b.t, b.Ready(b.t.Context(), b.record(what, tags...)))
}

// waiting says what a node is to fetch, sorted, by the names that the images have in tests, whatever
// their tags.
func (b *bed) waiting(name string, whats ...string) string {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	defer cancel()
	all, err := b.Next(ctx, name, 0)
	must(b.t, err)
	return said(all, whats...)
}

func said(all []accel.Warm, whats ...string) string {
	var words []string
	for _, w := range all {
		word := w.Image
		for _, what := range whats {
			switch w.Digest {
			case source(what):
				word = what
			case target(what):
				word = what + "'"
			}
		}
		words = append(words, strings.TrimPrefix(word, repository))
	}
	slices.Sort(words)
	return strings.Join(slices.Compact(words), " ")
}

func (b *bed) expect(name, want string) {
	b.t.Helper()
	if got := b.waiting(name, "a", "b", "c", "d"); got != want {
		b.t.Errorf("%s is to fetch %q, want %q", name, got, want)
	}
}

// states says how all warms stand, newest first: "node state".
func (b *bed) states(sel fleet.Filter) string {
	b.t.Helper()
	page, err := b.Warms(b.t.Context(), sel)
	must(b.t, err)
	var words []string
	for _, w := range page.Warms {
		words = append(words, fmt.Sprint(w.Node, " ", w.State))
	}
	return strings.Join(words, ", ")
}

func everything(forms ...fleet.Form) []fleet.Rule {
	return []fleet.Rule{{Name: "all", Repositories: []string{"registry.test/**"}, Forms: forms}}
}
