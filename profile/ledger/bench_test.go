package ledger_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"accel"
	"accel/profile"
	"accel/profile/ledger"

	"github.com/opencontainers/go-digest"
)

// BenchmarkReport takes in reports of 2,000 parts, of a start that reads nearly the same each
// time: until the sample is full, and beyond.
func BenchmarkReport(b *testing.B) {
	l, err := ledger.Open(filepath.Join(b.TempDir(), "profiles.db"), ledger.Options{})
	must(b, err)
	defer l.Close()
	must(b, l.Learn(b.Context(), manifest("a"), imageOf("a"), layers, ledger.Given{Predicted: []accel.ProfileItem{}}))
	rnd := rand.New(rand.NewPCG(1, 2))
	start := func() (list []accel.ProfileItem) {
		for f := range 2000 {
			if rnd.IntN(20) > 0 {
				name := fmt.Sprintf("usr/lib/python3/dist-packages/package%d/module%d.py", f%40, f)
				list = append(list, accel.ProfileItem{Layer: f % layers, Path: name, Bytes: 4096 * (1 + int64(f%7)), Content: accel.ContentIDOf(digest.FromString(name))})
			}
		}
		return list
	}
	b.ResetTimer()
	for n := range b.N {
		b.StopTimer()
		r := report("a", n, fmt.Sprint("node", n), start())
		b.StartTimer()
		_, err := l.Report(b.Context(), r)
		must(b, err)
	}
	b.StopTimer()
	u, err := l.Usage(b.Context())
	must(b, err)
	b.ReportMetric(float64(u.Bytes), "bytes-kept")
	encoded, _, err := l.Profile(b.Context(), manifest("a"))
	must(b, err)
	b.ReportMetric(float64(len(profile.Pack(encoded))), "bytes-packed")
}
