package convert

import (
	"context"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// benchTar is a tree of the make-up of a Python image: most files small, most
// bytes in large ones, three quarters of them compressing well. With
// ACCEL_BENCH_TAR it is that file instead.
func benchTar(b *testing.B) []byte {
	if p := os.Getenv("ACCEL_BENCH_TAR"); p != "" {
		raw, err := os.ReadFile(p)
		must(err)
		return raw
	}
	r := rand.New(rand.NewPCG(1, 2))
	var entries []tarEntry
	for i, total := 0, 0; total < 64<<20; i++ {
		n := 200 << r.IntN(9) // to 50 KiB
		if i%100 == 0 {
			n = 1 << (17 + r.IntN(6)) // to 4 MiB
		}
		content := text(n, uint64(i))
		if i%4 == 0 {
			content = noise(n, uint64(i))
		}
		entries = append(entries, file(fmt.Sprintf("d%d/f%d", i/50, i), content))
		total += n
	}
	return tarOf(entries...)
}

// BenchmarkLayer compares one layer's conversion with the stock library's, at
// its default and at klauspost's level. Bytes are the tar's; %stock is the size
// of the output in hundredths of the stock default's.
func BenchmarkLayer(b *testing.B) {
	src := benchTar(b)
	blob := gz(src)
	stock := float64(len(stockBuildB(b, blob)))
	b.Run("ours", func(b *testing.B) {
		measured(b, src, stock, func() int64 { return convertOnce(b, src, blob, Params{}) })
	})
	b.Run("stock", func(b *testing.B) {
		measured(b, src, stock, func() int64 { return int64(len(stockBuildB(b, blob))) })
	})
	b.Run("stock-klauspost-6", func(b *testing.B) {
		measured(b, src, stock, func() int64 { return int64(len(stockBuildB(b, blob, estargz.WithCompression(klauspost{})))) })
	})
}

// BenchmarkParams is what the defaults were chosen by.
func BenchmarkParams(b *testing.B) {
	src := benchTar(b)
	blob := gz(src)
	stock := float64(len(stockBuildB(b, blob)))
	for _, chunk := range []int64{128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20} {
		for _, level := range []int{3, 5, 6} {
			b.Run(fmt.Sprintf("chunk=%dKiB/level=%d", chunk>>10, level), func(b *testing.B) {
				measured(b, src, stock, func() int64 {
					return convertOnce(b, src, blob, Params{ChunkBytes: chunk, Level: level})
				})
			})
		}
	}
}

// cpu is the process's time on all cores so far, which other work on the machine
// disturbs less than the wall's.
func cpu() time.Duration {
	var r unix.Rusage
	must(unix.Getrusage(unix.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// measured runs f in b's loop and reports what it took and made.
func measured(b *testing.B, src []byte, stock float64, f func() int64) {
	b.SetBytes(int64(len(src)))
	before := cpu()
	var n int64
	for b.Loop() {
		n = f()
	}
	b.ReportMetric((cpu()-before).Seconds()/float64(b.N), "cpu-s/op")
	b.ReportMetric(float64(n)/1e6, "MB-out")
	b.ReportMetric(100*float64(n)/stock, "%stock")
}

func convertOnce(b *testing.B, src, blob []byte, p Params) int64 {
	workers, _ := strconv.Atoi(os.Getenv("ACCEL_BENCH_WORKERS"))
	c := &Converter{TempDir: b.TempDir(), Params: p, Workers: workers, Policy: Policy{MaxUncompressedBytes: 1 << 40}}
	res, err := c.Convert(context.Background(), Source{Image: imageOf(b, layerOf(blob, src))}, Options{})
	must(err)
	defer res.Close()
	return res.Stats.TargetBytes
}

func stockBuildB(b *testing.B, blob []byte, o ...estargz.Option) []byte {
	b.Helper()
	z, err := estargz.Build(section(blob), o...)
	must(err)
	out, err := io.ReadAll(z)
	must(err)
	must(z.Close())
	return out
}

// klauspost is the stock library's gzip with the fast compressor.
type klauspost struct{ *estargz.GzipDecompressor }

func (klauspost) Writer(w io.Writer) (estargz.WriteFlushCloser, error) {
	return gzip.NewWriterLevel(w, 6)
}

func (klauspost) WriteTOCAndFooter(w io.Writer, off int64, toc *estargz.JTOC, h hash.Hash) (digest.Digest, error) {
	return estargz.NewGzipCompressorWithLevel(6).WriteTOCAndFooter(w, off, toc, h)
}
