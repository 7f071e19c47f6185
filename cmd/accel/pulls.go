package main

import (
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"accel"
	"accel/api"

	"github.com/spf13/cobra"
)

func newPulls(g *globals) *cobra.Command {
	var o api.PullOptions
	var outcome, from, to string
	var limit int
	cmd := &cobra.Command{
		Use: "pulls", Short: "List measured pulls, the latest first", Args: noArgs, Annotations: map[string]string{listsCSV: ""},
		Long: `Lists the pulls that nodes reported: what was pulled where, how long it took, where
its layer bytes came from. Outcome: hit (nothing from the registry), partial, miss (all
from the registry), error. Mode: mirror (blobs through the node's mirror) or lazy (mounted
before its content was there). Times are RFC 3339 or a date (UTC). --output csv too.`,
		Example: "  accel pulls\n  accel pulls --image registry.example/team/app --outcome error\n  accel pulls --from 2026-01-01 --limit 0 -o csv",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Outcome = accel.Outcome(outcome)
			if all := []string{"", "hit", "partial", "miss", "error"}; !slices.Contains(all, outcome) {
				return usage(fmt.Errorf("--outcome %q: want one of %v", outcome, all[1:]))
			}
			var err error
			if o.From, o.To, err = periodFlags(from, to); err != nil {
				return usage(err)
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			pulls := []accel.Pull{}
			for p, err := range c.Pulls(cmd.Context(), o) {
				if err != nil {
					return err
				}
				if pulls = append(pulls, p); limit > 0 && len(pulls) == limit {
					break
				}
			}
			if g.output == "csv" {
				return writePulls(cmd.OutOrStdout(), pulls)
			}
			return g.print(cmd, pulls, func(w *tabwriter.Writer) {
				fmt.Fprintln(w, "STARTED\tTOOK\tMODE\tOUTCOME\tREGISTRY\tPEER\tCACHE\tNODE\tTENANT\tIMAGE\tREASON")
				for _, p := range pulls {
					fmt.Fprintf(w, "%s\t%.2fs\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Start.Local().Format(time.DateTime), p.Duration.Seconds(), p.Mode, p.Outcome,
						bytesText(p.RegistryBytes), bytesText(p.PeerBytes), bytesText(p.CacheBytes), p.Node, p.Tenant, p.Image, p.Reason)
				}
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Image, "image", "", "only of this image, or of this repository (host/path)")
	f.StringVar(&o.Node, "node", "", "only on this node")
	f.StringVar(&o.Tenant, "tenant", "", "only of this tenant")
	f.StringVar(&outcome, "outcome", "", "only with this outcome: hit, partial, miss or error")
	f.StringVar(&from, "from", "", "only those started then or later")
	f.StringVar(&to, "to", "", "only those started before")
	f.IntVar(&limit, "limit", 100, "at most so many; 0: all")
	return cmd
}

func periodFlags(from, to string) (f, t time.Time, err error) {
	if from != "" {
		if f, err = api.ParseTime(from); err != nil {
			return f, t, fmt.Errorf("--from: %w", err)
		}
	}
	if to != "" {
		if t, err = api.ParseTime(to); err != nil {
			return f, t, fmt.Errorf("--to: %w", err)
		}
	}
	return f, t, nil
}

// writePulls writes pulls as CSV, with the names of the JSON as first line.
func writePulls(out io.Writer, pulls []accel.Pull) error {
	w := csv.NewWriter(out)
	rows := make([][]string, 0, 1+len(pulls))
	rows = append(rows, []string{"id", "image", "digest", "node", "mode", "tenant", "memoryBytes", "start", "durationNs", "registryBytes", "peerBytes", "cacheBytes", "outcome", "reason"})
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	for _, p := range pulls {
		rows = append(rows, []string{p.ID, p.Image, p.Digest.String(), p.Node, string(p.Mode), p.Tenant, number(p.MemoryBytes), p.Start.UTC().Format(time.RFC3339Nano),
			number(int64(p.Duration)), number(p.RegistryBytes), number(p.PeerBytes), number(p.CacheBytes), string(p.Outcome), p.Reason})
	}
	return w.WriteAll(rows)
}
