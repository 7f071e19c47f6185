package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"accel/install"
	"accel/node"

	"github.com/moby/sys/mountinfo"
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
	var dryRun, noUnit, noSnapshotter bool
	var root, binary, containerd string
	cmd := &cobra.Command{
		Use: "install", Short: "Make containerd ask the node first, and systemd start it", Args: noArgs,
		Long: `Writes a hosts.toml for each configured registry, so that containerd asks the node
first and the registry itself where the node does not answer; a systemd unit; and for
containerd 2.x a file beside its configuration that makes it mount images lazily by way of
the node. What it wrote it recognises: run again, it changes only what is not as it should
be. A file that somebody else wrote, or changed, is left alone, with words on what to
merge; then the exit code is 1. containerd's own configuration file is never changed:
what has to be written there (all of it for 1.6 and 1.7) is said at the end.`,
		Example: `  accel node install --dry-run
  accel node install --config ` + defaultNodeConfig + `
  accel node install --root /mnt/image --binary /usr/local/bin/accel`,
	}
	flags := bindNode(cmd.Flags(), "listen", "registries", "socket", "data", "snapshotter.socket", "containerd.config_dir", "containerd.all", "containerd.config", "containerd.socket")
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "say what would be done, and do nothing")
	f.BoolVar(&noUnit, "no-unit", false, "write no systemd unit")
	f.BoolVar(&noSnapshotter, "no-snapshotter", false, "leave containerd's snapshotters as they are: images are not mounted lazily")
	f.StringVar(&containerd, "containerd-version", "", "containerd's version, such as 1.7 or 2.4; default: what it says of itself")
	f.StringVar(&root, "root", "", "folder that stands for / (for images of machines)")
	f.StringVar(&binary, "binary", "", "accel's path in the unit; default: this program's")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		o := conf.installation(root)
		o.ContainerdConfig, o.ContainerdVersion = conf.Containerd.Config, containerd
		if !noSnapshotter {
			o.Snapshotter = conf.remoteSnapshotter()
		}
		if containerd == "" && root == "" {
			o.ContainerdVersion = conf.containerdVersion(cmd.Context())
		}
		if !noUnit {
			if o.Unit, err = conf.unit(flags.file, binary); err != nil {
				return usage(err)
			}
		}
		plan, err := install.Plan(o)
		if err != nil {
			return usage(err)
		}
		return carryOut(g, cmd, installed{DryRun: dryRun, Changes: plan}, func() []string { return nextSteps(o, plan, flags.file) })
	}
	return cmd
}

func newNodeUninstall(g *globals) *cobra.Command {
	var dryRun bool
	var root string
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Take away what install wrote", Args: noArgs,
		Long: `Removes the hosts.toml files, containerd's file for the snapshotter and the unit that
install wrote and that nobody changed since. Nothing else is touched; the cache stays.
Containers whose images are mounted by way of the node must be gone before: see "Leave it" in
docs/node.md.`,
		Example: "  accel node uninstall --dry-run\n  accel node uninstall; systemctl disable --now accel-node",
	}
	flags := bindNode(cmd.Flags(), "data", "containerd.config_dir", "containerd.config")
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "say what would be done, and do nothing")
	f.StringVar(&root, "root", "", "folder that stands for /")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		plan, err := install.PlanRemoval(install.Options{Root: root, ConfigDir: conf.Containerd.ConfigDir, ContainerdConfig: conf.Containerd.Config})
		if err != nil {
			return err
		}
		return carryOut(g, cmd, installed{DryRun: dryRun, Changes: plan}, func() []string { return lastSteps(&conf, root, plan) })
	}
	return cmd
}

