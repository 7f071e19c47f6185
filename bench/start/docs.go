package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"accel/internal/testbed"
)

// writeDocs writes path, and the plots into the folder beside it that has its name.
func writeDocs(path string, res *results, j *judgement) error {
	plots := strings.TrimSuffix(path, filepath.Ext(path))
	if err := os.MkdirAll(plots, 0o755); err != nil {
		return err
	}
	speeds, err := res.about.speeds()
	if err != nil {
		return err
	}
	var b strings.Builder
	docsIntro(&b, res)
	for _, image := range res.images() {
		plot := filepath.Join(plots, "start-"+image.name+".svg")
		if err := plotStarts(plot, image, speeds, res); err != nil {
			return err
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s.\n\n![start times of %s](%s/%s)\n", image.name, strings.ToUpper(image.note[:1])+image.note[1:], image.name, filepath.Base(plots), filepath.Base(plot))
		docsImage(&b, image, speeds, res)
	}
	docsBars(&b, j)
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

func docsIntro(b *strings.Builder, res *results) {
	a := res.about
	fmt.Fprintf(b, `# Benchmarks of container starts

Written by `+"`go run ./bench/start -docs docs/benchmarks.md`"+` (`+"`make bench-start`"+` runs it without), as root, from %s;
the same is made again from the file of single runs, without running anything, by `+"`-from %s`"+`.

**What is measured**: the time from the begin of the pull until the program in the container is ready: its server answers, or, where it
is one that ends, it has ended. Every cold run has a containerd with an empty root, a snapshotter that was just started with an empty root, and
a page cache that was dropped. The registry, which keeps its content in memory as another machine would, is at the far end of a shaped link: one rate for all connections together, half of the round trip
each way, a whole one to connect, no losses and no slow start. All variants are run one after the other, round after round.

**Where**: %d cores (%s), %.0f GB of memory, kernel %s, from %s to %s. Load average before %.1f, after %.1f: registry, link and all daemons
share the cores with the program. Absolute times move with the machine; ratios are of one session.

**With what**: `, runsFile, runsFile, a.Cores, a.Processor, float64(a.MemoryBytes)/1e9, a.Kernel, a.Began.Format("2006-01-02 15:04 MST"), a.Ended.Format("2006-01-02 15:04 MST"), a.Load[0], a.Load[1])
	for i, what := range slices.Sorted(maps.Keys(a.Versions)) {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(b, "%s %s", what, a.Versions[what])
	}
	fmt.Fprintf(b, ".\n\n**How often**: as the tables say. Medians, with least and most.\n\n")
	b.WriteString("| variant | what it is |\n|---|---|\n")
	for _, v := range variants {
		if slices.ContainsFunc(res.samples, func(s sample) bool { return s.Variant == v.name }) {
			fmt.Fprintf(b, "| %s | %s |\n", v.name, v.note)
		}
	}
	fmt.Fprintf(b, `
Images are built from Debian 12 packages on one base. "Recorded" and "optimised" come of one recorded start each: by the node itself for accel, by a
recording of opened files on overlayfs for the stock optimiser, which puts whole files in front. There is no service in these runs: the node
finds mapping and profile in the registry. The **lower bound** is `+"`3 RTT + max(hot bytes compressed / bandwidth, hot bytes / (cores x rate of inflating and hashing)) + warm start`"+`,
where the hot bytes are what a start has read at page granularity. The **counted bound** adds up %d round trips, the link's time, and all the work
that there is (inflating, hashing, a warm start's CPU) spread over all cores. Both reckon with the gzip of the optimised image.
`, neededRoundTrips)
}

func docsImage(b *strings.Builder, image startable, speeds []testbed.LinkSpeed, res *results) {
	for _, speed := range speeds {
		lower, counted, hasBound := res.boundsOf(image.name, speed)
		fmt.Fprintf(b, "\n### %s, %s\n\n| variant | runs | median s | least-most | pull s | MB by then | misses | daemons' CPU s | x lower bound |\n|---|---|---|---|---|---|---|---|---|\n", image.name, speed)
		for _, v := range variants {
			samples := res.of(image.name, speed, v.name)
			if len(samples) == 0 {
				continue
			}
			total, missed, over := spreadOf(samples, totalSeconds), "", ""
			if v.system == accelNode {
				missed = fmt.Sprintf("%.0f", spreadOf(samples, misses).median)
			}
			if hasBound && v.at == cold && !v.all {
				over = fmt.Sprintf("%.2f", total.median/lower.seconds)
			}
			fmt.Fprintf(b, "| %s | %d | %.2f | %.2f-%.2f | %.2f | %.1f | %s | %.2f | %s |\n", v.name, len(samples), total.median, total.least, total.most,
				spreadOf(samples, pullSeconds).median, spreadOf(samples, fetchedMB).median, missed, spreadOf(samples, daemonCPU).median, over)
		}
		if !hasBound {
			continue
		}
		fmt.Fprintf(b, "\nLower bound %.2f s: %s. Counted bound %.2f s: %s", lower.seconds, lower.how, counted.seconds, counted.how)
		if samples := res.of(image.name, speed, "accel-profile"); len(samples) > 0 {
			fmt.Fprintf(b, "; accel-profile takes %.2f times that (aim: %g)", spreadOf(samples, totalSeconds).median/counted.seconds, aimOverBound)
		}
		b.WriteString(".\n")
	}
	if c, known := res.foretoldOf(image.name); known {
		fmt.Fprintf(b, "\nThe prediction names %.0f %% of the %.1f MB that the recorded start read, and %.1f MB in vain.\n", 100*c.Share(), float64(c.RecordedBytes)/megabyte, float64(c.VainBytes)/megabyte)
	}
	var trips []string
	for _, v := range variants {
		if n, ok := res.tripsOf(image.name, speeds[0], v.name); ok {
			trips = append(trips, fmt.Sprintf("%s %.1f", v.name, n))
		}
	}
	if len(trips) > 0 {
		fmt.Fprintf(b, "\nRound trips one after the other, by how much longer a start takes over %s: %s.\n", farther(speeds[0]), strings.Join(trips, ", "))
	}
}

func docsBars(b *strings.Builder, j *judgement) {
	b.WriteString("\n## What was asked\n\n| figure | value | bar | met | how |\n|---|---|---|---|---|\n")
	for _, r := range j.bars {
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s |\n", r.name, r.value, r.bar, r.met, r.note)
	}
}
