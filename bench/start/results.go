package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"accel/internal/testbed"
)

// results are all that was measured.
type results struct {
	samples []sample
	memory  []memorySample
}

func (r *results) add(s sample) {
	misses := ""
	if s.Misses > 0 {
		misses = fmt.Sprintf(", %d misses of %.2f s", s.Misses, s.Waited.Seconds())
	}
	fmt.Fprintf(os.Stderr, "pull %.2f s + %.2f s = %.2f s, %.1f MB%s\n", s.Pull.Seconds(), s.Start.Seconds(), s.total().Seconds(), float64(s.FetchedBytes)/megabyte, misses)
	r.samples = append(r.samples, s)
}

// of are the samples of one variant at one rate; those of warm variants count for
// the rate that they ran at.
func (r *results) of(image string, speed testbed.LinkSpeed, variant string) []sample {
	var found []sample
	for _, s := range r.samples {
		if s.Image == image && s.Variant == variant && s.Rate == speed.String() {
			found = append(found, s)
		}
	}
	return found
}

// spread of some runs' figure.
type spread struct{ median, least, most float64 }

func spreadOf(samples []sample, f func(sample) float64) spread {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = f(s)
	}
	slices.Sort(values)
	return spread{values[len(values)/2], values[0], values[len(values)-1]}
}

func totalSeconds(s sample) float64 { return s.total().Seconds() }
func fetchedMB(s sample) float64    { return float64(s.FetchedBytes) / megabyte }
func seconds(f func(sample) time.Duration) func(sample) float64 {
	return func(s sample) float64 { return f(s).Seconds() }
}

// note says of some runs what their median total does not.
func note(samples []sample, how string) string {
	total := spreadOf(samples, totalSeconds)
	pull := spreadOf(samples, seconds(func(s sample) time.Duration { return s.Pull }))
	start := spreadOf(samples, seconds(func(s sample) time.Duration { return s.Start }))
	cpu := spreadOf(samples, seconds(func(s sample) time.Duration { return s.DaemonCPU }))
	misses := spreadOf(samples, func(s sample) float64 { return float64(s.Misses) })
	if misses.most > 0 {
		how = fmt.Sprintf("%.0f misses; %s", misses.median, how)
	}
	return fmt.Sprintf("%.2f-%.2f in %d runs; pull %.2f, then %.2f; %.1f MB fetched; daemons' CPU %.2f s; %s",
		total.least, total.most, len(samples), pull.median, start.median, spreadOf(samples, fetchedMB).median, cpu.median, how)
}

// write keeps every single run in bench/out/start-runs.jsonl, beside the report's
// medians.
func (r *results) write() error {
	if err := os.MkdirAll(filepath.Join("bench", "out"), 0o755); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join("bench", "out", "start-runs.jsonl"))
	if err != nil {
		return err
	}
	enc := json.NewEncoder(f)
	for _, s := range r.samples {
		err := enc.Encode(map[string]any{
			"image": s.Image, "variant": s.Variant, "rate": s.Rate, "pullSeconds": s.Pull.Seconds(), "startSeconds": s.Start.Seconds(),
			"totalSeconds": s.total().Seconds(), "fetchedBytes": s.FetchedBytes, "daemonCpuSeconds": s.DaemonCPU.Seconds(), "misses": s.Misses, "waitedSeconds": s.Waited.Seconds(),
		})
		if err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}
