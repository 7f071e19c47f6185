package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"accel/node"

	"github.com/spf13/cobra"
)

func newPS(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "ps", Short: "List the images that are lazily mounted on this machine", Args: noArgs,
		Long: `Lists the images of which containerd has layers lazily mounted: how many layers, how much of
their content is on this machine, how many reads had to wait since the node started and for
how long together, and how fast content comes just now. An image on which no container can
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
	fmt.Fprintln(w, "IMAGE\tDIGEST\tLAYERS\tSIZE\tLOCAL\tMISSES\tWAITED\tRATE")
	for _, m := range images {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%.0f %%\t%d\t%s\t%s/s\n", m.Image, m.Digest, len(m.Layers), bytesText(m.SizeBytes), m.LocalPercent,
			m.Misses, m.Waited.Round(time.Millisecond), bytesText(int64(m.BytesPerSec)))
		for _, id := range slices.Sorted(maps.Keys(m.Bad)) {
			fmt.Fprintf(w, "  snapshot %s: %s\n", id, m.Bad[id])
		}
	}
}
