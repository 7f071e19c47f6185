package fleet_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"accel"
	"accel/fleet"
)

// BenchmarkOpen200k: a file with as many warms as the default bounds allow.
func BenchmarkOpen200k(b *testing.B) {
	path := filepath.Join(b.TempDir(), "fleet.db")
	f, err := fleet.Open(path, fleet.Options{Rules: everything(), CatchUp: time.Hour})
	must(b, err)
	const nodes, images = 1000, 200
	for i := range nodes {
		_, err := f.Seen(b.Context(), node(fmt.Sprint("node-", i)))
		must(b, err)
	}
	begin := time.Now()
	for i := range images {
		must(b, f.Ready(b.Context(), accel.Record{Repository: repository, Digest: source(fmt.Sprint(i)), Tags: []string{fmt.Sprint(i)}, State: accel.Ready, UpdatedAt: time.Now()}))
	}
	b.ReportMetric(float64(time.Since(begin).Milliseconds())/images, "ms/ready-of-1000-nodes")
	must(b, f.Close())
	info, err := os.Stat(path)
	must(b, err)
	b.ResetTimer()
	for b.Loop() {
		f, err := fleet.Open(path, fleet.Options{})
		must(b, err)
		must(b, f.Close())
	}
	b.ReportMetric(float64(info.Size())/(1<<20), "file-MiB")
}

// BenchmarkHeartbeat64: nodes that have nothing new to tell.
func BenchmarkHeartbeat64(b *testing.B) {
	f, err := fleet.Open(filepath.Join(b.TempDir(), "fleet.db"), fleet.Options{})
	must(b, err)
	defer f.Close()
	var at atomic.Int64
	b.SetParallelism(64)
	b.RunParallel(func(pb *testing.PB) {
		n := node(fmt.Sprint("node-", at.Add(1)))
		for pb.Next() {
			if _, err := f.Seen(b.Context(), n); err != nil {
				b.Error(err)
			}
		}
	})
}

// BenchmarkReport64: nodes that report at once.
func BenchmarkReport64(b *testing.B) {
	f, err := fleet.Open(filepath.Join(b.TempDir(), "fleet.db"), fleet.Options{})
	must(b, err)
	defer f.Close()
	var at atomic.Int64
	b.SetParallelism(64)
	b.RunParallel(func(pb *testing.PB) {
		name := fmt.Sprint("node-", at.Add(1))
		_, err := f.Seen(b.Context(), node(name))
		must(b, err)
		all, err := f.Want(b.Context(), accel.Reference{Registry: "registry.test", Repository: "x", Tag: "v1"}, []string{name})
		must(b, err)
		w := all[0]
		w.State = accel.WarmFetching
		for pb.Next() {
			w.FetchedBytes++
			if _, err := f.Report(b.Context(), w); err != nil {
				b.Error(err)
			}
		}
	})
}
