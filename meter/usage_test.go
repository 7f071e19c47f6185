package meter_test

import (
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/meter"
)

const (
	imageA = repository + ":v1"
	imageB = "registry.test:5000/team/other@sha256:0123456789012345678901234567890123456789012345678901234567890123"
	gib    = 1 << 30
)

func near(x, want float64) bool { return math.Abs(x-want) <= 0.011*math.Abs(want) }

// byHand are pulls of two days with figures that can be added up by hand.
func byHand() []accel.Pull {
	at := func(minute int) time.Time { return noon.Add(time.Duration(minute) * time.Minute) }
	cacheHit := func(size int64) func(*accel.Pull) {
		return func(p *accel.Pull) { hit(p); p.CacheBytes = size }
	}
	return []accel.Pull{
		pullOf(at(0), took(10*time.Second)),
		pullOf(at(1), took(20*time.Second), on("n2")),
		pullOf(at(2), took(30*time.Second), by("t1")),
		pullOf(at(3), hit, took(time.Second)),
		pullOf(at(4), hit, took(time.Second), by("t1")),
		pullOf(at(5), hit, took(time.Second), memory(4*gib), by("t1")),
		pullOf(at(6), took(5*time.Second), memory(gib/2), func(p *accel.Pull) {
			p.Outcome, p.RegistryBytes, p.PeerBytes, p.CacheBytes = accel.OutcomePartial, 20e6, 30e6, 50e6
		}),
		pullOf(noon.Add(24*time.Hour), of(imageB), cacheHit(50e6), took(2*time.Second), on("n2")),
		pullOf(noon.Add(25*time.Hour), of(imageB), took(3*time.Second), on("n2"), func(p *accel.Pull) {
			p.Outcome, p.RegistryBytes, p.Reason = accel.OutcomeError, 1e6, "reset"
		}),
	}
}

// TestUsageByHand compares usage with what is written out here. The query gives 2 GiB to pulls without a size.
func TestUsageByHand(t *testing.T) {
	now := noon.Add(48 * time.Hour)
	l := openLedger(t, "", &now, meter.LedgerOptions{})
	add(t, l, byHand()...)
	u := usage(t, l, meter.Query{By: meter.ByImage, MemoryBytes: 2 * gib})
	if len(u.Lines) != 2 || u.Lines[0].Key != imageA || u.Lines[1].Key != imageB || u.More != 0 {
		t.Fatalf("%+v", u)
	}
	a, b, all := u.Lines[0], u.Lines[1], u.Total
	exact := map[string][2]float64{
		"A pulls":   {float64(a.Pulls), 7},
		"A hits":    {float64(a.Hits), 3},
		"A partial": {float64(a.Partial), 1},
		"A misses":  {float64(a.Misses), 3},
		"A errors":  {float64(a.Errors), 0},
		"A ratio":   {a.HitRatio, 3.0 / 7},
		// 300 MB of the misses and 20 MB of the partial one are the registry's, of 700 MB.
		"A registry":    {float64(a.RegistryBytes), 320e6},
		"A peer":        {float64(a.PeerBytes), 30e6},
		"A cache":       {float64(a.CacheBytes), 350e6},
		"A byte ratio":  {a.HitRatioBytes, 380.0 / 700},
		"A seconds":     {a.Seconds, 10 + 20 + 30 + 1 + 1 + 1 + 5},
		"A billed":      {a.GBSecondsBilled, (10+20+30)*2 + 5*0.5},
		"A no baseline": {float64(a.NoBaseline), 0},

		"B pulls":   {float64(b.Pulls), 2},
		"B errors":  {float64(b.Errors), 1},
		"B ratio":   {b.HitRatio, 1},
		"B seconds": {b.Seconds, 2},
		"B billed":  {b.GBSecondsBilled, 3 * 2},
		"B p99":     {math.Round(b.P99), 2},

		"pulls":    {float64(all.Pulls), 9},
		"seconds":  {all.Seconds, 70},
		"registry": {float64(all.RegistryBytes), 321e6},
		"billed":   {all.GBSecondsBilled, 122.5 + 6},
	}
	for what, x := range exact {
		if x[0] != x[1] {
			t.Errorf("%s is %v, by hand it is %v", what, x[0], x[1])
		}
	}
	// The median miss of A took 20 s, and the median download of the fleet made 5 MB/s: that of A with 100 MB in 20 s.
	savedA := 2*20*2.0 /* hits without a size */ + 20*4.0 /* the one with 4 GiB */ + (20-5)*0.5 /* the partial one */
	savedB := 50e6 / 5e6 * 2
	within := map[string][2]float64{
		"A p50": {a.P50, 5}, "A p90": {a.P90, 20}, "A saved": {a.GBSecondsSaved, savedA}, "B saved": {b.GBSecondsSaved, savedB},
		"saved": {all.GBSecondsSaved, savedA + savedB},
	}
	for what, x := range within {
		if !near(x[0], x[1]) {
			t.Errorf("%s is %v, by hand it is %v", what, x[0], x[1])
		}
	}
}

