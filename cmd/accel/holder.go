package main

import (
	"context"
	"errors"

	"accel/lazyfs"

	"github.com/spf13/cobra"
)

// newNodeHolder is what the node starts by itself; nobody else has a use for it.
func newNodeHolder(*globals) *cobra.Command {
	var o lazyfs.HolderOptions
	cmd := &cobra.Command{
		Use: "holder", Short: "Serve lazy mounts; the node starts it", Args: noArgs, Hidden: true,
		Long: `Serves the content of lazily mounted layers to the kernel, and has the node bring what is
missing. The node starts it and it lives on when the node ends, so that containers can read
while the node is restarted or upgraded. It ends by itself when nothing is mounted any more.`,
		Example: "  accel node holder --dir /run/accel/lazyfs",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Dir == "" {
				return usage(errors.New("--dir: say where the node's lazy mounts are"))
			}
			o.Version, o.Log = lazyfs.VersionName(version()), newLogger(logConfig{"info", "text"}, cmd.ErrOrStderr())
			// A service manager's signals are for the node: who ended the holder would break running containers.
			return lazyfs.RunHolder(context.WithoutCancel(cmd.Context()), o)
		},
	}
	cmd.Flags().StringVar(&o.Dir, "dir", "", "the node's snapshotter.runtime")
	return cmd
}
