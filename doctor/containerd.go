package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"accel/install"

	"golang.org/x/sys/unix"
)

// containerd looks at the daemon, at what its configuration says of registries, and at
// the hosts.toml files.
func (o *Options) containerd(ctx context.Context) []Finding {
	var found []Finding
	running, err := o.containerdVersion(ctx)
	conf, confErr := install.ReadContainerd(o.Root, o.ContainerdConfig, running)
	plan, planErr := o.plan()
	there := slices.DeleteFunc(slices.Clone(plan), func(c install.Change) bool { return c.Action == install.Create })
	switch {
	case err == nil:
		found = append(found, ok("containerd", "version "+running))
	case errors.Is(err, fs.ErrPermission):
		found = append(found, warn("containerd", fmt.Sprintf("its socket %s may not be used: %v", o.ContainerdSocket, err), "run accel doctor as root"))
	case !conf.Exists && confErr == nil:
		found = append(found, warn("containerd", fmt.Sprintf("does not run on this machine (%v)", err),
			"start it, or say where its socket is (containerd.socket); other clients can use the mirror by its address"))
		if len(there) == 0 {
			return found // and no other part of it is here
		}
	default:
		found = append(found, warn("containerd", fmt.Sprintf("does not answer: %v", err), "systemctl start containerd, or say where its socket is (containerd.socket)"))
	}
	if confErr != nil {
		found = append(found, fail("containerd", confErr.Error(), "mend the file; `containerd config dump` says what containerd makes of it"))
	} else if problem, mend := conf.Problem(o.Install.ConfigDir); problem != "" {
		found = append(found, fail("containerd", problem, mend))
	} else {
		found = append(found, ok("containerd", "looks for hosts.toml files in "+conf.ConfigPath))
	}
	if planErr != nil {
		return append(found, fail("hosts.toml", planErr.Error(), "mend the node's configuration; accel node --check-config"))
	}
	return append(found, hosts(plan)...)
}

// containerdVersion asks the daemon.
func (o *Options) containerdVersion(ctx context.Context) (string, error) {
	socket := filepath.Join(o.Root, o.ContainerdSocket)
	if _, err := os.Stat(socket); err != nil {
		return "", err
	}
	if err := unix.Access(socket, unix.W_OK); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	return install.ContainerdVersion(ctx, socket)
}

// plan is what an installation would do to hosts.toml files.
func (o *Options) plan() ([]install.Change, error) {
	wanted := o.Install
	wanted.Root, wanted.Unit, wanted.Snapshotter = o.Root, nil, nil
	return install.Plan(wanted)
}

// hosts says whether containerd would ask the node first, registry by registry.
func hosts(plan []install.Change) []Finding {
	found := make([]Finding, 0, len(plan))
	for _, c := range plan {
		switch c.Action {
		case install.Keep:
			detail := c.Path + " sends pulls to the node first"
			if c.Note != "" {
				detail += " (" + c.Note + ")"
			}
			found = append(found, ok("hosts.toml", detail))
		case install.Create:
			found = append(found, fail("hosts.toml", c.Path+" is not there: containerd does not ask the node", "accel node install"))
		case install.Update:
			found = append(found, fail("hosts.toml", c.Path+" is not as the configuration wants it", "accel node install"))
		case install.Remove:
			found = append(found, warn("hosts.toml", c.Path+" is of a registry that is no longer configured", "accel node install"))
		case install.Conflict:
			found = append(found, fail("hosts.toml", c.Path+": "+c.Note, "merge into it:\n"+c.Content))
		}
	}
	return found
}
