package install

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"accel"
)

// Registry is one registry whose pulls go to the node first.
type Registry struct {
	Name      string   // "host[:port]"
	Aliases   []string // other names of the same registry
	PlainHTTP bool
	CAFile    string // for what containerd fetches itself while the node is away
}

// Options of an installation.
type Options struct {
	// Root is put before every path that is written or read, for images of machines; empty: /.
	Root string
	// ConfigDir is where containerd looks for hosts.toml: DefaultConfigDir where empty.
	ConfigDir string
	// Mirror is the node's mirror, "http://127.0.0.1:5555".
	Mirror     string
	Registries []Registry
	// Headers are sent along by containerd to the node, such as its tenant.
	Headers map[string]string
	// Everything sends the pulls of all other registries to the node too, by _default.
	Everything bool
	// Unit describes the systemd unit; nil: none is written.
	Unit *Unit
	// Snapshotter makes containerd mount images by way of the node; nil: that is left as it is.
	Snapshotter *Snapshotter
	// ContainerdConfig is containerd's configuration file: DefaultContainerdConfig where empty.
	ContainerdConfig string
	// ContainerdVersion is containerd's own ("1.6.20", "2.4.2"); empty: the format of its
	// configuration tells.
	ContainerdVersion string
}

// DefaultConfigDir is containerd's usual folder of hosts.toml files.
const DefaultConfigDir = "/etc/containerd/certs.d"

// Action is what becomes of a file.
type Action string

// Actions of a Change.
const (
	Create   Action = "create"
	Update   Action = "update"   // it is ours, and not as it should be
	Keep     Action = "keep"     // it is as it should be
	Remove   Action = "remove"   // it is ours, and no longer wanted
	Conflict Action = "conflict" // it is somebody else's, so it is left alone
)

// Change is one file of a plan.
type Change struct {
	Path   string `json:"path"` // with Options.Root before it
	Action Action `json:"action"`
	// Content is what the file is to hold; of a Conflict, what to merge by hand.
	Content string `json:"content,omitempty"`
	// Note says what a person should know: why it is a Conflict, what to merge.
	Note string `json:"note,omitempty"`
}

// Plan says what an installation by o changes. Nothing is written; see Apply. The
// error is an accel.ErrInvalid, or says which file cannot be read.
func Plan(o Options) ([]Change, error) {
	if err := o.finish(); err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	names := o.hosts()
	plan := make([]Change, 0, len(names)+1)
	for _, h := range names {
		c, err := o.planHost(h)
		if err != nil {
			return nil, err
		}
		wanted[c.Path] = true
		plan = append(plan, c)
	}
	ours, err := o.installed()
	if err != nil {
		return nil, err
	}
	for _, path := range ours {
		if !wanted[path] {
			plan = append(plan, Change{Path: path, Action: Remove, Note: "its registry is no longer configured"})
		}
	}
	if o.Unit != nil {
		c, err := planFile(filepath.Join(o.Root, UnitPath), o.Unit.content())
		if err != nil {
			return nil, err
		}
		if c.Action == Conflict {
			c.Note += "; compare it with what is wanted"
		}
		plan = append(plan, c)
	}
	if o.Snapshotter != nil {
		changes, err := o.planSnapshotter()
		if err != nil {
			return nil, err
		}
		plan = append(plan, changes...)
	}
	return plan, nil
}

