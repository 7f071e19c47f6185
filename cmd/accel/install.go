package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"accel/install"

	"github.com/spf13/cobra"
)

// installed is what install and uninstall tell.
type installed struct {
	DryRun  bool             `json:"dryRun"`
	Changes []install.Change `json:"changes"`
	// Next are the steps that are left to a person.
	Next []string `json:"next,omitempty"`
}

func newNodeInstall(g *globals) *cobra.Command {
	var dryRun, noUnit bool
	var root, binary string
	cmd := &cobra.Command{
		Use: "install", Short: "Make containerd ask the node first, and systemd start it", Args: noArgs,
		Long: `Writes a hosts.toml for each configured registry, so that containerd asks the node
first and the registry itself where the node does not answer, and a systemd unit. What it
wrote it recognises: run again, it changes only what is not as it should be. A file that
somebody else wrote, or changed, is left alone, with words on what to merge; then the
exit code is 1. containerd's own configuration is never changed.`,
		Example: `  accel node install --dry-run
  accel node install --config ` + defaultNodeConfig + `
  accel node install --root /mnt/image --binary /usr/local/bin/accel`,
	}
	flags := bindNode(cmd.Flags(), "listen", "registries", "socket", "containerd.config_dir", "containerd.all", "containerd.config")
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "say what would be done, and do nothing")
	f.BoolVar(&noUnit, "no-unit", false, "write no systemd unit")
	f.StringVar(&root, "root", "", "folder that stands for / (for images of machines)")
	f.StringVar(&binary, "binary", "", "accel's path in the unit; default: this program's")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		o := conf.installation(root)
		if !noUnit {
			if o.Unit, err = conf.unit(flags.file, binary); err != nil {
				return usage(err)
			}
		}
		plan, err := install.Plan(o)
		if err != nil {
			return usage(err)
		}
		out := installed{DryRun: dryRun, Changes: plan, Next: nextSteps(conf, o, flags.file)}
		return carryOut(g, cmd, out)
	}
	return cmd
}

func newNodeUninstall(g *globals) *cobra.Command {
	var dryRun bool
	var root string
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Take away what install wrote", Args: noArgs,
		Long: `Removes the hosts.toml files and the unit that install wrote and that nobody changed
since. Nothing else is touched; the cache stays.`,
		Example: "  accel node uninstall --dry-run\n  systemctl disable --now accel-node; accel node uninstall",
	}
	flags := bindNode(cmd.Flags(), "data", "containerd.config_dir")
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "say what would be done, and do nothing")
	f.StringVar(&root, "root", "", "folder that stands for /")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		plan, err := install.PlanRemoval(install.Options{Root: root, ConfigDir: conf.Containerd.ConfigDir})
		if err != nil {
			return err
		}
		out := installed{DryRun: dryRun, Changes: plan}
		if len(plan) > 0 {
			out.Next = append(out.Next, "end a node that still runs: systemctl stop accel-node; systemctl daemon-reload")
		}
		if _, err := os.Stat(filepath.Join(root, conf.Data)); err == nil {
			out.Next = append(out.Next, "the cache is still there; when nobody needs it: rm -r "+filepath.Join(root, conf.Data))
		}
		return carryOut(g, cmd, out)
	}
	return cmd
}

// carryOut applies a plan unless it is a dry run, and shows it.
func carryOut(g *globals, cmd *cobra.Command, out installed) error {
	var failed error
	if !out.DryRun {
		failed = install.Apply(out.Changes)
	}
	if out.Changes == nil {
		out.Changes = []install.Change{}
	}
	err := g.print(cmd, out, func(w *tabwriter.Writer) { showPlan(w, out) })
	if n := install.Conflicts(out.Changes); n > 0 {
		failed = errors.Join(failed, fmt.Errorf("%d files are not accel's and were left alone; see above what to do with them", n))
	}
	return errors.Join(err, failed)
}

func showPlan(w *tabwriter.Writer, out installed) {
	if len(out.Changes) == 0 {
		fmt.Fprintln(w, "nothing to do")
	}
	for _, c := range out.Changes {
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.Action, c.Path, c.Note)
		if c.Action == install.Conflict || out.DryRun && (c.Action == install.Create || c.Action == install.Update) {
			for line := range strings.Lines(c.Content) {
				fmt.Fprint(w, "    ", line)
			}
			fmt.Fprintln(w)
		}
	}
	for i, step := range out.Next {
		if i == 0 {
			fmt.Fprintln(w, "\nwhat is left to do:")
		}
		fmt.Fprintln(w, "-", strings.ReplaceAll(step, "\n", "\n  "))
	}
}

// nextSteps are what install leaves to a person.
func nextSteps(conf nodeConfig, o install.Options, file string) []string {
	var steps []string
	c, err := install.ReadContainerd(o.Root, conf.Containerd.Config)
	if err != nil {
		steps = append(steps, err.Error())
	} else if problem, mend := c.Problem(o.ConfigDir, ""); problem != "" {
		steps = append(steps, problem+": "+mend)
	}
	if o.Unit != nil && file == "" {
		steps = append(steps, "put the configuration into "+o.Unit.ConfigFile+": the unit reads that file, not the flags given here")
	}
	if o.Unit != nil && o.Root == "" {
		steps = append(steps, "systemctl daemon-reload && systemctl enable --now accel-node")
	}
	return append(steps, "accel doctor")
}

// mirrorURL is where containerd reaches the mirror.
func (c *nodeConfig) mirrorURL() string {
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil || host == "localhost" {
		return "http://" + c.Listen
	}
	return "http://" + net.JoinHostPort(host, port)
}

// unit is the service for a configuration file, which systemd needs by its whole name.
func (c *nodeConfig) unit(file, binary string) (_ *install.Unit, err error) {
	if binary == "" {
		if binary, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("cannot tell where accel is: %w; say so with --binary", err)
		}
	}
	if file != "" {
		if file, err = filepath.Abs(file); err != nil {
			return nil, err
		}
	} else {
		file = defaultNodeConfig
	}
	return &install.Unit{Binary: binary, ConfigFile: file, RuntimeDir: c.runtimeDir()}, nil
}
