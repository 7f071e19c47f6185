package meter_test

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/meter"
)

const aDay = 24 * time.Hour

// apart keeps all days apart.
const apart = 4000 * aDay

// manyDays are pulls of some days from noon's on, of 9 images by 4 tenants on 6 nodes.
func manyDays(r *rand.Rand, days, each int) []accel.Pull {
	var pulls []accel.Pull
	for i := range days * each {
		at := noon.AddDate(0, 0, i/each).Add(time.Duration(i%each) * time.Second)
		p := pullOf(at, of(repository+":"+name("v", r.IntN(9))), by(name("t", r.IntN(4))), on(name("n", r.IntN(6))),
			took(time.Duration(r.Int64N(60e9))), memory(r.Int64N(3)*r.Int64N(1<<40)))
		switch r.IntN(4) {
		case 0:
			hit(&p)
		case 1:
			p.Outcome, p.CacheBytes = accel.OutcomePartial, 5e6
		case 2:
			p.Mode = accel.PullLazy
		}
		pulls = append(pulls, p)
	}
	return pulls
}

// comparable is u without what folding changes: the estimate of savings, and unless whole the percentiles.
func comparable(u meter.Usage, whole bool) meter.Usage {
	u.Lines = slices.Clone(u.Lines)
	lines := []*meter.UsageLine{&u.Total}
	for i := range u.Lines {
		lines = append(lines, &u.Lines[i])
	}
	for _, l := range lines {
		l.GBSecondsSaved, l.NoBaseline = 0, 0
		if !whole {
			l.P50, l.P90, l.P99 = 0, 0, 0
		}
	}
	return u
}

// TestFoldedDaysAnswerAsBefore compares a ledger that folds with one that does not, folded at once and bit by bit, and with
// pulls that come after their day was folded.
func TestFoldedDaysAnswerAsBefore(t *testing.T) {
	pulls := manyDays(rand.New(rand.NewPCG(3, 4)), 70, 30)
	now := noon.AddDate(0, 0, 70)
	whole := openLedger(t, "", &now, meter.LedgerOptions{KeepDetail: apart, KeepPulls: apart})
	add(t, whole, pulls...)
	for what, fill := range map[string]func(l *meter.Ledger){
		"at once": func(l *meter.Ledger) { add(t, l, pulls...) },
		"bit by bit": func(l *meter.Ledger) {
			l.FoldBy(7)
			for batch := range slices.Chunk(pulls, 300) {
				now = batch[len(batch)-1].Start
				add(t, l, batch...)
				must(t, l.Prune(t.Context()))
			}
			now = noon.AddDate(0, 0, 70)
		},
		"late": func(l *meter.Ledger) {
			add(t, l, pulls[len(pulls)-1])
			must(t, l.Prune(t.Context()))
			shuffled := slices.Clone(pulls)
			rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
			for batch := range slices.Chunk(shuffled, 200) {
				add(t, l, batch...)
				if r := add(t, l, batch...); r.Duplicates != len(batch) {
					t.Errorf("%+v", r)
				}
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ledger.db")
			o := meter.LedgerOptions{KeepDetail: 5 * aDay, KeepPulls: apart}
			l := openLedger(t, path, &now, o)
			fill(l)
			must(t, l.Prune(t.Context()))
			must(t, l.Prune(t.Context()))
			must(t, l.Close())
			l = openLedger(t, path, &now, o)
			if rows, err := l.Rows(); err != nil || rows == 0 || rows > 6*30 {
				t.Errorf("%d roll-ups are left, %v", rows, err)
			}
			compare(t, l, whole)
		})
	}
}