// carryOut applies a plan unless it is a dry run, and shows it; next says what is left then.
func carryOut(g *globals, cmd *cobra.Command, out installed, next func() []string) error {
	var failed error
	if !out.DryRun {
		failed = install.Apply(out.Changes)
	}
	out.Next = next()
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
func nextSteps(o install.Options, plan []install.Change, file string) []string {
	var steps []string
	if o.Unit != nil && file == "" {
		steps = append(steps, "put the configuration into "+o.Unit.ConfigFile+": the unit reads that file, not the flags given here")
	}
	if o.Unit != nil && o.Root == "" {
		// A node that runs is not restarted by that, and `enable --now` does not either.
		steps = append(steps, "systemctl daemon-reload && systemctl enable accel-node && systemctl restart accel-node")
	}
	c, err := install.ReadContainerd(o.Root, o.ContainerdConfig, o.ContainerdVersion)
	if err != nil {
		steps = append(steps, err.Error())
	} else if problem, mend := c.Problem(o.ConfigDir); problem != "" {
		steps = append(steps, problem+": "+mend)
	}
	if o.Snapshotter != nil && err == nil {
		if problem, mend := c.SnapshotterProblem(*o.Snapshotter); problem != "" {
			steps = append(steps, problem+": "+mend)
		} else if install.Changed(plan, install.IsDropIn) {
			steps = append(steps, "systemctl restart containerd, while the node runs: it reads its configuration only then; containers go on")
		}
	}
	return append(steps, "accel doctor")
}

// lastSteps are what uninstall leaves to a person.
func lastSteps(c *nodeConfig, root string, plan []install.Change) []string {
	var steps []string
	s := c.remoteSnapshotter()
	if s != nil && root == "" {
		n, err := mountsBelow(s.Root)
		if err != nil {
			steps = append(steps, err.Error())
		}
		if n > 0 {
			steps = append(steps, fmt.Sprintf("%d snapshots are mounted below %s: drain the machine's pods and remove their images (crictl rmi --prune) before containerd or the node is restarted", n, s.Root))
		}
	}
	if install.Changed(plan, install.IsDropIn) {
		steps = append(steps, "systemctl restart containerd, when no container is left whose image is mounted by way of the node")
	}
	if s != nil {
		if conf, err := install.ReadContainerd(root, c.Containerd.Config, ""); err == nil && conf.Snapshotter == install.SnapshotterName {
			steps = append(steps, fmt.Sprintf("containerd's configuration still has the snapshotter %s (see %s): take out what was merged by hand, and restart containerd", install.SnapshotterName, strings.Join(conf.Files, ", ")))
		}
	}
	if len(plan) > 0 {
		steps = append(steps, "end a node that still runs: systemctl stop accel-node; systemctl daemon-reload")
	}
	if _, err := os.Stat(filepath.Join(root, c.Data)); err == nil {
		steps = append(steps, "the cache is still there; when nobody needs it: rm -r "+filepath.Join(root, c.Data))
	}
	return steps
}

// mountsBelow counts what is mounted in a folder.
func mountsBelow(dir string) (int, error) {
	at, err := filepath.EvalSymlinks(dir) // as the kernel has it
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("cannot tell what is mounted below %s: %w", dir, err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(at))
	if err != nil {
		return 0, fmt.Errorf("cannot tell what is mounted below %s: %w", dir, err)
	}
	return len(mounts), nil
}

// remoteSnapshotter is the node as containerd is to see it; nil where it is none.
func (c *nodeConfig) remoteSnapshotter() *install.Snapshotter {
	if c.Snapshotter.Socket == "" {
		return nil
	}
	return &install.Snapshotter{Socket: c.Snapshotter.Socket, Root: node.SnapshotsDir(c.Data)}
}

// versionPatience bounds what install waits for containerd to say which one it is.
const versionPatience = 5 * time.Second

// containerdVersion asks the containerd that runs, or the program; empty where there is none.
func (c *nodeConfig) containerdVersion(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, versionPatience)
	defer cancel()
	version, err := install.ContainerdVersion(ctx, c.Containerd.Socket)
	if err != nil {
		version, err = install.ProgramVersion(ctx, "containerd")
	}
	if err != nil {
		return "" // the format of its configuration tells, and install says that it guessed
	}
	return version
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
