package main

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"accel"
	"accel/api"

	"github.com/spf13/cobra"
)

func newUsage(g *globals) *cobra.Command {
	var o api.UsageOptions
	var memory, from, to string
	cmd := &cobra.Command{
		Use: "usage", Short: "Add up pulls: how many, how fast, from where, and what they cost", Args: noArgs, Annotations: map[string]string{listsCSV: ""},
		Long: `Adds up the pulls of whole days (UTC) by image, tenant, node or day: hits (nothing from
the registry), percentiles of their durations, and GB-seconds billed (duration times
memory, a full hit is free) and saved (an estimate against downloads without accel). What
the figures mean exactly, what can be configured, and what can be asked of days that are
older than pulls.keep_detail, says docs/usage.md. --output csv too.`,
		Example: "  accel usage\n  accel usage --by tenant --from 2026-01-01 --to 2026-02-01 -o csv\n  accel usage --by day --image registry.example/team/app --memory 512MiB",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.From, o.To, err = periodFlags(from, to); err != nil {
				return usage(err)
			}
			if o.MemoryBytes, err = accel.ParseBytes(memory); err != nil || o.MemoryBytes == 0 {
				return usage(fmt.Errorf("--memory %q: want a number of bytes, such as 512MiB", memory))
			}
			if all := []string{"image", "tenant", "node", "day"}; !slices.Contains(all, o.By) {
				return usage(fmt.Errorf("--by %q: want one of %v", o.By, all))
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			u, err := c.Usage(cmd.Context(), o)
			if err != nil {
				return err
			}
			if g.output == "csv" {
				return u.WriteCSV(cmd.OutOrStdout())
			}
			return g.print(cmd, u, func(w *tabwriter.Writer) { usageTable(w, u) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.By, "by", "image", "what is added up: image, tenant, node or day")
	f.StringVar(&memory, "memory", "1GiB", "memory of pulls for which the platform passed none")
	f.StringVar(&from, "from", "", "first day; default: the first that is kept, and can be told")
	f.StringVar(&to, "to", "", "day after the last; default: after the newest")
	f.StringVar(&o.Image, "image", "", "only of this image, or of this repository (host/path)")
	f.StringVar(&o.Tenant, "tenant", "", "only of this tenant")
	f.StringVar(&o.Node, "node", "", "only on this node")
	f.IntVar(&o.Limit, "limit", 1000, "at most so many lines")
	return cmd
}

func usageTable(w *tabwriter.Writer, u api.UsageReport) {
	fmt.Fprintf(w, "%s\tPULLS\tHITS\tERRORS\tHIT RATIO\tOF BYTES\tREGISTRY\tCACHE\tP50\tP90\tP99\tGB-S BILLED\tGB-S SAVED\n", strings.ToUpper(u.By))
	row := func(key string, l api.UsageLine) {
		saved := fmt.Sprintf("%.1f", l.GBSecondsSaved)
		if l.NoBaseline > 0 {
			saved += fmt.Sprintf(" (%d unknown)", l.NoBaseline)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%.1f %%\t%.1f %%\t%s\t%s\t%.2fs\t%.2fs\t%.2fs\t%.1f\t%s\n", key, l.Pulls, l.Hits, l.Errors, 100*l.HitRatio, 100*l.HitRatioBytes,
			bytesText(l.RegistryBytes), bytesText(l.CacheBytes+l.PeerBytes), l.P50Seconds, l.P90Seconds, l.P99Seconds, l.GBSecondsBilled, saved)
	}
	for _, l := range u.Lines {
		if l.Key == "" {
			row("-", l)
		} else {
			row(l.Key, l)
		}
	}
	if u.More > 0 {
		fmt.Fprintf(w, "%d more\n", u.More)
	}
	row("total", u.Total)
}
