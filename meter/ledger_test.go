package meter_test

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/meter"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

func TestPullsAreListed(t *testing.T) {
	now := noon.Add(48 * time.Hour)
	path := filepath.Join(t.TempDir(), "pulls.db")
	l := openLedger(t, path, &now, meter.LedgerOptions{})
	pulls := byHand()
	add(t, l, pulls...)
	must(t, l.Close())
	l = openLedger(t, path, &now, meter.LedgerOptions{Registerer: prometheus.NewRegistry()})
	newest := slices.Clone(pulls)
	slices.Reverse(newest)
	for _, limit := range []int{1, 2, 9, 1000} {
		if got := allPulls(t, l, meter.Filter{Limit: limit}); !reflect.DeepEqual(got, newest) {
			t.Errorf("by %d: %v", limit, got)
		}
	}
	for what, c := range map[string]struct {
		f    meter.Filter
		want []accel.Pull
	}{
		"image":      {meter.Filter{Image: imageB}, newest[:2]},
		"repository": {meter.Filter{Image: repository}, newest[2:]},
		"node":       {meter.Filter{Node: "n2"}, []accel.Pull{newest[0], newest[1], newest[7]}},
		"tenant":     {meter.Filter{Tenant: "t1", Outcome: accel.OutcomeMiss}, newest[6:7]},
		"from":       {meter.Filter{From: pulls[7].Start}, newest[:2]},
		"to":         {meter.Filter{To: pulls[2].Start}, newest[7:]},
		"none":       {meter.Filter{From: now.AddDate(20_000, 0, 0)}, nil},
		"before":     {meter.Filter{To: time.Unix(-1, 0)}, nil},
	} {
		for _, c.f.Limit = range []int{1, 100} {
			if got := allPulls(t, l, c.f); !reflect.DeepEqual(got, c.want) {
				t.Errorf("by %s: %v, want %v", what, ids(got), ids(c.want))
			}
		}
	}
	for _, f := range []meter.Filter{{}, {Limit: 1001}, {Limit: 1, Cursor: "x"}} {
		if _, err := l.Pulls(t.Context(), f); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%+v: %v", f, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Add(ended, pulls); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestHostileValuesAreRefused(t *testing.T) {
	l := openLedger(t, "", &noon, meter.LedgerOptions{})
	change := func(f func(*accel.Pull)) accel.Pull { return pullOf(noon, f) }
	for what, p := range map[string]accel.Pull{
		"no id":              change(func(p *accel.Pull) { p.ID = "" }),
		"long id":            change(func(p *accel.Pull) { p.ID = strings.Repeat("0", 1<<20) }),
		"lower case id":      change(func(p *accel.Pull) { p.ID = strings.ToLower(p.ID) }),
		"id out of range":    change(func(p *accel.Pull) { p.ID = "8ZZZZZZZZZZZZZZZZZZZZZZZZZ" }),
		"greatest id":        change(func(p *accel.Pull) { p.ID = "7ZZZZZZZZZZZZZZZZZZZZZZZZZ" }),
		"another's time":     change(func(p *accel.Pull) { p.ID = idAt(noon.Add(time.Millisecond)) }),
		"future":             pullOf(noon.Add(25 * time.Hour)),
		"past":               pullOf(time.Unix(0, 0)),
		"no start":           change(func(p *accel.Pull) { p.Start = time.Time{} }),
		"before it began":    change(took(-1)),
		"for ever":           change(took(math.MaxInt64)),
		"memory":             change(memory(math.MaxInt64)),
		"negative memory":    change(memory(-1)),
		"bytes":              change(func(p *accel.Pull) { p.CacheBytes = math.MaxInt64 }),
		"negative bytes":     change(func(p *accel.Pull) { p.PeerBytes = -1 }),
		"a hit that was not": change(func(p *accel.Pull) { p.Outcome = accel.OutcomeHit }),
		"outcome":            change(func(p *accel.Pull) { p.Outcome = "free" }),
		"mode":               change(func(p *accel.Pull) { p.Mode = "" }),
		"no image":           change(of("")),
		"image":              change(of("r.test/UPPER")),
		"long image":         change(of("r.test/" + strings.Repeat("a", 2000))),
		"image with lines":   change(of("r.test/a:b\nc")),
		"no node":            change(on("")),
		"node":               change(on("a b")),
		"long node":          change(on(strings.Repeat("n", 300))),
		"tenant":             change(by("a\x00b")),
		"long tenant":        change(by(strings.Repeat("t", 200))),
		"digest":             change(func(p *accel.Pull) { p.Digest = "sha256:../../etc" }),
		"reason":             change(func(p *accel.Pull) { p.Reason = "\xff" }),
		"long reason":        change(func(p *accel.Pull) { p.Reason = strings.Repeat("r", 5000) }),
	} {
		good := pullOf(noon)
		if _, err := l.Add(t.Context(), []accel.Pull{good, p}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := usage(t, l, meter.Query{By: meter.ByDay}).Total.Pulls; n != 0 {
		t.Errorf("%d pulls were counted", n)
	}
	extreme := change(func(p *accel.Pull) {
		p.Duration, p.MemoryBytes, p.RegistryBytes, p.CacheBytes, p.PeerBytes = 7*24*time.Hour, 1<<50, 1<<50, 1<<50, 1<<50
		p.Outcome, p.Digest, p.Reason, p.Tenant = accel.OutcomePartial, digest.FromString("x"), strings.Repeat("r", 1024), "a tenant's name"
	})
	add(t, l, extreme)
	if u := usage(t, l, meter.Query{By: meter.ByDay}); u.Total.GBSecondsBilled != 7*24*3600*float64(1<<20) {
		t.Errorf("%+v", u.Total)
	}
}

func TestRetention(t *testing.T) {
	now := noon
	path := filepath.Join(t.TempDir(), "pulls.db")
	o := meter.LedgerOptions{KeepPulls: 10 * 24 * time.Hour, KeepRollups: 100 * 24 * time.Hour}
	l := openLedger(t, path, &now, o)
	var pulls []accel.Pull
	for d := range 140 {
		pulls = append(pulls, pullOf(noon.AddDate(0, 0, d), of(repository+":"+name("v", d))), pullOf(noon.AddDate(0, 0, d), hit, on("n2")))
	}
	for len(pulls) > 0 {
		now = pulls[0].Start.Add(time.Hour)
		if r := add(t, l, pulls[:2]...); r.Accepted != 2 {
			t.Fatalf("%+v", r)
		}
		must(t, l.Prune(t.Context()))
		// Again, and after a time: it was counted.
		if r := add(t, l, pulls[:2]...); r.Duplicates != 2 {
			t.Fatalf("%+v", r)
		}
		pulls = pulls[2:]
	}
	kept := allPulls(t, l, meter.Filter{Limit: 1000})
	if len(kept) != 2*10 || kept[19].Start.Before(now.Add(-o.KeepPulls)) {
		t.Errorf("%d pulls are kept, the oldest of %s", len(kept), kept[len(kept)-1].Start)
	}
	for _, p := range kept { // with their names
		must(t, meter.Validate(p, now))
	}
	u := usage(t, l, meter.Query{By: meter.ByDay})
	// A hundred days, and the rest of their first month.
	days := int(now.Sub(time.Date(2026, 4, 1, 0, 0, 0, 0, time.UTC))/(24*time.Hour)) + 1
	if len(u.Lines) != days || u.Total.Pulls != 2*int64(days) {
		t.Errorf("%d days with %d pulls, want %d", len(u.Lines), u.Total.Pulls, days)
	}
	// Each day's tag and the one of n2's, and two nodes.
	if names, err := l.Names(); err != nil || names != days+1+2 {
		t.Errorf("%d names are kept, %v", names, err)
	}
	// Of the days of which pulls may come, and the thirty before.
	if bases, err := l.Bases(); err != nil || bases != 2*(10+30+1) {
		t.Errorf("%d baselines are kept, %v", bases, err)
	}
	// A line for each of seven days and a part of one.
	if rows, err := l.Rows(); err != nil || rows != 2*8 {
		t.Errorf("%d roll-ups are kept, %v", rows, err)
	}
	// What is older than what is kept may have been counted before.
	if r := add(t, l, pullOf(noon.AddDate(0, 0, 50))); r != (meter.Receipt{Late: 1}) {
		t.Errorf("%+v", r)
	}
	must(t, l.Close())
	l = openLedger(t, path, &now, o)
	if r := add(t, l, pullOf(noon.AddDate(0, 0, 50)), pullOf(now)); r != (meter.Receipt{Late: 1, Accepted: 1}) {
		t.Errorf("%+v", r)
	}
	if again := usage(t, l, meter.Query{By: meter.ByDay}); again.Total.Pulls != u.Total.Pulls+1 {
		t.Errorf("%d pulls", again.Total.Pulls)
	}
}

func TestClockThatJumpsRemovesNothing(t *testing.T) {
	now := noon
	l := openLedger(t, "", &now, meter.LedgerOptions{})
	add(t, l, byHand()[:7]...)
	for _, now = range []time.Time{noon.AddDate(50, 0, 0), noon.AddDate(-20, 0, 0), noon} {
		must(t, l.Prune(t.Context()))
	}
	if n := len(allPulls(t, l, meter.Filter{Limit: 100})); n != 7 {
		t.Errorf("%d pulls are left", n)
	}
	if u := usage(t, l, meter.Query{By: meter.ByDay}); u.Total.Pulls != 7 {
		t.Errorf("%+v", u.Total)
	}
}

func TestMaxPulls(t *testing.T) {
	now := noon.Add(time.Hour)
	l := openLedger(t, "", &now, meter.LedgerOptions{MaxPulls: 10})
	pulls := series(40)
	for batch := range slices.Chunk(pulls, 7) {
		add(t, l, batch...)
	}
	must(t, l.Prune(t.Context()))
	kept := allPulls(t, l, meter.Filter{Limit: 100})
	if len(kept) != 10 || kept[9].ID != pulls[30].ID {
		t.Errorf("%d are kept", len(kept))
	}
	if r := add(t, l, pulls...); r != (meter.Receipt{Duplicates: 10, Late: 30}) {
		t.Errorf("%+v", r)
	}
	if u := usage(t, l, meter.Query{By: meter.ByDay}); u.Total.Pulls != 40 {
		t.Errorf("%d pulls", u.Total.Pulls)
	}
}

func TestMaxDayRows(t *testing.T) {
	now := noon.Add(time.Hour)
	l := openLedger(t, "", &now, meter.LedgerOptions{MaxDayRows: 8})
	var pulls []accel.Pull
	for i := range 100 {
		pulls = append(pulls, pullOf(noon.Add(time.Duration(i)*time.Second), of(repository+":"+name("v", i)), by(name("t", i%20))))
	}
	add(t, l, pulls...)
	add(t, l, pullOf(noon, of(repository+":v3"), by("t3"))) // has its own already
	u := usage(t, l, meter.Query{By: meter.ByImage})
	if u.Lines[0].Key != meter.OtherImage || u.Lines[0].Pulls != 92 || len(u.Lines) != 9 || u.Total.Pulls != 101 || u.Total.RegistryBytes != 101*100e6 {
		t.Errorf("%d lines: %+v", len(u.Lines), u.Lines[0])
	}
	if rows, err := l.Rows(); err != nil || rows > 8+2+1 {
		t.Errorf("%d rows, %v", rows, err)
	}
}

func TestLedgerThatCannotBeOpened(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pulls.db")
	l := openLedger(t, path, &noon, meter.LedgerOptions{})
	if _, err := meter.OpenLedger(path, meter.LedgerOptions{}); !errors.Is(err, meter.ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Errorf("opened twice: %v", err)
	}
	add(t, l, series(100)...)
	must(t, l.Close())
	must(t, os.Truncate(path, 20_000))
	if _, err := meter.OpenLedger(path, meter.LedgerOptions{}); !errors.Is(err, meter.ErrDamaged) || !strings.Contains(err.Error(), path) {
		t.Errorf("cut: %v", err)
	}
	if _, err := meter.OpenLedger(t.TempDir(), meter.LedgerOptions{}); err == nil || errors.Is(err, meter.ErrDamaged) {
		t.Errorf("a folder: %v", err)
	}
	if _, err := meter.OpenLedger(path, meter.LedgerOptions{MaxPulls: -1}); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("%v", err)
	}
}

func TestLedgerRunEnds(t *testing.T) {
	l := openLedger(t, "", &noon, meter.LedgerOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	cancel()
	must(t, <-done)
	must(t, l.Close())
	if _, err := l.Add(t.Context(), byHand()[:1]); !errors.Is(err, meter.ErrClosed) {
		t.Errorf("%v", err)
	}
}

// TestKeptPulls: the ledger's short form of a pull is the pull.
func TestKeptPulls(t *testing.T) {
	for i, p := range append(byHand(),
		pullOf(noon.Add(123456789*time.Nanosecond)), pullOf(noon, by("t1"), memory(1)),
		pullOf(noon, func(p *accel.Pull) { p.Digest, p.Mode = "", accel.PullFull }),
		pullOf(noon, func(p *accel.Pull) { p.Digest, p.Mode = digest.SHA512.FromString("x"), accel.PullLazy }),
	) {
		for _, known := range [][]string{{""}, {"", p.Image}, {"", p.Node, p.Image, p.Tenant}} {
			if got, err := meter.KeepPull(p, known...); err != nil || !reflect.DeepEqual(got, p) {
				t.Errorf("%d: %+v, %v\nwant %+v", i, got, err, p)
			}
		}
	}
}

// FuzzRows reads rows that were damaged.
func FuzzRows(f *testing.F) {
	p := byHand()[6]
	f.Add([]byte("0123456789abcdef"), meter.EncodePull(&p))
	f.Add([]byte{}, []byte{0x0a, 0x02, 0x21, 0x05})
	f.Fuzz(func(t *testing.T, key, b []byte) {
		if p, err := meter.DecodePull(key, b); err == nil {
			if q, err := meter.DecodePull(key, meter.EncodePull(&p)); err != nil || !q.Start.Equal(p.Start) || q.Image != p.Image || q.Duration != p.Duration {
				t.Errorf("%+v is %+v, %v", p, q, err)
			}
		} else if !errors.Is(err, meter.ErrDamaged) {
			t.Error(err)
		}
		if r, err := meter.DecodeRow(b); err == nil {
			if q, err := meter.DecodeRow(r.Encode()); err != nil || !reflect.DeepEqual(q, r) {
				t.Errorf("%+v is %+v, %v", r, q, err)
			}
		} else if !errors.Is(err, meter.ErrDamaged) {
			t.Error(err)
		}
	})
}
