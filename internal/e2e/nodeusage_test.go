package e2e

import (
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// byHand is one pull as the test did it.
type byHand struct {
	image, platform string
	outcome         accel.Outcome
	registry, cache int64
	tenant          string
	memory          int64
	atMost          time.Duration // that the client took
}

// What the platform says of containerd's pulls.
const (
	tenant       = "team-a"
	tenantMemory = 2 << 30
)

// TestUsageIsWhatWasDone has each client pull an image (a miss), again (a hit), and
// another version that shares a layer (partial), and compares what the server
// says of pulls and usage with that.
func TestUsageIsWhatWasDone(t *testing.T) {
	needsClients(t)
	server := start(t, t.TempDir(), "127.0.0.1:0")
	reg := startRegistry(t)
	n := newNode(t, reg, server.client.Server(), reader, readerPassword,
		fmt.Sprintf("containerd: {headers: {Accel-Tenant: %s, Accel-Memory-Bytes: '%d'}}", tenant, int64(tenantMemory))).start()
	var done []byHand
	for i, c := range newClients(t, route{hostsDir: n.installed(), mirror: n.mirror}) {
		repository := fmt.Sprintf("team/app-%d", i)
		seed := uint64(i) * 10
		shared := gzipped(t, tarOf(t, file("shared", noise(seed, 3<<20), 0o644)))
		first := gzipped(t, tarOf(t, file("first", noise(seed+1, 200<<10), 0o644)))
		second := gzipped(t, tarOf(t, file("second", noise(seed+2, 700<<10), 0o644)))
		one, two := image(t, "amd64", shared, first), image(t, "amd64", shared, second)
		ref1, _ := pushTo(t, reg, repository+":v1", one)
		ref2, _ := pushTo(t, reg, repository+":v2", two)
		size := func(l v1.Layer) int64 {
			n, err := l.Size()
			must(t, err)
			return n
		}
		for _, p := range []byHand{
			{image: ref1, outcome: accel.OutcomeMiss, registry: size(shared) + size(first)},
			{image: ref1, outcome: accel.OutcomeHit, cache: size(shared) + size(first)},
			{image: ref2, outcome: accel.OutcomePartial, registry: size(second), cache: size(shared)},
		} {
			if c.name != "skopeo" && c.name != "crane" { // containerd's hosts.toml has the headers
				p.tenant, p.memory = tenant, tenantMemory
			}
			img := one
			if p.image == ref2 {
				img = two
			}
			h, err := img.Digest()
			must(t, err)
			p.platform = h.String()
			begin := time.Now()
			if _, err := c.pull(p.image, "", ""); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			p.atMost = time.Since(begin)
			must(t, c.forget(p.image))
			done = append(done, p)
		}
	}

	pulls := n.reported(server, len(done))
	for i, want := range done {
		got := pulls[i]
		if got.Image != want.image || string(got.Digest) != want.platform || got.Outcome != want.outcome || got.RegistryBytes != want.registry || got.CacheBytes != want.cache ||
			got.PeerBytes != 0 || got.Tenant != want.tenant || got.MemoryBytes != want.memory || got.Node != "node-1" || got.Mode != accel.PullMirror || got.Duration <= 0 || got.Duration > want.atMost {
			t.Errorf("pull %d was %+v, reported as %+v", i, want, got)
		}
	}
	requireUsage(t, server, pulls)
	n.stop()
	server.stop()
}

// reported waits until the server has so many pulls, and gives them in the order
// of their starts.
func (n *nodeRun) reported(server *up, count int) []accel.Pull {
	n.t.Helper()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		var pulls []accel.Pull
		for p, err := range server.client.Pulls(n.t.Context(), api.PullOptions{}) {
			must(n.t, err)
			pulls = append(pulls, p)
		}
		if len(pulls) >= count {
			if len(pulls) > count {
				n.t.Errorf("%d pulls, want %d: %+v", len(pulls), count, pulls)
			}
			slices.SortFunc(pulls, func(a, b accel.Pull) int { return a.Start.Compare(b.Start) })
			return pulls
		}
		if time.Since(begin) > patience {
			n.t.Fatalf("the server has %d pulls after %s, want %d: %+v", len(pulls), patience, count, pulls)
		}
	}
}

