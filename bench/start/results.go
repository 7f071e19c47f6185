package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"accel/internal/testbed"
	"accel/profile"
)

// runsFile has every single run, beside the report's medians.
var runsFile = filepath.Join("bench", "out", "start-runs.jsonl")

// results are all that was measured, and all that the documents are made of.
type results struct {
	about   about
	hot     []hotSet
	samples []sample
	memory  []memorySample
	// foretold are the last measured of each image.
	foretold []foretold
}

// foretold is how much of what a start was recorded to read its prediction names.
type foretold struct {
	Image string        `json:"image"`
	Cover profile.Cover `json:"cover"`
}

// line is one of runsFile: one of these.
type line struct {
	About  *about        `json:"about,omitempty"`
	Hot    *hotSet       `json:"hot,omitempty"`
	Run    *sample       `json:"run,omitempty"`
	Memory *memorySample `json:"memory,omitempty"`
	Cover  *foretold     `json:"foretold,omitempty"`
}

func (r *results) add(s sample) {
	told := ""
	if s.AheadBytes > 0 {
		told = fmt.Sprintf(", %.1f MB ahead", float64(s.AheadBytes)/megabyte)
	}
	if s.Misses > 0 {
		told += fmt.Sprintf(", %d misses of %.2f s", s.Misses, s.WaitedSeconds)
	}
	fmt.Fprintf(os.Stderr, "pull %.2f s + %.2f s = %.2f s, %.1f MB, CPU %.2f s of %.2f s%s\n",
		s.PullSeconds, s.StartSeconds, s.total(), fetchedMB(s), s.DaemonCPUSeconds, s.MachineCPUSeconds, told)
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
	middle := len(values) / 2
	median := values[middle]
	if len(values)%2 == 0 {
		median = (values[middle-1] + values[middle]) / 2
	}
	return spread{median, values[0], values[len(values)-1]}
}

func totalSeconds(s sample) float64 { return s.total() }
func pullSeconds(s sample) float64  { return s.PullSeconds }
func startSeconds(s sample) float64 { return s.StartSeconds }
func fetchedMB(s sample) float64    { return float64(s.FetchedBytes) / megabyte }
func misses(s sample) float64       { return float64(s.Misses) }
func daemonCPU(s sample) float64    { return s.DaemonCPUSeconds }
func wholeCPU(s sample) float64     { return s.MachineCPUSeconds }

// note says of some runs what their median total does not.
func note(samples []sample, how string) string {
	total := spreadOf(samples, totalSeconds)
	if m := spreadOf(samples, misses); m.most > 0 {
		how = fmt.Sprintf("%.0f misses; %s", m.median, how)
	}
	return fmt.Sprintf("%.2f-%.2f in %d runs; pull %.2f, then %.2f; %.1f MB fetched; daemons' CPU %.2f s; %s",
		total.least, total.most, len(samples), spreadOf(samples, pullSeconds).median, spreadOf(samples, startSeconds).median,
		spreadOf(samples, fetchedMB).median, spreadOf(samples, daemonCPU).median, how)
}

// write keeps everything in runsFile.
func (r *results) write() error {
	lines := make([]line, 0, 1+len(r.hot)+len(r.samples)+len(r.memory)+len(r.foretold))
	lines = append(lines, line{About: &r.about})
	for i := range r.hot {
		lines = append(lines, line{Hot: &r.hot[i]})
	}
	for i := range r.samples {
		lines = append(lines, line{Run: &r.samples[i]})
	}
	for i := range r.memory {
		lines = append(lines, line{Memory: &r.memory[i]})
	}
	for i := range r.foretold {
		lines = append(lines, line{Cover: &r.foretold[i]})
	}
	if err := os.MkdirAll(filepath.Dir(runsFile), 0o755); err != nil {
		return err
	}
	f, err := os.Create(runsFile)
	if err != nil {
		return err
	}
	enc := json.NewEncoder(f)
	for _, l := range lines {
		if err := enc.Encode(l); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}

// read takes in what write wrote; of several files, one after the other.
func (r *results) read(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() // read only
	in := bufio.NewScanner(f)
	for n := 1; in.Scan(); n++ {
		var l line
		if err := json.Unmarshal(in.Bytes(), &l); err != nil {
			return fmt.Errorf("%s:%d: %w", path, n, err)
		}
		switch {
		case l.About != nil:
			r.about.join(*l.About)
		case l.Hot != nil:
			r.hot = append(r.hot, *l.Hot)
		case l.Run != nil:
			r.samples = append(r.samples, *l.Run)
		case l.Memory != nil:
			r.memory = append(r.memory, *l.Memory)
		case l.Cover != nil:
			r.foretold = append(r.foretold, *l.Cover)
		default:
			return fmt.Errorf("%s:%d: neither a run nor anything else of this program", path, n)
		}
	}
	return in.Err()
}

// hotOf is what an image's start was recorded to read.
func (r *results) hotOf(image string) (hotSet, bool) {
	i := slices.IndexFunc(r.hot, func(h hotSet) bool { return h.Image == image })
	if i < 0 {
		return hotSet{}, false
	}
	return r.hot[i], true
}

// foretoldOf is what was foretold of an image's start when that was measured last.
func (r *results) foretoldOf(image string) (profile.Cover, bool) {
	for _, f := range slices.Backward(r.foretold) {
		if f.Image == image {
			return f.Cover, true
		}
	}
	return profile.Cover{}, false
}

// images are those that were measured.
func (r *results) images() []startable {
	return slices.DeleteFunc(slices.Clone(images), func(i startable) bool {
		return !slices.ContainsFunc(r.samples, func(s sample) bool { return s.Image == i.name })
	})
}
