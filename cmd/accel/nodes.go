package main

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"accel/api"

	"github.com/spf13/cobra"
)

func newNodes(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "nodes", Short: "List the nodes that the server has heard of", Args: noArgs,
		Long: `Lists the machines that run accel node, as each told of itself last. A silent one has
not been heard of for a while: it is brought nothing, and its figures are old.`,
		Example: "  accel nodes\n  accel nodes -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			nodes, err := c.Nodes(cmd.Context())
			if err != nil {
				return err
			}
			return g.print(cmd, nodes, func(w *tabwriter.Writer) {
				fmt.Fprintln(w, "NAME\tSTATE\tSEEN\tUP\tUSED\tBUDGET\tFREE\tBLOBS\tVERSION\tLABELS")
				for _, n := range nodes {
					fmt.Fprintf(w, "%s\t%s\t%s ago\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", n.Name, nodeState(n), age(n.SeenAt), age(n.StartedAt),
						bytesText(n.Cache.UsedBytes), knownText(n.Cache.BudgetBytes), bytesText(n.Cache.FreeBytes), n.Cache.Blobs, n.Version, labelsText(n.Labels))
				}
			})
		},
	}
}

func nodeState(n api.NodeStatus) string {
	if n.Silent {
		return "silent"
	}
	return "live"
}

func age(t time.Time) string { return time.Since(t).Round(time.Second).String() }

// knownText is a size that is 0 where it is unknown, or there is no such bound.
func knownText(n int64) string {
	if n == 0 {
		return "-"
	}
	return bytesText(n)
}

func labelsText(labels map[string]string) string {
	all := make([]string, 0, len(labels))
	for k, v := range labels {
		all = append(all, k+"="+v)
	}
	slices.Sort(all)
	return strings.Join(all, ",")
}
