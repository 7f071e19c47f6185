package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"accel"
	"accel/api"

	"github.com/spf13/cobra"
)

func newWarm(g *globals) *cobra.Command {
	var nodes []string
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "warm IMAGE", Short: "Bring an image to nodes ahead of its first start", Args: exactArgs("IMAGE"),
		Long: `Asks nodes to fetch an image into their caches, at low priority. Without --node all
nodes are asked that are not silent. An image that is there already is success.
Exit codes: 0 asked for, with --wait: there on every node; 1 one node failed, with its
reason; 2 wrong usage; 3 the timeout came first.`,
		Example: `  accel warm 127.0.0.1:5000/team/app:v1 --wait
  accel warm registry.example/app@sha256:... --node worker-1 --node worker-2
  accel warm status registry.example/app:v1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			warms, err := c.Warm(cmd.Context(), args[0], nodes...)
			if errors.Is(err, accel.ErrInvalid) {
				return usage(err)
			}
			if err != nil {
				return err
			}
			var waited error
			if wait {
				warms, waited = c.WaitWarms(cmd.Context(), args[0], warms, timeout)
			}
			if err := g.printWarms(cmd, warms); err != nil {
				return err
			}
			switch {
			case errors.Is(waited, context.DeadlineExceeded):
				return exitError{fmt.Errorf("%s is not on every node after %s%s", args[0], timeout, lastCause(waited)), exitTimeout}
			case waited != nil:
				return waited
			case wait:
				return failedWarms(args[0], warms)
			default:
				return nil
			}
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&nodes, "node", nil, "only this node; may be given several times")
	f.BoolVar(&wait, "wait", false, "wait until every node has it or says why not")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "how long --wait waits; 0 waits for ever")
	cmd.AddCommand(newWarmStatus(g))
	return cmd
}

func newWarmStatus(g *globals) *cobra.Command {
	var node string
	var limit int
	cmd := &cobra.Command{
		Use: "status [IMAGE]", Short: "Show which nodes have an image, and why others do not",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage(fmt.Errorf("%s wants at most one IMAGE; see %s --help", cmd.CommandPath(), cmd.CommandPath()))
			}
			return nil
		},
		Long: `Lists what nodes were asked to fetch, newest first, by a person or by a rule of the
server's configuration. With an IMAGE, that one alone; by a tag, also what rules
asked for by digest. Exit code 1 where one of the list has Failed and an IMAGE was named.`,
		Example: "  accel warm status\n  accel warm status registry.example/app:v1\n  accel warm status --node worker-1 -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			o := api.WarmOptions{Node: node}
			if len(args) > 0 {
				o.Image = args[0]
			}
			warms := []accel.Warm{}
			for w, err := range c.Warms(cmd.Context(), o) {
				if errors.Is(err, accel.ErrInvalid) {
					return usage(err)
				}
				if err != nil {
					return err
				}
				if warms = append(warms, w); limit > 0 && len(warms) == limit {
					break
				}
			}
			if err := g.printWarms(cmd, warms); err != nil || o.Image == "" {
				return err
			}
			return failedWarms(o.Image, warms)
		},
	}
	f := cmd.Flags()
	f.StringVar(&node, "node", "", "only of this node")
	f.IntVar(&limit, "limit", 1000, "at most so many; 0: all")
	return cmd
}

func (g *globals) printWarms(cmd *cobra.Command, warms []accel.Warm) error {
	return g.print(cmd, warms, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "NODE\tSTATE\tIMAGE\tRULE\tSIZE\tFETCHED\tAGE\tREASON")
		for _, x := range warms {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", x.Node, x.State, x.Image, x.Rule, knownText(x.TotalBytes), bytesText(x.FetchedBytes), age(x.CreatedAt), x.Reason)
		}
	})
}

// failedWarms is nil where none has Failed.
func failedWarms(image string, warms []accel.Warm) error {
	failed := 0
	for _, w := range warms {
		if w.State == accel.WarmFailed {
			failed++
		}
	}
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("%s could not be brought to %d of %d nodes; the reasons are above", image, failed, len(warms))
}