func TestUsageByTenantNodeDay(t *testing.T) {
	now := noon.Add(48 * time.Hour)
	l := openLedger(t, "", &now, meter.LedgerOptions{})
	add(t, l, byHand()...)
	for what, want := range map[string]map[string]int64{
		meter.ByTenant: {"": 6, "t1": 3}, meter.ByNode: {"n1": 6, "n2": 3}, meter.ByDay: {"2026-03-10": 7, "2026-03-11": 2},
	} {
		u := usage(t, l, meter.Query{By: what})
		got := map[string]int64{}
		for _, line := range u.Lines {
			got[line.Key] = line.Pulls
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("by %s: %v, want %v", what, got, want)
		}
	}
	day := func(n int) time.Time { return time.Date(2026, 3, n, 0, 0, 0, 0, time.UTC) }
	for what, c := range map[string]struct {
		q    meter.Query
		want int64
	}{
		"first day":       {meter.Query{To: day(11)}, 7},
		"second day":      {meter.Query{From: day(11)}, 2},
		"part of a day":   {meter.Query{From: noon.Add(-time.Hour), To: noon.Add(time.Hour)}, 7}, // whole days
		"before all":      {meter.Query{To: day(9)}, 0},
		"after all":       {meter.Query{From: day(20)}, 0},
		"a tenant's":      {meter.Query{Tenant: "t1"}, 3},
		"a repository's":  {meter.Query{Image: repository}, 7},
		"an image's":      {meter.Query{Image: imageB, Node: "n2"}, 2},
		"half a name":     {meter.Query{Image: "registry.test:5000/team"}, 0},
		"nobody's":        {meter.Query{Tenant: "t2"}, 0},
		"long ago, ahead": {meter.Query{From: day(1).AddDate(-100, 0, 0), To: day(1).AddDate(500, 0, 0)}, 9},
	} {
		c.q.By = meter.ByDay
		if u := usage(t, l, c.q); u.Total.Pulls != c.want || math.IsNaN(u.Total.P50) {
			t.Errorf("%s: %d pulls, want %d", what, u.Total.Pulls, c.want)
		}
	}
	if u := usage(t, l, meter.Query{By: meter.ByImage, Limit: 1}); len(u.Lines) != 1 || u.More != 1 || u.Total.Pulls != 9 {
		t.Errorf("%+v", u)
	}
	for _, q := range []meter.Query{{By: "x", MemoryBytes: 1}, {By: "day"}, {By: "day", MemoryBytes: -1}, {By: "day", MemoryBytes: math.MaxInt64}, {By: "day", MemoryBytes: 1, From: noon, To: noon}} {
		if _, err := l.Usage(t.Context(), q); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

func TestUsageOfNothing(t *testing.T) {
	l := openLedger(t, "", &noon, meter.LedgerOptions{})
	if u := usage(t, l, meter.Query{By: meter.ByImage}); u.Lines == nil || len(u.Lines) != 0 || u.Total.Pulls != 0 || !u.From.IsZero() {
		t.Errorf("%+v", u)
	}
	if p := allPulls(t, l, meter.Filter{Limit: 10}); len(p) != 0 {
		t.Errorf("%v", p)
	}
	must(t, l.Prune(t.Context()))
}

// TestAnyOrderAnyNumberOfTimes reports the same pulls in any order, in batches of any size, from many
// nodes at once and more than once: the figures are the same.
func TestAnyOrderAnyNumberOfTimes(t *testing.T) {
	now := noon.Add(48 * time.Hour)
	pulls := byHand()
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		p := pullOf(noon.Add(time.Duration(i)*time.Minute), on(name("n", r.IntN(5))), by(name("t", r.IntN(3))), took(time.Duration(r.Int64N(60e9))), memory(r.Int64N(3)*r.Int64N(1<<40)))
		if r.IntN(2) == 0 {
			hit(&p)
		}
		pulls = append(pulls, p)
	}
	var want []meter.Usage
	for round := range 5 {
		l := openLedger(t, "", &now, meter.LedgerOptions{})
		var g sync.WaitGroup
		var mu sync.Mutex
		var sum meter.Receipt
		for range 3 {
			mine := slices.Clone(pulls)
			if round > 0 {
				r.Shuffle(len(mine), func(i, j int) { mine[i], mine[j] = mine[j], mine[i] })
			}
			size := 1 + r.IntN(100)
			g.Go(func() {
				for batch := range slices.Chunk(mine, size) {
					got, err := l.Add(t.Context(), batch)
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					sum.Accepted += got.Accepted
					sum.Duplicates += got.Duplicates
					mu.Unlock()
				}
			})
		}
		g.Wait()
		if sum.Accepted != len(pulls) || sum.Duplicates != 2*len(pulls) {
			t.Fatalf("%+v of %d", sum, len(pulls))
		}
		var got []meter.Usage
		for _, what := range []string{meter.ByImage, meter.ByTenant, meter.ByNode, meter.ByDay} {
			got = append(got, usage(t, l, meter.Query{By: what, MemoryBytes: 3 << 29}))
		}
		if round == 0 {
			want = got
		} else if !reflect.DeepEqual(got, want) {
			t.Fatalf("round %d: %+v\nwant %+v", round, got, want)
		}
	}
}

func TestBillingRules(t *testing.T) {
	lazyMiss := func(p *accel.Pull) { p.Mode = accel.PullLazy }
	failed := func(p *accel.Pull) { p.Outcome = accel.OutcomeError }
	for name, c := range map[string]struct {
		billing meter.Billing
		pulls   []accel.Pull
		billed  float64
		saved   float64
	}{
		"a hit is free":      {meter.Billing{}, []accel.Pull{pullOf(noon, hit, took(time.Second))}, 0, 0}, // and no baseline
		"unless it is not":   {meter.Billing{Free: []accel.Outcome{}}, []accel.Pull{pullOf(noon, hit, took(time.Second))}, 1, 0},
		"errors free":        {meter.Billing{Free: []accel.Outcome{accel.OutcomeError}}, []accel.Pull{pullOf(noon, failed), pullOf(noon, took(time.Second))}, 1, 0},
		"rounded up":         {meter.Billing{RoundUp: time.Second}, []accel.Pull{pullOf(noon, took(1001*time.Millisecond)), pullOf(noon, took(3*time.Second))}, 2 + 3, 0},
		"at least":           {meter.Billing{Minimum: 1500 * time.Millisecond, RoundUp: time.Second}, []accel.Pull{pullOf(noon, took(time.Second))}, 2, 0},
		"slower is negative": {meter.Billing{}, []accel.Pull{pullOf(noon, took(2*time.Second)), pullOf(noon, took(5*time.Second), func(p *accel.Pull) { p.Outcome = accel.OutcomePartial })}, 7, 2 - 5},
		"lazy saves":         {meter.Billing{}, []accel.Pull{pullOf(noon, took(10*time.Second)), pullOf(noon, lazyMiss, took(time.Second))}, 11, 9},
		"lazy is no base":    {meter.Billing{}, []accel.Pull{pullOf(noon, lazyMiss, took(10*time.Second))}, 10, 0},
		"baseline rounded":   {meter.Billing{RoundUp: 10 * time.Second}, []accel.Pull{pullOf(noon, took(4*time.Second)), pullOf(noon, hit)}, 10, 10},
	} {
		t.Run(name, func(t *testing.T) {
			l := openLedger(t, "", &noon, meter.LedgerOptions{Billing: c.billing})
			add(t, l, c.pulls...)
			got := usage(t, l, meter.Query{By: meter.ByImage}).Total
			if got.GBSecondsBilled != c.billed || !near(got.GBSecondsSaved, c.saved) {
				t.Errorf("billed %g, saved %g; want %g and %g", got.GBSecondsBilled, got.GBSecondsSaved, c.billed, c.saved)
			}
		})
	}
	for _, b := range []meter.Billing{{Free: []accel.Outcome{"x"}}, {RoundUp: -1}, {Minimum: math.MaxInt64}} {
		if _, err := meter.OpenLedger(t.TempDir()+"/x", meter.LedgerOptions{Billing: b}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%+v: %v", b, err)
		}
	}
}

// TestBaselineIsOfThatTime: downloads of long before the days that are asked for, or after them, do not count.
func TestBaselineIsOfThatTime(t *testing.T) {
	now := noon
	l := openLedger(t, "", &now, meter.LedgerOptions{})
	day := func(n int) time.Time { return noon.AddDate(0, 0, n) }
	add(t, l, pullOf(day(-50), took(100*time.Second)), pullOf(day(-20), took(10*time.Second)), pullOf(day(-5), took(50*time.Second), of(imageB)), pullOf(day(-10), hit), pullOf(day(0), hit))
	for what, c := range map[string]struct {
		from, to   time.Time
		saved      float64
		noBaseline int64
	}{
		"a download lately":     {day(-10), day(-9), 10, 0},
		"again":                 {day(0), time.Time{}, 10, 0},
		"all, with the old one": {time.Time{}, time.Time{}, 2 * 10, 0}, // of 10 and 100 the lower is the median
	} {
		u := usage(t, l, meter.Query{By: meter.ByImage, Image: imageA, From: c.from, To: c.to})
		if !near(u.Total.GBSecondsSaved, c.saved) || u.Total.NoBaseline != c.noBaseline {
			t.Errorf("%s: saved %g, %d without baseline; want %g, %d", what, u.Total.GBSecondsSaved, u.Total.NoBaseline, c.saved, c.noBaseline)
		}
	}
	fresh := openLedger(t, "", &now, meter.LedgerOptions{})
	add(t, fresh, pullOf(day(-10), hit), pullOf(day(-3), took(10*time.Second)))
	if u := usage(t, fresh, meter.Query{By: meter.ByImage, To: day(-8)}); u.Total.GBSecondsSaved != 0 || u.Total.NoBaseline != 1 {
		t.Errorf("%+v", u.Total)
	}
}

func FuzzTotal(f *testing.F) {
	f.Add(int64(1), int64(2), []byte{1})
	f.Add(int64(math.MaxInt64), int64(math.MaxInt64), []byte{0, 0, 1})
	f.Fuzz(func(t *testing.T, a, b int64, raw []byte) {
		if a >= 0 && b >= 0 {
			var x meter.Total
			x.AddProduct(a, b)
			x.AddProduct(b, a)
			y, err := meter.DecodeTotal(x.Encode())
			if err != nil || x != y {
				t.Errorf("%v is %v, %v", x, y, err)
			}
		}
		if x, err := meter.DecodeTotal(raw); err == nil {
			if y, err := meter.DecodeTotal(x.Encode()); err != nil || x != y {
				t.Errorf("%v is %v, %v", x, y, err)
			}
		} else if !errors.Is(err, meter.ErrDamaged) {
			t.Error(err)
		}
	})
}