func compare(t *testing.T, l, whole *meter.Ledger) {
	t.Helper()
	day := func(n int) time.Time { return noon.Truncate(aDay).AddDate(0, 0, n) }
	may := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	image, tenant, node := repository+":v3", "t2", "n4"
	for what, c := range map[string]struct {
		q     meter.Query
		whole bool // months
	}{
		"all by image":          {meter.Query{By: meter.ByImage}, true},
		"all by tenant":         {meter.Query{By: meter.ByTenant}, true},
		"all by node":           {meter.Query{By: meter.ByNode}, true},
		"all by day":            {meter.Query{By: meter.ByDay}, true},
		"days by day":           {meter.Query{By: meter.ByDay, From: day(11), To: day(68)}, true},
		"long":                  {meter.Query{By: meter.ByImage, From: day(-4000), To: day(4000)}, true},
		"days by image":         {meter.Query{By: meter.ByImage, From: day(12), To: day(30)}, false},
		"days by tenant":        {meter.Query{By: meter.ByTenant, From: day(12), To: day(13)}, false},
		"days by node":          {meter.Query{By: meter.ByNode, From: day(40), To: day(68)}, false},
		"month by image":        {meter.Query{By: meter.ByImage, From: may.AddDate(0, -1, 0), To: may}, true},
		"image":                 {meter.Query{By: meter.ByImage, Image: image}, true},
		"image by day":          {meter.Query{By: meter.ByDay, Image: image}, false},
		"repository":            {meter.Query{By: meter.ByImage, Image: repository}, true},
		"tenant by day":         {meter.Query{By: meter.ByDay, Tenant: tenant}, false},
		"node by day":           {meter.Query{By: meter.ByDay, Node: node, From: day(5)}, false},
		"node":                  {meter.Query{By: meter.ByNode, Node: node}, true},
		"tenant by image":       {meter.Query{By: meter.ByImage, Tenant: tenant}, true},
		"image by tenant":       {meter.Query{By: meter.ByTenant, Image: image, From: may}, true},
		"month by both":         {meter.Query{By: meter.ByTenant, Image: image, From: may.AddDate(0, -1, 0), To: may}, true},
		"new image on node":     {meter.Query{By: meter.ByImage, Node: node, From: day(66)}, true},
		"new tenant on node":    {meter.Query{By: meter.ByDay, Node: node, Tenant: tenant, From: day(66)}, true},
		"before all, unwilling": {meter.Query{By: meter.ByImage, Node: node, From: day(-20), To: day(-10)}, true},
	} {
		got, want := comparable(usage(t, l, c.q), c.whole), comparable(usage(t, whole, c.q), c.whole)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v\nwant %+v", what, got, want)
		}
	}
}

