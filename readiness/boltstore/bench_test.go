package boltstore_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"accel"
	"accel/readiness"
	"accel/readiness/boltstore"

	"github.com/opencontainers/go-digest"
)

// BenchmarkPush64: 64 senders push different images, each waiting for its answer.
func BenchmarkPush64(b *testing.B) {
	tr := readiness.New(open(b, filepath.Join(b.TempDir(), "records.db")), readiness.Options{})
	const senders = 64
	var next atomic.Int64
	times := make([][]time.Duration, senders)
	var wg sync.WaitGroup
	b.ResetTimer()
	for sender := range senders {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				ev := pushEvent(fmt.Sprint("t", i), digest.FromString(fmt.Sprint(i)))
				ev.Repository = fmt.Sprint("team", i%50, "/app", i%7)
				start := time.Now()
				if _, err := tr.Push(b.Context(), ev); err != nil {
					b.Error(err)
					return
				}
				times[sender] = append(times[sender], time.Since(start))
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	all := slices.Concat(times...)
	slices.Sort(all)
	b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "pushes/s")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, "p99-ms")
}

// BenchmarkPush1: one sender alone.
func BenchmarkPush1(b *testing.B) {
	tr := readiness.New(open(b, filepath.Join(b.TempDir(), "records.db")), readiness.Options{})
	for i := 0; b.Loop(); i++ {
		if _, err := tr.Push(b.Context(), pushEvent(fmt.Sprint("t", i), digest.FromString(fmt.Sprint(i)))); err != nil {
			b.Fatal(err)
		}
	}
}

const many = 100_000

func nthReference(i int) accel.Reference {
	return accel.Reference{Registry: "registry.example", Repository: fmt.Sprintf("team%d/application%d", i%50, i%7), Tag: fmt.Sprint("v1.", i), Digest: digest.FromString(fmt.Sprint(i))}
}

// manyRecords makes a store with 100,000 Ready records as a year of pushes leaves them.
func manyRecords(b *testing.B) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "records.db")
	s, err := boltstore.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	tr := readiness.New(s, readiness.Options{Params: "esgz-1-6-4194304"})
	for at := 0; at < many; at += 1000 {
		evs := make([]accel.PushEvent, 1000)
		for i := range evs {
			r := nthReference(at + i)
			evs[i] = accel.PushEvent{Source: "harbor-main", Registry: r.Registry, Repository: r.Repository, Tag: r.Tag, Digest: r.Digest, MediaType: "application/vnd.oci.image.index.v1+json", OccurredAt: time.Now()}
		}
		recs, err := tr.Push(b.Context(), evs...)
		if err != nil {
			b.Fatal(err)
		}
		err = s.Update(b.Context(), func(tx readiness.Tx) error { // Finish one by one would take minutes
			for i := range recs {
				e, err := tx.Get(recs[i].ID)
				if err != nil {
					return err
				}
				e.State, e.Folded, e.DueAt = accel.Ready, true, time.Now().Add(time.Hour)
				e.Children = []digest.Digest{digest.FromString(e.ID + "amd64"), digest.FromString(e.ID + "arm64")}
				e.Target = accel.Target{Repository: e.Repository, Digest: digest.FromString(e.ID), Tags: []string{e.Tags[0] + "-esgz"}}
				e.Result = accel.Result{SourceBytes: 1 << 28, TargetBytes: 1 << 28, UncompressedBytes: 1 << 30, Queued: 1e7, Convert: 1e10, Push: 1e9, Verify: 1e8, Total: 11e9, Platforms: []string{"linux/amd64", "linux/arm64"}}
				if err := tx.Put(e); err != nil {
					return err
				}
				for _, child := range e.Children {
					if err := tx.PutMapping(e.ID, child, make([]byte, 2000)); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	return path
}

// BenchmarkFind: readiness reads by tag and by digest among 100,000 records.
func BenchmarkFind(b *testing.B) {
	tr := readiness.New(open(b, manyRecords(b)), readiness.Options{Params: "esgz-1-6-4194304"})
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			ref := nthReference(rand.IntN(many))
			if rand.IntN(2) == 0 {
				ref.Digest = ""
			}
			if _, err := tr.Find(b.Context(), ref); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reads/s")
}

// BenchmarkOpen100k: another process opens a store of 100,000 records, says what memory it
// has then, reads every record once, and says it again.
func BenchmarkOpen100k(b *testing.B) {
	path := manyRecords(b)
	info, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		cmd := role(b.Context(), "resident", path, "")
		out, err := cmd.Output()
		if err != nil {
			b.Fatal(err)
		}
		for field := range strings.FieldsSeq(string(out)) {
			name, value, _ := strings.Cut(field, "=")
			var v float64
			if _, err := fmt.Sscan(value, &v); err != nil {
				b.Fatalf("%q: %v", field, err)
			}
			b.ReportMetric(v, name)
		}
	}
	b.ReportMetric(float64(info.Size())/(1<<20), "file-MiB")
}

func beResident(path string) {
	start := time.Now()
	s, err := boltstore.Open(path)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	tr := readiness.New(s, readiness.Options{Params: "esgz-1-6-4194304"})
	if _, err := tr.Counts(ctx); err != nil {
		panic(err)
	}
	opened := time.Since(start)
	after := resident()
	for _, i := range rand.Perm(many) {
		ref := nthReference(i)
		ref.Digest = ""
		if _, err := tr.Find(ctx, ref); err != nil {
			panic(err)
		}
	}
	fmt.Printf("open-ms=%.2f open-rss-MiB=%.1f read-rss-MiB=%.1f\n", float64(opened.Microseconds())/1000, after, resident())
}

// resident is the process's resident memory in MiB, the mapped file's pages included.
func resident() float64 {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		panic(err)
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		var kib float64
		if _, err := fmt.Sscanf(sc.Text(), "VmRSS: %f kB", &kib); err == nil {
			return kib / 1024
		}
	}
	return 0
}
