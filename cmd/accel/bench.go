package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// What is compared.
const (
	benchFull    = "full"    // pulled and unpacked as a whole by overlayfs, past the node
	benchLazy    = "lazy"    // mounted lazily, nothing fetched ahead
	benchProfile = "profile" // mounted lazily, what the start reads fetched ahead
	benchWarm    = "warm"    // one more start of an image that is there
)

var benchWays = []string{benchFull, benchLazy, benchProfile, benchWarm}

// benchRun is one start.
type benchRun struct {
	PullSeconds  float64 `json:"pullSeconds"`
	StartSeconds float64 `json:"startSeconds"` // from making the container's snapshot to its program's answer
	// FetchedBytes had come when it answered, compressed.
	FetchedBytes int64 `json:"fetchedBytes"`
	Misses       int64 `json:"misses"` // reads that had to wait
}

// benchRow is one image started one way.
type benchRow struct {
	Image string     `json:"image"`
	Way   string     `json:"way"`
	Runs  []benchRun `json:"runs"`
	// The medians. TotalSeconds is that of the sums.
	PullSeconds  float64 `json:"pullSeconds"`
	StartSeconds float64 `json:"startSeconds"`
	TotalSeconds float64 `json:"totalSeconds"`
	FetchedBytes int64   `json:"fetchedBytes"`
	Misses       int64   `json:"misses"`
}

// summarise fills in the medians.
func (r *benchRow) summarise() {
	r.PullSeconds = medianOf(r.Runs, func(x benchRun) float64 { return x.PullSeconds })
	r.StartSeconds = medianOf(r.Runs, func(x benchRun) float64 { return x.StartSeconds })
	r.TotalSeconds = medianOf(r.Runs, func(x benchRun) float64 { return x.PullSeconds + x.StartSeconds })
	r.FetchedBytes = medianOf(r.Runs, func(x benchRun) int64 { return x.FetchedBytes })
	r.Misses = medianOf(r.Runs, func(x benchRun) int64 { return x.Misses })
}

// medianOf is the lower one of two in the middle.
func medianOf[T cmp.Ordered](runs []benchRun, of func(benchRun) T) (m T) {
	all := make([]T, 0, len(runs))
	for _, r := range runs {
		all = append(all, of(r))
	}
	slices.Sort(all)
	if len(all) > 0 {
		m = all[(len(all)-1)/2]
	}
	return m
}

func newBench(g *globals) *cobra.Command {
	var port, runs int
	var limit time.Duration
	var plot string
	cmd := &cobra.Command{
		Use: "bench IMAGE...", Short: "Measure on this machine what lazy mounts and profiles save",
		Long: `Starts each image in four ways, several times and in turns, until it answers HTTP on the port:
  full     pulled and unpacked as a whole by overlayfs, from the registry itself
  lazy     mounted lazily by this machine's node, nothing fetched ahead
  profile  the same, with what the start reads fetched ahead by its profile
  warm     one more start of the image that is there
Between the starts the image is removed from containerd (from a namespace of its own, accel-bench) and from
the node's cache; layers of it that other images have too go from the cache with it, and come again when those
are pulled. An image that another namespace has, or that is pinned, is refused: it would be there already. While
one is started without a profile, nothing is fetched ahead of its starts by others either; that ends with the
command, and by itself after 10 minutes. What the starts read is recorded, and reported, as of any others. Times
are medians.`,
		Example: "  accel bench registry.example/team/app:v1 --port 9000 --runs 5\n  accel bench registry.example/a:v1 registry.example/b:v1 --plot starts.svg -o json",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(fmt.Errorf("%s wants at least one IMAGE; see %s --help", cmd.CommandPath(), cmd.CommandPath()))
			}
			return nil
		},
	}
	flags := bindNode(cmd.Flags(), "socket", "containerd.socket")
	cmd.Flags().IntVar(&port, "port", 9000, "port on which the programs answer HTTP")
	cmd.Flags().IntVar(&runs, "runs", 3, "starts of each image in each way")
	cmd.Flags().DurationVar(&limit, "startup-timeout", 2*time.Minute, "how long a program may take to answer")
	cmd.Flags().StringVar(&plot, "plot", "", "write the medians to this file too, as an SVG image")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		if port < 1 || port > 65535 || limit <= 0 || runs < 1 || runs > 1000 {
			return usage(fmt.Errorf("--port %d, --runs %d, --startup-timeout %s: want a port, 1 to 1000 runs, and a time", port, runs, limit))
		}
		say := func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) }
		b, ctx, err := conf.bench(cmd.Context(), port, limit, say)
		if err != nil {
			return err
		}
		var rows []benchRow
		for _, image := range args {
			of, benchErr := b.image(ctx, image, runs, say)
			rows = append(rows, of...)
			if err = benchErr; err != nil {
				err = fmt.Errorf("%s: %w", image, err)
				break
			}
		}
		err = errors.Join(err, b.close())
		if len(rows) == 0 {
			return err
		}
		if plot != "" {
			err = errors.Join(err, os.WriteFile(plot, plotBench(rows), 0o644)) //nolint:gosec // an image for others to look at
		}
		return errors.Join(g.print(cmd, rows, func(w *tabwriter.Writer) { showBench(w, rows) }), err)
	}
	return cmd
}

func showBench(w *tabwriter.Writer, rows []benchRow) {
	fmt.Fprintln(w, "IMAGE\tWAY\tRUNS\tPULL\tSTART\tTOTAL\tOF FULL\tFETCHED\tMISSES")
	full := map[string]float64{}
	for _, r := range rows {
		if r.Way == benchFull {
			full[r.Image] = r.TotalSeconds
		}
	}
	for _, r := range rows {
		share := "-"
		if full[r.Image] > 0 {
			share = fmt.Sprintf("%.0f %%", 100*r.TotalSeconds/full[r.Image])
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%.3f s\t%.3f s\t%.3f s\t%s\t%s\t%d\n", r.Image, r.Way, len(r.Runs), r.PullSeconds, r.StartSeconds, r.TotalSeconds, share,
			bytesText(r.FetchedBytes), r.Misses)
	}
}

// image measures one image. What was measured before an error is given too.
func (b *bench) image(ctx context.Context, image string, runs int, say func(string)) (rows []benchRow, err error) {
	for _, way := range benchWays {
		rows = append(rows, benchRow{Image: image, Way: way})
	}
	defer func() {
		for i := range rows {
			rows[i].summarise()
		}
		rows = slices.DeleteFunc(rows, func(r benchRow) bool { return len(r.Runs) == 0 })
	}()
	for n := range runs {
		for i, way := range benchWays {
			r, err := b.run(ctx, image, way)
			if err != nil {
				return rows, fmt.Errorf("%s, run %d: %w", way, n+1, err)
			}
			rows[i].Runs = append(rows[i].Runs, r)
			say(fmt.Sprintf("%s %s run %d of %d: pull %.3f s, start %.3f s, %s", image, way, n+1, runs, r.PullSeconds, r.StartSeconds, bytesText(r.FetchedBytes)))
		}
	}
	return rows, b.wipe(ctx)
}
