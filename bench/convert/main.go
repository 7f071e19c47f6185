// Command convert measures conversion of a 1 GB Python image next to the stock
// estargz library and to `gzip -d | gzip`, interleaved, each in a process of its
// own so that CPU time and peak memory are that variant's alone. `make
// bench-convert` runs it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"accel/bench/report"
	"accel/internal/debimage"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// The bars that `make bench-convert` judges by.
const (
	speedUp      = 10.0  // times the stock library at its default
	soonerThan   = 15.0  // seconds
	ofLimit      = 1.3   // times the formula's limit
	largerThan   = 1.06  // times the stock default's output
	peakMemoryMB = 400.0 // also of an 8 GB layer
	memoSeconds  = 1.0   // a second conversion
	timesMB      = 1e6   // bytes
	giantBytes   = 8 << 30
)

// outcome is what one process did.
type outcome struct {
	Seconds float64 // wall, from the layers' first byte to the last
	Bytes   int64   // of output
	Again   float64 // seconds of a second conversion, with the memo
	Rates   rates

	cpu    time.Duration
	peakMB float64
}

func main() {
	if v := os.Getenv("ACCEL_BENCH_VARIANT"); v != "" {
		os.Exit(child(v, os.Args[1]))
	}
	runs := flag.Int("runs", 3, "times each variant runs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, *runs)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, runs int) (err error) {
	dir, err := os.MkdirTemp("", "accel-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	src := filepath.Join(dir, "image")
	sourceBytes, err := image(ctx, src)
	if err != nil {
		return err
	}
	results := map[string][]outcome{}
	for i := range runs {
		for _, v := range variants {
			fmt.Fprintf(os.Stderr, "run %d of %d: %s ... ", i+1, runs, v.name)
			o, err := measure(ctx, v.name, src)
			if err != nil {
				return fmt.Errorf("%s: %w", v.name, err)
			}
			fmt.Fprintf(os.Stderr, "%.1f s\n", o.Seconds)
			results[v.name] = append(results[v.name], o)
		}
	}
	fmt.Fprint(os.Stderr, "one layer of 8 GB ... ")
	giant, err := measure(ctx, "giant", src)
	if err != nil {
		return fmt.Errorf("giant: %w", err)
	}
	fmt.Fprintf(os.Stderr, "%.1f s\n", giant.Seconds)
	return judge(results, giant, sourceBytes)
}

// image writes the benchmark's image as a layout, so that every variant reads
// plain files.
func image(ctx context.Context, dir string) (sourceBytes int64, err error) {
	img, err := debimage.PyApp(ctx, os.Stderr)
	if err != nil {
		return 0, err
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return 0, err
	}
	layers, err := img.Layers()
	if err != nil {
		return 0, err
	}
	for _, l := range layers {
		n, err := l.Size()
		if err != nil {
			return 0, err
		}
		sourceBytes += n
	}
	return sourceBytes, p.AppendImage(img)
}

// measure runs one variant as a process.
func measure(ctx context.Context, variant, src string) (outcome, error) {
	self, err := os.Executable()
	if err != nil {
		return outcome{}, err
	}
	cmd := exec.CommandContext(ctx, self, src)
	cmd.Env = append(os.Environ(), "ACCEL_BENCH_VARIANT="+variant)
	cmd.Stderr = os.Stderr
	raw, err := cmd.Output()
	if err != nil {
		return outcome{}, err
	}
	var o outcome
	if err := json.Unmarshal(raw, &o); err != nil {
		return outcome{}, fmt.Errorf("its answer %q: %w", raw, err)
	}
	usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	o.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	o.peakMB = float64(usage.Maxrss) * 1024 / timesMB
	return o, nil
}

func judge(results map[string][]outcome, giant outcome, sourceBytes int64) error {
	r := report.New("convert")
	of := func(variant string, f func(outcome) float64) float64 { return median(results[variant], f) }
	wall := func(o outcome) float64 { return o.Seconds }
	size := func(o outcome) float64 { return float64(o.Bytes) / timesMB }
	r.Add("source, compressed", float64(sourceBytes)/timesMB, "MB", "")
	for _, v := range variants {
		if v.name == "rates" {
			continue
		}
		r.Add(v.name+": wall", of(v.name, wall), "s", v.note)
		r.Add(v.name+": CPU", of(v.name, func(o outcome) float64 { return o.cpu.Seconds() }), "s", "")
		r.Add(v.name+": peak memory", of(v.name, func(o outcome) float64 { return o.peakMB }), "MB", "resident, of the process")
		r.Add(v.name+": output", of(v.name, size), "MB", "")
	}
	rate := func(f func(rates) float64) float64 {
		return of("rates", func(o outcome) float64 { return f(o.Rates) })
	}
	limit := limit(rates{
		InflateMBs: rate(func(x rates) float64 { return x.InflateMBs }), DeflateMBs: rate(func(x rates) float64 { return x.DeflateMBs }),
		SHA256MBs: rate(func(x rates) float64 { return x.SHA256MBs }), TotalMB: rate(func(x rates) float64 { return x.TotalMB }),
		BiggestMB: rate(func(x rates) float64 { return x.BiggestMB }),
	}, runtime.NumCPU())
	r.Add("rate of one core: inflate", rate(func(x rates) float64 { return x.InflateMBs }), "MB/s", "klauspost, this image, this run")
	r.Add("rate of one core: deflate", rate(func(x rates) float64 { return x.DeflateMBs }), "MB/s", "klauspost, the shipped level and chunks")
	r.Add("rate of one core: SHA-256", rate(func(x rates) float64 { return x.SHA256MBs }), "MB/s", "")
	r.Add("limit by the formula", limit, "s", "max(biggest layer/inflate, total*(1/inflate+1/deflate+3/sha256)/cores) with these rates; reuse of the source's matches goes below it")
	r.AtLeast("speed-up over stock default", of("stock", wall)/of("accel", wall), speedUp, "x", "medians")
	r.Add("speed-up over stock with klauspost", of("stock-klauspost", wall)/of("accel", wall), "x", "medians")
	r.Add("speed-up over gzip -d | gzip", of("gzip", wall)/of("accel", wall), "x", "medians")
	r.AtMost("wall", of("accel", wall), soonerThan, "s", "")
	r.AtMost("wall over the limit", of("accel", wall)/limit, ofLimit, "x", "")
	r.AtMost("output over stock default's", of("accel", size)/of("stock", size), largerThan, "x", "")
	r.AtMost("peak memory", of("accel", func(o outcome) float64 { return o.peakMB }), peakMemoryMB, "MB", "")
	r.AtMost("peak memory, one layer of 8 GB", giant.peakMB, peakMemoryMB, "MB", fmt.Sprintf("%.0f s", giant.Seconds))
	r.AtMost("second conversion, with the memo", of("accel", func(o outcome) float64 { return o.Again }), memoSeconds, "s", "")
	return r.Close()
}

// limit is the least time that the machine's cores need.
func limit(x rates, cores int) float64 {
	return max(x.BiggestMB/x.InflateMBs, x.TotalMB*(1/x.InflateMBs+1/x.DeflateMBs+3/x.SHA256MBs)/float64(cores))
}

func median(outcomes []outcome, f func(outcome) float64) float64 {
	values := make([]float64, 0, len(outcomes))
	for _, o := range outcomes {
		values = append(values, f(o))
	}
	slices.Sort(values)
	return values[len(values)/2]
}
