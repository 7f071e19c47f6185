package meter_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"accel"
	"accel/meter"
)

// A busy fleet: 100,000 pulls a day of 500 images by 20 tenants on 200 nodes. Images are pulled as often as Zipf's
// law says; four of five pulls of one are its own tenant's.
const (
	benchImages, benchTenants, benchNodes = 500, 20, 200
	benchPulls                            = 100_000
)

// BenchmarkYear fills a ledger with a year of a busy fleet and asks for usage. The days' roll-ups are made as Add
// makes them, but written a day at a time; the last days come by Add, as single pulls. It fills 60 days in about a minute
// and says what the sums of a year would take; ACCEL_BENCH_DAYS=365 fills the whole year, in 9. ACCEL_BENCH_SINGLES=20 keeps the
// 2,000,000 single pulls of the default, and ACCEL_BENCH_DETAIL=400 folds nothing.
func BenchmarkYear(b *testing.B) {
	days, detail, singles := 60, 7, 1
	for name, n := range map[string]*int{"ACCEL_BENCH_DAYS": &days, "ACCEL_BENCH_DETAIL": &detail, "ACCEL_BENCH_SINGLES": &singles} {
		if s := os.Getenv(name); s != "" {
			var err error
			*n, err = strconv.Atoi(s)
			must(b, err)
		}
	}
	path := filepath.Join(b.TempDir(), "ledger.db")
	first := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	now := first
	l := openLedger(b, path, &now, meter.LedgerOptions{KeepDetail: time.Duration(detail) * 24 * time.Hour})
	r := rand.New(rand.NewPCG(1, 2))
	began := time.Now()
	kinds := make([]*meter.Day, 7) // a week's days, which come again each week
	for i := range kinds {
		var err error
		kinds[i], err = meter.DayOf(fleetDay(r, first.AddDate(0, 0, i)))
		must(b, err)
	}
	for day := range days {
		at := first.AddDate(0, 0, day)
		now = at.AddDate(0, 0, 1)
		if day < days-singles {
			must(b, l.PutDay(at, kinds[day%len(kinds)]))
		} else {
			batch := make([]accel.Pull, 0, 500)
			for p := range fleetDay(r, at) {
				if batch = append(batch, p); len(batch) == cap(batch) {
					add(b, l, batch...)
					batch = batch[:0]
				}
			}
		}
		must(b, l.Prune(b.Context()))
	}
	b.Logf("%d days filled in %s", days, time.Since(began).Round(time.Second))
	info, err := os.Stat(path)
	must(b, err)
	rows, err := l.Sizes()
	must(b, err)
	b.Logf("file %d MB: %v", info.Size()>>20, rows)
	if folded := days - detail - 1; folded > 0 {
		grows := rows["folded"][1] + rows["months"][1]
		b.Logf("sums of a year: %d MB", rows["rollups"][1]+rows["baseline"][1]+grows*365/folded)
	}
	year := first.AddDate(0, 0, days)
	for name, q := range map[string]meter.Query{
		"image": {By: meter.ByImage}, "tenant": {By: meter.ByTenant}, "node": {By: meter.ByNode}, "day": {By: meter.ByDay},
		"image-of-tenant": {By: meter.ByImage, Tenant: "tenant-1"}, "day-of-image": {By: meter.ByDay, Image: benchImage(0)},
		"month": {By: meter.ByImage, From: year.AddDate(0, -3, 0), To: year.AddDate(0, -2, 0)},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				u := usage(b, l, q)
				b.ReportMetric(float64(u.Total.Pulls), "pulls")
			}
			b.ReportMetric(float64(info.Size()), "file-bytes")
		})
	}
}

func benchImage(i int) string {
	return fmt.Sprintf("registry.example.com/team-%d/app-%d:v1", i%benchTenants, i)
}

// fleetDay are the pulls of a day.
func fleetDay(r *rand.Rand, day time.Time) func(yield func(accel.Pull) bool) {
	zipf := rand.NewZipf(r, 1.1, 10, benchImages-1)
	return func(yield func(accel.Pull) bool) {
		for i := range benchPulls {
			image := int(zipf.Uint64())
			tenant := image % benchTenants
			if r.IntN(5) == 0 {
				tenant = r.IntN(benchTenants)
			}
			p := pullOf(day.Add(time.Duration(i)*(24*time.Hour-time.Second)/benchPulls).Truncate(time.Millisecond),
				of(benchImage(image)), by(name("tenant-", tenant)), on(fmt.Sprintf("node-%d.example.com", r.IntN(benchNodes))), memory(int64(r.IntN(4))<<30))
			size := int64(50e6 + image*1e6)
			p.RegistryBytes, p.Duration = size, time.Duration(float64(size)/20e6*(0.5+r.ExpFloat64())*1e9)
			switch x := r.IntN(20); {
			case x < 12:
				p.Outcome, p.RegistryBytes, p.CacheBytes, p.Duration = accel.OutcomeHit, 0, size, p.Duration/10
			case x < 15:
				p.Outcome, p.RegistryBytes, p.CacheBytes = accel.OutcomePartial, size/3, size-size/3
			case x == 15:
				p.Outcome, p.RegistryBytes = accel.OutcomeError, size/4
			}
			if !yield(p) {
				return
			}
		}
	}
}
