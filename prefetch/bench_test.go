package prefetch

import (
	"bufio"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"accel/internal/deflate"
)

// benchLatency is the time to an answer.
const benchLatency = 10 * time.Millisecond

// benchLinks: on the narrow one inflating is no part of the time, so that it shows the scheduling alone; a stream of
// the far one is bound by its latency to 32 MB/s at most.
var benchLinks = []struct {
	name           string
	bytesPerSecond float64
	single         time.Duration
}{{"1Gbit", 125e6, 0}, {"200Mbit", 25e6, 0}, {"far", 125e6, 2 * time.Millisecond}}

// benchLayers are an image: files of all sizes, 256 KiB chunks at most, and one layer of many small files.
var benchLayers = sync.OnceValue(func() (layers []*fixture) {
	r := random(1)
	t := new(testing.B)
	for _, s := range []shape{
		{members: 600, most: 256 << 10},
		{members: 8000, most: 8 << 10},
		{members: 500, most: 256 << 10, together: 2},
	} {
		layers = append(layers, build(t, r, s))
	}
	return layers
})

// BenchmarkReadAll is a program that reads everything of an image of about 110 MB compressed, beside a pull of its
// layers all at once, which downloads, inflates and checks. x-pull is the time as a multiple of the pull's.
func BenchmarkReadAll(b *testing.B) {
	layers := benchLayers()
	for _, link := range benchLinks {
		for _, how := range []string{"in-order", "by-layer", "any-order", "nobody", "hot"} {
			b.Run(link.name+"/"+how, func(b *testing.B) {
				var full, ours time.Duration
				for b.Loop() {
					full += pull(b, layers, link.bytesPerSecond, link.single)
					ours += readAll(b, layers, link.bytesPerSecond, link.single, how)
				}
				b.ReportMetric(ours.Seconds()/float64(b.N), "s/ours")
				b.ReportMetric(full.Seconds()/float64(b.N), "s/pull")
				b.ReportMetric(ours.Seconds()/full.Seconds(), "x-pull")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

func pull(b *testing.B, layers []*fixture, bytesPerSecond float64, single time.Duration) time.Duration {
	link := &shaper{bytesPerSecond: bytesPerSecond}
	began := time.Now()
	var wg sync.WaitGroup
	for _, fx := range layers {
		wg.Go(func() {
			r := &registry{blob: fx.blob, latency: benchLatency, link: link, single: single}
			body, err := r.Range(context.Background(), 0, -1)
			if err == nil {
				// A pull checks the blob's digest, inflates it and checks that digest.
				blob, content := sha256.New(), sha256.New()
				_, err = io.CopyBuffer(struct{ io.Writer }{content},
					deflate.NewReader(bufio.NewReaderSize(io.TeeReader(body, blob), 64<<10)), make([]byte, 1<<20))
				body.Close()
			}
			if err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	return time.Since(began)
}

func readAll(b *testing.B, layers []*fixture, bytesPerSecond float64, single time.Duration, how string) time.Duration {
	link := &shaper{bytesPerSecond: bytesPerSecond}
	o := Options{}
	if how == "hot" {
		o = noBackground
	}
	f := start(b, o)
	began := time.Now()
	var pieces []Piece
	var memories []*memory
	for _, fx := range layers {
		m, _, _ := f.add(fx, func(l *Layer) {
			r := l.Source.(*registry)
			r.latency, r.link, r.single = benchLatency, link, single
		})
		memories = append(memories, m)
		pieces = append(pieces, Piece{fx.digest, 0, len(fx.chunks)})
	}
	var wg sync.WaitGroup
	switch how {
	case "hot":
		if err := f.Hot(context.Background(), pieces); err != nil {
			b.Fatal(err)
		}
	case "in-order": // one program, one layer after the other
		for k, fx := range layers {
			readOrder(b, f, fx, memories[k], nil)
		}
	case "by-layer": // one program for each layer
		for k, fx := range layers {
			wg.Go(func() { readOrder(b, f, fx, memories[k], nil) })
		}
	case "any-order":
		for k, fx := range layers {
			r := rand.New(rand.NewPCG(uint64(k), 1))
			wg.Go(func() { readOrder(b, f, fx, memories[k], r.Perm(len(fx.chunks))) })
		}
	}
	wg.Wait()
	if how == "nobody" || how == "hot" {
		for k := range layers {
			eventually(b, "complete", func() bool { return memories[k].Left() == 0 })
		}
	}
	took := time.Since(began)
	if testing.Verbose() {
		for _, fx := range layers {
			b.Logf("%+v", f.Stats(fx.digest))
		}
	}
	f.stop()
	return took
}

// readOrder reads a layer as the mounts do: what is there is not asked for.
func readOrder(b *testing.B, f *bed, fx *fixture, m *memory, order []int) {
	for k := range fx.chunks {
		i := k
		if order != nil {
			i = order[k]
		}
		if m.Has(i) {
			continue
		}
		if err := f.Fill(context.Background(), fx.digest, i, 1); err != nil {
			b.Error(err)
			return
		}
	}
}

// BenchmarkAdd is what it costs to know a layer of 31,000 files.
func BenchmarkAdd(b *testing.B) {
	fx := build(b, random(1), shape{members: 31_000, most: 1000})
	f, err := New(Options{Log: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	m := fx.memory()
	b.ReportAllocs()
	for b.Loop() {
		if err := f.Add(Layer{Content: m, Source: &registry{}}); err != nil {
			b.Fatal(err)
		}
		f.Remove(fx.digest)
	}
}

// BenchmarkSmallFiles is the cost of one small file that the background brings from memory.
func BenchmarkSmallFiles(b *testing.B) {
	fx := build(b, random(1), shape{members: 31_000, most: 1000})
	for b.Loop() {
		f := start(b, Options{})
		_, _, done := f.add(fx, nil)
		<-done
		f.stop()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/31_000, "ns/file")
}
