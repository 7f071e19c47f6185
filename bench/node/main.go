// Command node measures the node's mirror as a process: many clients pull one
// large image at once through a cold mirror, through a warm one, and straight from
// the same registry, interleaved. Registry, node and clients are processes of their
// own. And the node's index: its size for each part of a blob, and the start
// over a million of them. `make bench-node` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"

	"accel/bench/report"
)

// The bars that `make bench-node` judges by.
const (
	upstreamBytes = 1.02 // of the image, delivered by the registry to a cold mirror
	coldSpeed     = 0.8  // of the bare registry's throughput
	warmSpeed     = 1.0
	anonymousMB   = 150.0
	startSeconds  = 2.0 // with a million parts indexed
	megabyte      = 1e6
)

func main() {
	if p := os.Getenv(partVariable); p != "" {
		if err := playPart(p); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", p+":", err)
			os.Exit(1)
		}
		return
	}
	var s setting
	flag.IntVar(&s.runs, "runs", 3, "times each variant runs")
	flag.IntVar(&s.pulls, "pulls", 100, "pulls at a time")
	flag.Int64Var(&s.imageBytes, "image-mb", 300, "size of the image")
	flag.BoolVar(&s.nodeCredential, "node-credential", false, "the node has the credential, and the clients none; else each client has its own")
	flag.Parse()
	s.imageBytes *= megabyte
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, s)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// setting is what is measured.
type setting struct {
	runs, pulls    int
	imageBytes     int64
	nodeCredential bool
	dir            string
}

func run(ctx context.Context, s setting) (err error) {
	if s.dir, err = os.MkdirTemp("", "accel-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(s.dir)) }()
	r := report.New("node")
	if err := throughput(ctx, s, r); err != nil {
		return err
	}
	if err := index(ctx, s, r); err != nil {
		return err
	}
	return r.Close()
}

// outcome is one variant's run.
type outcome struct {
	Seconds float64 // from the first request to the last byte of the last client
	Bytes   int64   // that the clients were given
	memory  memory  // of the node
	sent    int64   // by the registry
}

func (o outcome) megabytesPerSecond() float64 { return float64(o.Bytes) / megabyte / o.Seconds }

func throughput(ctx context.Context, s setting, r *report.Report) (err error) {
	reg, err := startRegistry(ctx, s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.end()) }()
	size, err := pushImage(reg.host, s.imageBytes)
	if err != nil {
		return err
	}
	var bare, cold, warm []outcome
	for i := range s.runs {
		fmt.Fprintf(os.Stderr, "run %d of %d: ", i+1, s.runs)
		b, err := reg.pullAll(ctx, s, reg.host, true)
		if err != nil {
			return fmt.Errorf("bare registry: %w", err)
		}
		c, w, err := throughNode(ctx, s, reg)
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "bare %.1f s, cold %.1f s, warm %.1f s\n", b.Seconds, c.Seconds, w.Seconds)
		bare, cold, warm = append(bare, b), append(cold, c), append(warm, w)
	}
	judge(r, s, size, bare, cold, warm)
	return nil
}

func judge(r *report.Report, s setting, imageBytes int64, bare, cold, warm []outcome) {
	whose := "credentials of the clients"
	if s.nodeCredential {
		whose = "credential of the node"
	}
	how := fmt.Sprintf("%d pulls at once of %d MB, %s; median of %d runs", s.pulls, imageBytes/megabyte, whose, s.runs)
	speed := outcome.megabytesPerSecond
	upstream := func(o outcome) float64 { return float64(o.sent) / float64(imageBytes) }
	r.AtMost("bytes from the registry, cold", most(cold, upstream), upstreamBytes, "x image", "most of all runs")
	r.Add("bytes from the registry, warm", most(warm, upstream), "x image", "most of all runs")
	r.Add("bare registry", median(bare, speed), "MB/s", how)
	r.Add("cold mirror", median(cold, speed), "MB/s", "")
	r.Add("warm mirror", median(warm, speed), "MB/s", "")
	r.AtLeast("cold mirror against registry", ratio(cold, bare), coldSpeed, "x", "median of each run's ratio")
	r.AtLeast("warm mirror against registry", ratio(warm, bare), warmSpeed, "x", "median of each run's ratio")
	both := slices.Concat(cold, warm)
	r.AtMost("anonymous resident memory", most(both, func(o outcome) float64 { return o.memory.anonymous }), anonymousMB, "MB", "most of all runs, sampled")
	r.Add("mapped pages of the index", most(both, func(o outcome) float64 { return o.memory.index }), "MB", "resident, of *.db; most of all runs")
}

func most(os []outcome, f func(outcome) float64) float64 {
	highest := f(os[0])
	for _, o := range os {
		highest = max(highest, f(o))
	}
	return highest
}

func median(os []outcome, f func(outcome) float64) float64 {
	values := make([]float64, len(os))
	for i, o := range os {
		values[i] = f(o)
	}
	return middle(values)
}

// ratio is the median of throughputs against those of the same runs.
func ratio(os, against []outcome) float64 {
	values := make([]float64, len(os))
	for i, o := range os {
		values[i] = o.megabytesPerSecond() / against[i].megabytesPerSecond()
	}
	return middle(values)
}

func middle(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