func TestWhatFoldedDaysCannotTell(t *testing.T) {
	now := noon.AddDate(0, 0, 40) // April 19
	l := openLedger(t, "", &now, meter.LedgerOptions{})
	add(t, l, manyDays(rand.New(rand.NewPCG(5, 6)), 40, 10)...)
	must(t, l.Prune(t.Context()))
	day := func(month time.Month, d int) time.Time { return time.Date(2026, month, d, 0, 0, 0, 0, time.UTC) }
	folded := day(4, 12)
	for what, q := range map[string]meter.Query{
		"image on node":       {By: meter.ByImage, Node: "n1", From: day(4, 1)},
		"node of image":       {By: meter.ByNode, Image: repository, From: day(4, 11)},
		"tenant on node":      {By: meter.ByTenant, Node: "n1", From: day(4, 11), To: folded},
		"day of three":        {By: meter.ByDay, Image: repository, Tenant: "t1", From: day(4, 1)},
		"tenant of image":     {By: meter.ByTenant, Image: repository, From: day(3, 11)},
		"image of tenant, to": {By: meter.ByImage, Tenant: "t1", To: day(3, 31)},
	} {
		if _, err := l.Usage(t.Context(), meter.Query{By: q.By, Image: q.Image, Tenant: q.Tenant, Node: q.Node, From: q.From, To: q.To, MemoryBytes: 1}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// Where no first day is asked for, it is the first that can be told.
	for what, c := range map[string]struct {
		q    meter.Query
		from time.Time
	}{
		"image on node":   {meter.Query{By: meter.ByImage, Node: "n1"}, folded},
		"day of both":     {meter.Query{By: meter.ByDay, Image: repository, Tenant: "t1"}, folded},
		"image of tenant": {meter.Query{By: meter.ByImage, Tenant: "t1"}, day(3, 10)},
		"all":             {meter.Query{By: meter.ByNode}, day(3, 10)},
	} {
		if u := usage(t, l, c.q); !u.From.Equal(c.from) || u.Total.Pulls == 0 {
			t.Errorf("%s: %d pulls from %s", what, u.Total.Pulls, u.From)
		}
	}
	if u := usage(t, l, meter.Query{By: meter.ByImage, Node: "n1", To: day(4, 1)}); len(u.Lines) != 0 {
		t.Errorf("%+v", u)
	}
}

// TestSavingsOfFoldedDays: what folded days saved goes by the downloads of their time, and stays so.
func TestSavingsOfFoldedDays(t *testing.T) {
	now := noon
	l := openLedger(t, "", &now, meter.LedgerOptions{})
	day := func(n int) time.Time { return noon.AddDate(0, 0, n) }
	add(t, l, pullOf(day(-40), of(imageB), hit, took(time.Second))) // there is nothing to go by
	add(t, l, pullOf(day(-20), took(10*time.Second)), pullOf(day(-19), hit, memory(2*gib)), pullOf(day(-18), hit, of(imageB)))
	check := func(saved float64, unknown int64) {
		t.Helper()
		for _, what := range []string{meter.ByImage, meter.ByTenant, meter.ByNode, meter.ByDay} {
			u := usage(t, l, meter.Query{By: what})
			var lines float64
			for _, line := range u.Lines {
				lines += line.GBSecondsSaved
			}
			if !near(u.Total.GBSecondsSaved, saved) || !near(lines, saved) || u.Total.NoBaseline != unknown {
				t.Errorf("by %s: %g saved, %d unknown; want %g, %d", what, u.Total.GBSecondsSaved, u.Total.NoBaseline, saved, unknown)
			}
		}
	}
	// The image's own download took 10 s; the other's goes by its speed, 10 MB/s.
	add(t, l, pullOf(day(0), took(100*time.Second)))
	must(t, l.Prune(t.Context()))
	check(2*10+10, 1)
	add(t, l, pullOf(day(-18), hit)) // late
	check(2*10+10+10, 1)
	add(t, l, pullOf(day(0), hit)) // not folded: 10 s and 100 s, of which the lower is the median
	check(2*10+10+10+10, 1)
}

func TestOldLedgerIsTakenOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	now := noon.AddDate(0, 0, 40)
	pulls := manyDays(rand.New(rand.NewPCG(7, 8)), 40, 10)
	l := openLedger(t, path, &now, meter.LedgerOptions{})
	add(t, l, pulls...)
	want := comparable(usage(t, l, meter.Query{By: meter.ByTenant}), true)
	must(t, l.Close())
	must(t, meter.MakeOld(path))
	for range 2 {
		l = openLedger(t, path, &now, meter.LedgerOptions{})
		must(t, l.Prune(t.Context()))
		if got := comparable(usage(t, l, meter.Query{By: meter.ByTenant}), true); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v\nwant %+v", got, want)
		}
		must(t, l.Close())
	}
}

// TestNamesThatComeBack adds pulls of names that are just being swept.
func TestNamesThatComeBack(t *testing.T) {
	now := noon
	l := openLedger(t, "", &now, meter.LedgerOptions{KeepPulls: aDay, KeepRollups: aDay, KeepDetail: aDay})
	for round := range 30 {
		now = noon.AddDate(0, 2*round, 0)
		add(t, l, pullOf(now, of(imageB)))
		var g sync.WaitGroup
		g.Go(func() {
			for i := range 5 {
				add(t, l, pullOf(now.Add(time.Duration(i)*time.Second), of(repository+":"+name("v", i))))
			}
		})
		must(t, l.Prune(t.Context()))
		g.Wait()
		u := usage(t, l, meter.Query{By: meter.ByImage, From: now.Add(-aDay)})
		if len(u.Lines) != 6 || u.Total.Pulls != 6 || slices.ContainsFunc(u.Lines, func(l meter.UsageLine) bool { return l.Key == "" }) {
			t.Fatalf("round %d: %+v", round, u.Lines)
		}
	}
	if names, err := l.Names(); err != nil || names > 8 {
		t.Errorf("%d names, %v", names, err)
	}
}
