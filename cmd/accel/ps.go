package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"accel/lazy"
	"accel/node"

	"github.com/spf13/cobra"
)

func newPS(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "ps", Short: "List the images that are lazily mounted on this machine", Args: noArgs,
		Long: `Lists the images of which containerd has layers lazily mounted: how many layers, how much of
their content is on this machine, how many reads had to wait since the node started and for
how long together, how fast content comes just now, and what was fetched ahead of the start by a
profile. An image on which no container can
start is listed with the reason.`,
		Example: "  accel ps\n  accel ps -o json",
	}
	flags := bindNode(cmd.Flags(), "socket")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		client := node.NewClient(conf.Socket)
		defer client.Close()
		images, err := client.Mounted(cmd.Context())
		if errors.Is(err, node.ErrNotRunning) {
			return fmt.Errorf("%w: nobody answers on %s (--socket)", err, conf.Socket)
		}
		if err != nil {
			return err
		}
		return g.print(cmd, images, func(w *tabwriter.Writer) { showMounted(w, images) })
	}
	return cmd
}

func showMounted(w *tabwriter.Writer, images []node.MountedImage) {
	fmt.Fprintln(w, "IMAGE\tDIGEST\tLAYERS\tSIZE\tLOCAL\tMISSES\tWAITED\tRATE\tAHEAD")
	for _, m := range images {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%.0f %%\t%d\t%s\t%s/s\t%s\n", m.Image, m.Digest, len(m.Layers), bytesText(m.SizeBytes), m.LocalPercent,
			m.Misses, m.Waited.Round(time.Millisecond), bytesText(int64(m.BytesPerSec)), aheadText(m.Ahead))
		for _, id := range slices.Sorted(maps.Keys(m.Bad)) {
			fmt.Fprintf(w, "  snapshot %s: %s\n", id, m.Bad[id])
		}
	}
}

// aheadText says what a profile brought, and what of that was of use where a start was recorded.
func aheadText(a *lazy.Ahead) string {
	switch {
	case a == nil:
		return "-"
	case a.UsedBytes+a.VainBytes == 0:
		return fmt.Sprintf("%s (%s)", bytesText(a.PlannedBytes), a.Origin)
	default:
		return fmt.Sprintf("%s (%s), %.0f %% used", bytesText(a.PlannedBytes), a.Origin, 100*float64(a.UsedBytes)/float64(a.UsedBytes+a.VainBytes))
	}
}