// PlanRemoval says what an uninstallation takes away: all that is ours below
// o.Root, and nothing else. Of o, Root, ConfigDir and ContainerdConfig count.
func PlanRemoval(o Options) ([]Change, error) {
	o.defaults()
	paths, err := o.hostsFiles()
	if err != nil {
		return nil, err
	}
	dropIns := []string{filepath.Join(o.Root, DefaultDropInDir, dropInFile)}
	if c, err := ReadContainerd(o.Root, o.ContainerdConfig, o.ContainerdVersion); err == nil { // a broken one imports nothing
		dropIns = c.dropInPaths()
	}
	var plan []Change
	for _, path := range slices.Concat(paths, []string{filepath.Join(o.Root, UnitPath)}, dropIns) {
		f, err := look(path)
		if err != nil {
			return nil, err
		}
		switch f.owner {
		case ours:
			plan = append(plan, Change{Path: path, Action: Remove})
		case changed:
			plan = append(plan, Change{Path: path, Action: Conflict, Note: "it was changed since accel wrote it; remove it by hand"})
		}
	}
	return plan, nil
}

// Conflicts counts the files of a plan that are left alone.
func Conflicts(plan []Change) (n int) {
	for _, c := range plan {
		if c.Action == Conflict {
			n++
		}
	}
	return n
}

// Changed: a plan writes or removes a file of a kind.
func Changed(plan []Change, kind func(Change) bool) bool {
	return slices.ContainsFunc(plan, func(c Change) bool {
		return kind(c) && (c.Action == Create || c.Action == Update || c.Action == Remove)
	})
}

func (o *Options) defaults() {
	if o.ConfigDir == "" {
		o.ConfigDir = DefaultConfigDir
	}
	if o.ContainerdConfig == "" {
		o.ContainerdConfig = DefaultContainerdConfig
	}
}

func (o *Options) finish() error {
	o.defaults()
	if !filepath.IsAbs(o.ConfigDir) {
		return fmt.Errorf("%w: containerd's folder %q: want an absolute path", accel.ErrInvalid, o.ConfigDir)
	}
	if !strings.HasPrefix(o.Mirror, "http://") && !strings.HasPrefix(o.Mirror, "https://") {
		return fmt.Errorf("%w: mirror %q: want http://HOST:PORT", accel.ErrInvalid, o.Mirror)
	}
	if s := o.Snapshotter; s != nil && (!filepath.IsAbs(s.Socket) || !filepath.IsAbs(s.Root)) {
		return fmt.Errorf("%w: snapshotter at %q with snapshots in %q: want absolute paths", accel.ErrInvalid, s.Socket, s.Root)
	}
	if len(o.Registries) == 0 && !o.Everything {
		return fmt.Errorf("%w: no registry is configured, so no pull would go to the node", accel.ErrInvalid)
	}
	return nil
}

// hosts are the names that containerd may ask for, each once.
func (o *Options) hosts() []hosts {
	all := make([]hosts, 0, len(o.Registries)+1)
	for _, r := range o.Registries {
		for _, name := range append([]string{r.Name}, r.Aliases...) {
			all = append(all, hosts{name: strings.ToLower(name), plainHTTP: r.PlainHTTP, caFile: r.CAFile, mirror: o.Mirror, headers: o.Headers})
		}
	}
	if o.Everything {
		all = append(all, hosts{name: everything, mirror: o.Mirror, headers: o.Headers})
	}
	slices.SortStableFunc(all, func(a, b hosts) int { return cmp.Compare(a.name, b.name) })
	return slices.CompactFunc(all, func(a, b hosts) bool { return a.name == b.name })
}

// hostsFiles lists the hosts.toml files that there are, whosever they are.
func (o *Options) hostsFiles() ([]string, error) {
	dir := filepath.Join(o.Root, o.ConfigDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("look for hosts.toml files: %w", err)
	}
	found := make([]string, 0, len(entries))
	for _, e := range entries {
		path := filepath.Join(dir, e.Name(), hostsFile)
		if _, err := os.Lstat(path); err == nil {
			found = append(found, path)
		}
	}
	return found, nil
}

// installed lists the hosts.toml files that are ours.
func (o *Options) installed() ([]string, error) {
	paths, err := o.hostsFiles()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, path := range paths {
		f, err := look(path)
		if err != nil {
			return nil, err
		}
		if f.owner == ours {
			found = append(found, path)
		}
	}
	return found, nil
}
