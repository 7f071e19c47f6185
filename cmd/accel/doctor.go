package main

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"accel/doctor"
	"accel/node"
	"accel/registry"

	"github.com/spf13/cobra"
)

// doctorPatience bounds what doctor waits for any one machine.
const doctorPatience = 10 * time.Second

func newDoctor(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "doctor", Short: "Examine this machine and its node, and say how to mend what is wrong", Args: noArgs,
		Long: `Looks at the kernel, containerd and its configuration, hosts.toml files, the disk, the
daemon, what lazy mounts need, the configured registries, the server and the clock, and
changes nothing. Exit codes: 0 nothing fails (there may be warnings), 1 something fails,
2 wrong usage.`,
		Example: "  accel doctor\n  accel doctor --config /etc/accel/node.yaml -o json",
	}
	flags := bindNode(cmd.Flags(), "data", "socket", "listen", "registries", "server.url", "server.token_file", "containerd.config", "containerd.config_dir", "containerd.socket", "containerd.all",
		"lazy", "snapshotter.socket", "snapshotter.runtime", "snapshotter.keys")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		o, err := conf.examination()
		if err != nil {
			return usage(err)
		}
		defer o.Client.Close()
		defer o.Node.Close()
		findings := doctor.Examine(cmd.Context(), o)
		err = g.print(cmd, findings, func(w *tabwriter.Writer) {
			for _, f := range findings {
				fmt.Fprintf(w, "%s\t%s\t%s\n", f.Level, f.Area, strings.ReplaceAll(f.Detail, "\n", "\n\t\t"))
				if f.Mend != "" {
					fmt.Fprintf(w, "\t\t-> %s\n", strings.ReplaceAll(f.Mend, "\n", "\n\t\t   "))
				}
			}
		})
		if err == nil && doctor.Worst(findings) == doctor.Fail {
			err = errors.New("something fails; see above how to mend it")
		}
		return err
	}
	return cmd
}

// examination is what doctor has to know of a node.
func (c *nodeConfig) examination() (doctor.Options, error) {
	o := doctor.Options{
		Install:          c.installation(""),
		ContainerdConfig: c.Containerd.Config, ContainerdSocket: c.Containerd.Socket,
		Dir: c.Data, BudgetBytes: int64(c.Cache.Budget), FreeFloorBytes: int64(c.Cache.FreeFloor),
		Server: c.Server.URL, NodeName: c.Name, Patience: doctorPatience,
	}
	o.Install.Snapshotter = c.remoteSnapshotter()
	o.Lazy, o.RuntimeDir, o.KeysFile = c.Lazy == "on", c.Snapshotter.Runtime, c.Snapshotter.Keys
	var err error
	if o.Registries, err = registryHosts(c.Registries); err != nil {
		return o, err
	}
	if c.Server.TokenFile != "" {
		if o.Token, err = readSecret(c.Server.TokenFile); err != nil {
			return o, fmt.Errorf("server.token_file: %w", err)
		}
	}
	o.HTTP = &http.Client{}
	if c.Server.CAFile != "" {
		if o.HTTP, err = httpClientWith(c.Server.CAFile); err != nil {
			return o, fmt.Errorf("server.ca_file: %w", err)
		}
	}
	// One attempt: doctor says what is wrong now.
	o.Client, err = registry.New(registry.Options{Hosts: o.Registries, Keychain: registry.DefaultKeychain(), Attempts: 1, StallTimeout: doctorPatience})
	o.Node = node.NewClient(c.Socket)
	return o, err
}