// requireUsage adds up pulls by hand and compares with `accel usage`.
func requireUsage(t *testing.T, server *up, pulls []accel.Pull) {
	t.Helper()
	const memory = 512 << 20
	ask := func(args ...string) string {
		t.Helper()
		out, err := accelCommand(append([]string{"usage", "--memory", "512MiB", "--server", server.client.Server()}, args...)...)
		must(t, err)
		return out
	}
	cost := func(p accel.Pull) float64 {
		return p.Duration.Seconds() * float64(cmp.Or(p.MemoryBytes, memory)) / (1 << 30)
	}
	for by, keyOf := range map[string]func(accel.Pull) string{
		"image":  func(p accel.Pull) string { return p.Image },
		"tenant": func(p accel.Pull) string { return p.Tenant },
		"node":   func(p accel.Pull) string { return p.Node },
		"day":    func(p accel.Pull) string { return p.Start.Format(time.DateOnly) },
	} {
		want := map[string]api.UsageLine{}
		var total api.UsageLine
		saved := map[string]float64{} // by hits: what the same image's miss cost
		for _, p := range pulls {
			key := keyOf(p)
			line := want[key]
			line.Key = key
			for _, l := range []*api.UsageLine{&line, &total} {
				add(l, p)
				if p.Outcome != accel.OutcomeHit {
					l.GBSecondsBilled += cost(p)
				}
			}
			want[key] = line
			if p.Outcome == accel.OutcomeMiss {
				saved[key] += cost(p)
			}
		}
		var got api.UsageReport
		must(t, json.Unmarshal([]byte(ask("--by", by, "-o", "json")), &got))
		if len(got.Lines) != len(want) || got.More != 0 {
			t.Errorf("by %s: %d lines and %d more, want %d", by, len(got.Lines), got.More, len(want))
		}
		for _, l := range got.Lines {
			w, known := want[l.Key]
			if !known {
				t.Errorf("by %s: a line for %q, which there was not", by, l.Key)
				continue
			}
			requireLine(t, l, w)
			// Other lines have partial pulls too. A percentile of a sketch is within 1 %.
			if by == "image" && w.Partial == 0 && !near(l.GBSecondsSaved, saved[l.Key], 0.01) {
				t.Errorf("%s: %g GB-seconds saved, want %g within 1 %%", l.Key, l.GBSecondsSaved, saved[l.Key])
			}
		}
		requireLine(t, got.Total, total)
	}
	rows, err := csv.NewReader(strings.NewReader(ask("--by", "node", "-o", "csv"))).ReadAll()
	must(t, err)
	if len(rows) != 2 || rows[0][0] != "node" || rows[1][0] != "node-1" || rows[1][slices.Index(rows[0], "pulls")] != strconv.Itoa(len(pulls)) {
		t.Errorf("as CSV: %v", rows)
	}
}

// add counts one pull.
func add(l *api.UsageLine, p accel.Pull) {
	l.Pulls++
	l.RegistryBytes += p.RegistryBytes
	l.CacheBytes += p.CacheBytes
	l.Seconds += p.Duration.Seconds()
	switch p.Outcome {
	case accel.OutcomeHit:
		l.Hits++
	case accel.OutcomePartial:
		l.Partial++
	case accel.OutcomeMiss:
		l.Misses++
	default:
		l.Errors++
	}
}

// requireLine compares what is counted, and what follows from it.
func requireLine(t *testing.T, got, want api.UsageLine) {
	t.Helper()
	want.HitRatio = float64(want.Hits) / float64(want.Pulls-want.Errors)
	want.HitRatioBytes = float64(want.CacheBytes) / float64(want.CacheBytes+want.RegistryBytes)
	const exact = 1e-6
	if got.Pulls != want.Pulls || got.Hits != want.Hits || got.Partial != want.Partial || got.Misses != want.Misses || got.Errors != want.Errors ||
		got.RegistryBytes != want.RegistryBytes || got.CacheBytes != want.CacheBytes || got.PeerBytes != 0 || got.Lazy != 0 ||
		!near(got.HitRatio, want.HitRatio, exact) || !near(got.HitRatioBytes, want.HitRatioBytes, exact) || !near(got.Seconds, want.Seconds, exact) ||
		!near(got.GBSecondsBilled, want.GBSecondsBilled, exact) {
		t.Errorf("usage of %q is\n%+v, by hand\n%+v", want.Key, got, want)
	}
}

func near(got, want, relative float64) bool {
	return math.Abs(got-want) <= relative*math.Abs(want)
}
