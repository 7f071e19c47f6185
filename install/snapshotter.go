package install

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

const (
	// SnapshotterName is what containerd calls the node.
	SnapshotterName = "accel"
	// DefaultDropInDir is the folder of files that the configuration which containerd
	// proposes from 2.2 on imports. Without such a line, or without a file, it imports nothing.
	DefaultDropInDir = "/etc/containerd/conf.d"
	dropInFile       = SnapshotterName + ".toml"
	// defaultDataDir is containerd's folder where its configuration names none.
	defaultDataDir = "/var/lib/containerd"
)

// Snapshotter describes the node as a remote snapshotter of containerd.
type Snapshotter struct {
	Socket string // on which the node answers
	Root   string // folder of its snapshots; CRI tells the kubelet how full its file system is
}

// dropIns is whether a file beside containerd's own can hold all of it. 1.x replaces the
// whole table of CRI by the one that it imports, a person's settings with it.
func (c *Containerd) dropIns() bool { return c.version.major >= 2 }

// dropInPath is where the file goes: to a folder that is imported, else to the usual one.
func (c *Containerd) dropInPath() (path string, imported bool) {
	for _, pattern := range c.Imports {
		path := filepath.Join(filepath.Dir(pattern), dropInFile)
		// A folder may be a pattern too; then there is no telling which is meant.
		if matches, err := filepath.Match(pattern, path); err == nil && matches && !strings.ContainsAny(filepath.Dir(path), `*?[\`) {
			return filepath.Join(c.root, path), true
		}
	}
	return filepath.Join(c.root, DefaultDropInDir, dropInFile), false
}

// dropInPaths are the places where an earlier installation may have put it.
func (c *Containerd) dropInPaths() []string {
	paths := []string{filepath.Join(c.root, DefaultDropInDir, dropInFile)}
	if path, imported := c.dropInPath(); imported && path != paths[0] {
		paths = append(paths, path)
	}
	return paths
}

// IsDropIn: a change is of the file that makes containerd ask the node for snapshots.
func IsDropIn(c Change) bool { return filepath.Base(c.Path) == dropInFile }

// planSnapshotter says what it takes for containerd to ask the node for snapshots; nothing
// where its configuration has to be written by hand (see SnapshotterProblem).
func (o *Options) planSnapshotter() ([]Change, error) {
	c, err := ReadContainerd(o.Root, o.ContainerdConfig, o.ContainerdVersion)
	if err != nil {
		return nil, err
	}
	if !c.dropIns() {
		return nil, nil
	}
	path, imported := c.dropInPath()
	// Without it, to see what it has to carry on.
	c, err = readContainerd(o.Root, o.ContainerdConfig, o.ContainerdVersion, path)
	if err != nil {
		return nil, err
	}
	change, err := planFile(path, c.dropIn(*o.Snapshotter))
	if err != nil {
		return nil, err
	}
	switch {
	case change.Action == Conflict:
		change.Note += "; merge what is below into it"
	case c.Snapshotter != "" && c.Snapshotter != "overlayfs" && c.Snapshotter != SnapshotterName:
		change.Note = fmt.Sprintf("CRI's snapshotter is %s without this file", c.Snapshotter)
	}
	plan := []Change{change}
	for _, old := range c.dropInPaths() {
		if f, err := look(old); err != nil {
			return nil, err
		} else if imported && old != path && f.owner == ours {
			plan = append(plan, Change{Path: old, Action: Remove, Note: "containerd imports " + path + " instead"})
		}
	}
	return plan, nil
}

// dropIn is the whole file; c is what the other files say. A list in it replaces theirs, so
// it carries on what theirs has.
func (c *Containerd) dropIn(s Snapshotter) string {
	var b strings.Builder
	fmt.Fprintf(&b, `version = 3

[proxy_plugins.%[1]s]
  type = "snapshot"
  address = %[2]s
[proxy_plugins.%[1]s.exports]
  root = %[3]s
  # The transfer service says of which image a layer is.
  enable_remote_snapshot_annotations = "true"

[plugins.%[4]q]
  snapshotter = %[5]q
`, SnapshotterName, tomlString(s.Socket), tomlString(s.Root), criPlugins[3], SnapshotterName)
	if c.LocalPull {
		b.WriteString("  # CRI pulls by itself here, and has to say it too.\n  disable_snapshot_annotations = false\n")
	}
	b.WriteString("\n# Into which snapshotters the transfer service may unpack: those that it had before, and ours.\n")
	for _, entry := range c.unpackable() {
		fmt.Fprintf(&b, "[[plugins.%q.unpack_config]]\n", transferPlugin)
		for _, key := range slices.Sorted(maps.Keys(entry)) {
			if v, err := json.Marshal(entry[key]); err == nil { // of strings, booleans and lists TOML has the same form
				fmt.Fprintf(&b, "  %s = %s\n", key, v)
			}
		}
	}
	return b.String()
}

// unpackable is the transfer service's list with us in it.
func (c *Containerd) unpackable() []map[string]any {
	list := slices.Clone(c.unpack)
	platform := "linux/" + runtime.GOARCH
	// Naming the differ spares containerd a choice, and a warning, where it has several.
	if list == nil {
		list = append(list, map[string]any{"platform": platform, "snapshotter": "overlayfs", "differ": "walking"})
		if !c.version.before(2, 3) {
			erofs := "linux(+erofs)/" + runtime.GOARCH
			list = append(list, map[string]any{"platform": erofs, "snapshotter": "erofs", "differ": "erofs", "optional": true})
		}
	}
	if !c.unpacksInto(SnapshotterName) {
		list = append(list, map[string]any{"platform": platform, "snapshotter": SnapshotterName, "differ": "walking"})
	}
	return list
}

func (c *Containerd) unpacksInto(name string) bool {
	return slices.ContainsFunc(c.unpack, func(e map[string]any) bool { return e["snapshotter"] == name })
}

// SnapshotterProblem says what keeps containerd from mounting images by way of s, and
// how to mend it; both are empty where nothing does.
func (c Containerd) SnapshotterProblem(s Snapshotter) (problem, mend string) {
	var lacks []string
	if p, ok := c.proxies[SnapshotterName]; !ok {
		lacks = append(lacks, "it has no proxy plugin "+SnapshotterName)
	} else {
		if p.Type != "snapshot" && p.Type != "io.containerd.snapshotter.v1" || p.Address != s.Socket {
			lacks = append(lacks, fmt.Sprintf("its proxy plugin %s (%s) asks at %s, not at %s", SnapshotterName, p.Type, p.Address, s.Socket))
		}
		if !c.LocalPull && p.Exports["enable_remote_snapshot_annotations"] != "true" {
			lacks = append(lacks, "the proxy plugin does not export enable_remote_snapshot_annotations, so the node is not told of which image a layer is")
		}
	}
	if c.Snapshotter != SnapshotterName {
		lacks = append(lacks, fmt.Sprintf("CRI's snapshotter is %q", c.Snapshotter))
	}
	if c.LocalPull && !c.announces() {
		lacks = append(lacks, "CRI pulls by itself, and disable_snapshot_annotations is not false, so the node is not told of which image a layer is")
	}
	if !c.LocalPull && !c.unpacksInto(SnapshotterName) {
		lacks = append(lacks, "the transfer service has no unpack_config for it")
	}
	link := filepath.Join(c.dataFolder(), "io.containerd.snapshotter.v1."+SnapshotterName)
	_, err := os.Stat(filepath.Join(c.root, link))
	unlinked := c.version.major == 1 && err != nil
	if unlinked {
		lacks = append(lacks, fmt.Sprintf("the kubelet looks for the disk of images at %s, where nothing is", link))
	}
	if len(lacks) == 0 {
		return "", ""
	}
	problem = "containerd's configuration does not make it mount images lazily: " + strings.Join(lacks, "; ")
	if !c.dropIns() {
		return problem, c.byHand(s, unlinked, link)
	}
	var first string
	path, imported := c.dropInPath()
	if f, err := look(path); err == nil && f.owner == nobodys {
		first = "accel node install, then "
	}
	pattern := filepath.Join(DefaultDropInDir, "*.toml")
	switch {
	case imported && first == "":
		mend = fmt.Sprintf("accel node install; where a file that is imported after %s says otherwise, take that out; then restart containerd", path)
	case imported:
		mend = first + "restart containerd"
	case len(c.Imports) > 0:
		mend = fmt.Sprintf("%sadd %q to imports in %s, and restart containerd", first, pattern, c.File)
	default:
		mend = fmt.Sprintf("%sin %s write above the first table\n\n%simports = [%q]\n\nand restart containerd", first, c.File, c.versionLine(), pattern)
	}
	return problem, mend
}

// byHand is what a person merges where a file beside containerd's own would not do.
func (c *Containerd) byHand(s Snapshotter, unlinked bool, link string) string {
	text := fmt.Sprintf(`merge into %s

%s[proxy_plugins.%s]
  type = "snapshot"
  address = %s

[plugins.%q.containerd]
  snapshotter = %q
  disable_snapshot_annotations = false

`, c.File, c.versionLine(), SnapshotterName, tomlString(s.Socket), criPlugin(c.format()), SnapshotterName)
	if unlinked {
		// 1.x tells the kubelet this path, whatever a proxy plugin says (nydus-snapshotter issue 288).
		text += fmt.Sprintf("then ln -s %s %s\n", s.Root, link)
	}
	text += "and restart containerd while the node runs"
	if c.version.guessed {
		text += "; where it is a containerd 2.x, accel node install --containerd-version 2.x does it"
	}
	return text
}

func (c *Containerd) dataFolder() string {
	if c.dataDir != "" {
		return c.dataDir
	}
	return defaultDataDir
}
