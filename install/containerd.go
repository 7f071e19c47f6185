package install

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// DefaultContainerdConfig is containerd's usual configuration file.
const DefaultContainerdConfig = "/etc/containerd/config.toml"

// Containerd is what containerd's configuration says of registries and snapshotters.
type Containerd struct {
	File   string   // the configuration file
	Exists bool     // else containerd runs with its defaults
	Files  []string // it and what it imports
	// Format is the configuration's version: 1, 2 (containerd 1.x), 3 or later (2.x); 0
	// where there is no file.
	Format int
	// Imports are the patterns of files that it imports, each an absolute path.
	Imports []string
	// ConfigPath is where CRI looks for hosts.toml; empty where the file does not say.
	ConfigPath string
	// Mirrors: registries have mirrors in the configuration itself, which excludes a ConfigPath.
	Mirrors bool
	// LocalPull: CRI pulls by itself, as before 2.1, and not through the transfer service.
	LocalPull bool
	// Snapshotter is CRI's; empty where no file says.
	Snapshotter string

	root    string // what stands for /
	version release
	dataDir string // containerd's folder of persistent data; empty: the default
	cri     map[string]any
	proxies map[string]proxyPlugin
	unpack  []map[string]any // of the transfer service; nil: its defaults
}

// criPlugins are the tables that hold CRI's registry settings, by the version of
// the configuration.
var criPlugins = map[int]string{1: "cri", 2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.images"}

const transferPlugin = "io.containerd.transfer.v1.local"

func criPlugin(format int) string {
	return criPlugins[min(max(format, 1), 3)]
}

type containerdFile struct {
	Version int                    `toml:"version"`
	Imports []string               `toml:"imports"`
	Root    string                 `toml:"root"`
	Proxies map[string]proxyPlugin `toml:"proxy_plugins"`
	Plugins map[string]any         `toml:"plugins"`
}

type proxyPlugin struct {
	Type    string            `toml:"type"`
	Address string            `toml:"address"`
	Exports map[string]string `toml:"exports"`
}

// ReadContainerd reads containerd's configuration with its imports, as containerd of a
// version ("1.6.20", "2.4.2") does; where that is not known, the file's format tells.
// A file that is not there is no error.
func ReadContainerd(root, path, version string) (Containerd, error) {
	return readContainerd(root, path, version, "")
}

// readContainerd leaves one file out.
func readContainerd(root, path, version, without string) (Containerd, error) {
	c := Containerd{File: filepath.Join(root, path), root: root, version: parseRelease(version), cri: map[string]any{}, proxies: map[string]proxyPlugin{}}
	pending := []string{c.File}
	for len(pending) > 0 && len(c.Files) < 100 { // an import may import in turn
		path := pending[0]
		pending = pending[1:]
		if slices.Contains(c.Files, path) || path == without {
			continue
		}
		raw, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return c, fmt.Errorf("containerd's configuration: %w", err)
		}
		var f containerdFile
		if err := toml.Unmarshal(raw, &f); err != nil {
			return c, fmt.Errorf("containerd's configuration %s: %w", path, err)
		}
		if path == c.File {
			c.Exists, c.Format = true, max(f.Version, 1)
			c.version = c.version.or(c.Format)
		}
		c.Files = append(c.Files, path)
		c.take(f)
		for _, pattern := range f.Imports {
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(strings.TrimPrefix(filepath.Dir(path), root), pattern)
			}
			c.Imports = append(c.Imports, filepath.Clean(pattern))
			found, err := filepath.Glob(filepath.Join(root, pattern))
			if err != nil {
				return c, fmt.Errorf("containerd's configuration %s: import %q: %w", path, pattern, err)
			}
			pending = append(pending, found...)
		}
	}
	c.version = c.version.or(3)
	c.conclude()
	return c, nil
}

