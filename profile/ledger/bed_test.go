package ledger_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/profile"
	"accel/profile/ledger"

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

var dayOne = time.Date(2026, 3, 1, 6, 0, 0, 0, time.UTC)

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

// bed is a ledger over a file, under a clock; every test ends with a check of all rows.
type bed struct {
	*ledger.Ledger
	t     *testing.T
	path  string
	clock *clock
	o     ledger.Options
}

func newBed(t *testing.T, o ledger.Options) *bed {
	t.Helper()
	b := &bed{t: t, path: filepath.Join(t.TempDir(), "made", "profiles.db"), clock: &clock{now: dayOne}, o: o}
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
	l, err := ledger.Open(b.path, b.o)
	must(b.t, err)
	b.Ledger = l
}

// restart ends the service and starts it again.
func (b *bed) restart() {
	b.t.Helper()
	must(b.t, b.Check())
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

// manifest is the platform manifest that has that name in a test.
func manifest(name string) digest.Digest { return digest.FromString("manifest " + name) }

// imageOf is the image that consists of that manifest alone.
func imageOf(name string) ledger.Image {
	return ledger.Image{Repository: repository, Digest: manifest(name), Platform: "linux/amd64", Target: repository}
}

const layers = 3

func (b *bed) learn(name string, g ledger.Given) {
	b.t.Helper()
	must(b.t, b.Learn(b.t.Context(), manifest(name), imageOf(name), layers, g))
}

// items are written "layer:path:offset:bytes".
func items(t testing.TB, list ...string) (all []accel.ProfileItem) {
	t.Helper()
	for _, s := range list {
		var i accel.ProfileItem
		f := strings.Split(s, ":")
		_, err := fmt.Sscan(f[0]+" "+f[2]+" "+f[3], &i.Layer, &i.Offset, &i.Bytes)
		must(t, err)
		i.Path = f[1]
		all = append(all, i)
	}
	return all
}

// report is a complete one of a node, whose id is made of n.
func report(name string, n int, node string, items []accel.ProfileItem) profile.Report {
	return profile.Report{
		ID: fmt.Sprintf("%032x", n), Node: node, Manifest: manifest(name), StartedAt: dayOne.Add(time.Duration(n) * time.Second),
		Complete: true, End: profile.EndQuiet, Items: items,
	}
}

func (b *bed) report(r profile.Report) ledger.Receipt {
	b.t.Helper()
	receipt, err := b.Report(b.t.Context(), r)
	must(b.t, err)
	return receipt
}

// served is the profile that stands.
func (b *bed) served(name string) accel.Profile {
	b.t.Helper()
	encoded, version, err := b.Profile(b.t.Context(), manifest(name))
	must(b.t, err)
	p, err := profile.Decode(encoded)
	must(b.t, err)
	if profile.Version(p) != version {
		b.t.Fatalf("the version is %s, not %s", version, profile.Version(p))
	}
	return p
}

// expect says how the profile that stands is: its origin, and its items as written.
func (b *bed) expect(name string, origin accel.ProfileOrigin, want ...string) {
	b.t.Helper()
	p := b.served(name)
	if got := written(p.Items); p.Origin != origin || got != strings.Join(want, " ") {
		b.t.Errorf("got  %s %s\nwant %s %s", p.Origin, got, origin, strings.Join(want, " "))
	}
	st, err := b.Status(b.t.Context(), manifest(name))
	must(b.t, err)
	if st.Origin != p.Origin || st.Items != len(p.Items) || st.Bytes != p.Bytes() || st.Version != profile.Version(p) {
		b.t.Errorf("the status %+v is not that of %+v", st, p)
	}
}

func written(items []accel.ProfileItem) string {
	var s []string
	for _, i := range items {
		s = append(s, fmt.Sprintf("%d:%s:%d:%d", i.Layer, i.Path, i.Offset, i.Bytes))
	}
	return strings.Join(s, " ")
}

// due is what is to be published now; ok is false where nothing is.
func (b *bed) due() (p ledger.Publication, ok bool) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Millisecond)
	defer cancel()
	p, err := b.NextPublication(ctx, nil)
	if err != nil && ctx.Err() == nil {
		b.t.Fatal(err)
	}
	return p, err == nil
}

// publish publishes what is due, as a registry that takes all; it says which manifest.
func (b *bed) publish() digest.Digest {
	b.t.Helper()
	p, ok := b.due()
	if !ok {
		return ""
	}
	b.settle(p)
	return p.Manifest
}

// settle is publish of what was due.
func (b *bed) settle(p ledger.Publication) {
	b.t.Helper()
	for n := range p.Places {
		p.Places[n].Artifact = ""
		if p.Profile != nil {
			p.Places[n].Artifact = p.Version
		}
	}
	must(b.t, b.Published(b.t.Context(), p))
}

func (b *bed) expectDue(name string) {
	b.t.Helper()
	if got := b.publish(); got != manifest(name) {
		b.t.Errorf("%q is due to be published, want %s, the manifest of %q", got, manifest(name), name)
	}
}

func (b *bed) expectNoneDue() {
	b.t.Helper()
	if p, ok := b.due(); ok {
		b.t.Errorf("%+v is due to be published, want nothing", p)
	}
}
