package main

import (
	"fmt"
	"path/filepath"
	"text/tabwriter"
	"time"

	"accel/trust"

	"github.com/spf13/cobra"
)

func newKeys(g *globals) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "keys", Short: "Manage the keys that mappings are signed with",
		Long: `The keys of a service are files below its data directory. A running service takes a
new key up by itself; old keys stay, so that what they signed still verifies.`,
		Example: "  accel keys list\n  accel keys new --dir /var/lib/accel/keys\n  accel keys export > accel-keys.pem",
	}
	cmd.PersistentFlags().StringVar(&dir, "dir", filepath.Join(defaultData, "keys"), "directory of the keys")
	show := func(cmd *cobra.Command, v any, keys ...trust.Key) error {
		return g.print(cmd, v, func(w *tabwriter.Writer) {
			fmt.Fprintln(w, "ID\tCREATED\tACTIVE")
			for _, k := range keys {
				fmt.Fprintf(w, "%s\t%s\t%t\n", k.ID, k.CreatedAt.Local().Format(time.DateTime), k.Active)
			}
		})
	}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the keys", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := trust.OpenKeyring(dir)
			if err != nil {
				return err
			}
			return show(cmd, k.List(), k.List()...)
		},
	}, &cobra.Command{
		Use: "new", Short: "Make a key and sign with it from now on", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := trust.CreateKeyring(dir)
			if err != nil {
				return err
			}
			key, err := k.New()
			if err != nil {
				return err
			}
			return show(cmd, key, key)
		},
	}, &cobra.Command{
		Use: "export", Short: "Print the public keys as PEM", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := trust.OpenKeyring(dir)
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(k.Export())
			return err
		},
	})
	return cmd
}