// take notes what one file says. Later files win, as with containerd: 2.x merges tables and
// replaces lists, 1.x takes the whole table of a plugin from the last file that has one.
func (c *Containerd) take(f containerdFile) {
	if f.Root != "" {
		c.dataDir = f.Root
	}
	maps.Copy(c.proxies, f.Proxies)
	for _, name := range slices.Sorted(maps.Values(criPlugins)) {
		cri, ok := f.Plugins[name].(map[string]any)
		if !ok {
			continue
		}
		// Before format 3 these were in a table of their own.
		if inner, ok := cri["containerd"].(map[string]any); ok {
			for _, key := range []string{"snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers"} {
				if v, ok := inner[key]; ok {
					cri[key] = v
				}
			}
		}
		if c.version.major == 1 {
			c.cri = cri
		} else {
			merge(c.cri, cri)
		}
	}
	if transfer, ok := f.Plugins[transferPlugin].(map[string]any); ok {
		if list, ok := transfer["unpack_config"].([]any); ok {
			c.unpack = []map[string]any{}
			for _, e := range list {
				if entry, ok := e.(map[string]any); ok {
					c.unpack = append(c.unpack, entry)
				}
			}
		}
	}
}

func merge(into, from map[string]any) {
	for key, v := range from {
		inner, ok := v.(map[string]any)
		have, both := into[key].(map[string]any)
		if ok && both {
			merge(have, inner)
		} else {
			into[key] = v
		}
	}
}

// conclude reads off what all files together say.
func (c *Containerd) conclude() {
	c.Snapshotter, _ = c.cri["snapshotter"].(string)
	registry, _ := c.cri["registry"].(map[string]any)
	c.ConfigPath, _ = registry["config_path"].(string)
	has := func(key string) bool {
		table, _ := registry[key].(map[string]any)
		return len(table) > 0
	}
	c.Mirrors = has("mirrors")
	switch {
	case c.version.before(2, 1):
		c.LocalPull = true
	case c.cri["use_local_image_pull"] == true:
		c.LocalPull = true
	default:
		// What the transfer service does not know makes CRI pull by itself.
		parallel, set := c.cri["max_concurrent_downloads"].(int64)
		c.LocalPull = c.Mirrors || has("configs") || has("auths") || c.announces() || set && parallel != 3 ||
			c.cri["discard_unpacked_layers"] == true || c.cri["image_pull_with_sync_fs"] == true
	}
}

// announces: CRI tells the snapshotter of which image a layer is, where it pulls by itself.
func (c *Containerd) announces() bool { return c.cri["disable_snapshot_annotations"] == false }

// Problem says what keeps containerd's CRI (Kubernetes) from finding hosts.toml in
// dir, and how to mend it; both are empty where nothing does.
func (c Containerd) Problem(dir string) (problem, mend string) {
	mend = fmt.Sprintf("in %s write\n\n%s[plugins.%q.registry]\n  config_path = %q\n\nand restart containerd", c.File, c.versionLine(), criPlugin(c.format()), dir)
	paths := filepath.SplitList(c.ConfigPath)
	switch {
	case c.Mirrors:
		return "registry.mirrors in containerd's configuration excludes hosts.toml files", "move the mirrors to hosts.toml files and remove the table; then " + mend
	case c.ConfigPath == "":
		// From 2.2 on there is a default, but it is a list.
		return "containerd's CRI plugin is not told where hosts.toml files are", mend
	case !slices.ContainsFunc(paths, func(p string) bool { return filepath.Clean(p) == filepath.Clean(dir) }):
		return fmt.Sprintf("containerd's CRI plugin looks for hosts.toml files in %s, not in %s", c.ConfigPath, dir), mend + "; or install into the folder that it has, with --containerd-config-dir"
	case len(paths) > 1 && c.version.major >= 2 && !c.LocalPull:
		// The transfer service takes the list for the name of one folder.
		return fmt.Sprintf("containerd 2 finds nothing by a config_path that is a list (%s)", c.ConfigPath), mend
	default:
		return "", ""
	}
}

// format is that of the file, or of one that is to be written.
func (c *Containerd) format() int {
	switch {
	case c.Exists:
		return c.Format
	case c.version.major == 1:
		return 2
	default:
		return 3
	}
}

// versionLine is what a new file has to begin with.
func (c *Containerd) versionLine() string {
	if c.Exists {
		return ""
	}
	return "version = " + strconv.Itoa(c.format()) + "\n\n"
}
