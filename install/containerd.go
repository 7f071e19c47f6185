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

// Containerd is what containerd's configuration says of registries.
type Containerd struct {
	File   string   // the configuration file
	Exists bool     // else containerd runs with its defaults
	Files  []string // it and what it imports
	// Format is the configuration's version: 1, 2 (containerd 1.x), 3 or later (2.x); 0
	// where there is no file.
	Format int
	// ConfigPath is where CRI looks for hosts.toml; empty where the file does not say.
	ConfigPath string
	// Mirrors: registries have mirrors in the configuration itself, which excludes a ConfigPath.
	Mirrors bool
	// LocalPull: CRI pulls by itself, as 1.x does, and not through the transfer service.
	LocalPull bool
}

// criPlugins are the tables that hold CRI's registry settings, by the version of
// the configuration.
var criPlugins = map[int]string{1: "cri", 2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.images"}

func criPlugin(format int) string {
	return criPlugins[min(max(format, 1), 3)]
}

type containerdFile struct {
	Version int            `toml:"version"`
	Imports []string       `toml:"imports"`
	Plugins map[string]any `toml:"plugins"`
}

// ReadContainerd reads containerd's configuration with its imports. A file that is
// not there is no error.
func ReadContainerd(root, path string) (Containerd, error) {
	c := Containerd{File: filepath.Join(root, path)}
	pending := []string{c.File}
	for len(pending) > 0 && len(c.Files) < 100 { // an import may import in turn
		path := pending[0]
		pending = pending[1:]
		if slices.Contains(c.Files, path) {
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
		}
		c.Files = append(c.Files, path)
		c.take(f)
		for _, pattern := range f.Imports {
			if filepath.IsAbs(pattern) {
				pattern = filepath.Join(root, pattern)
			} else {
				pattern = filepath.Join(filepath.Dir(path), pattern)
			}
			found, err := filepath.Glob(pattern)
			if err != nil {
				return c, fmt.Errorf("containerd's configuration %s: import %q: %w", path, pattern, err)
			}
			pending = append(pending, found...)
		}
	}
	return c, nil
}

// take notes what one file says; later files win, as with containerd.
func (c *Containerd) take(f containerdFile) {
	for _, name := range slices.Sorted(maps.Values(criPlugins)) {
		cri, ok := f.Plugins[name].(map[string]any)
		if !ok {
			continue
		}
		if local, ok := cri["use_local_image_pull"].(bool); ok {
			c.LocalPull = local
		}
		registry, ok := cri["registry"].(map[string]any)
		if !ok {
			continue
		}
		if path, ok := registry["config_path"].(string); ok {
			c.ConfigPath = path
		}
		if mirrors, ok := registry["mirrors"].(map[string]any); ok && len(mirrors) > 0 {
			c.Mirrors = true
		}
	}
}

// Problem says what keeps containerd's CRI (Kubernetes) from finding hosts.toml in
// dir, and how to mend it; both are empty where nothing does. version is
// containerd's own ("1.6.20", "2.4.2"), empty where it is not known.
func (c Containerd) Problem(dir, version string) (problem, mend string) {
	format, major := c.Format, majorVersion(version)
	if !c.Exists {
		format = 3
		if major == 1 {
			format = 2
		}
	}
	mend = fmt.Sprintf("in %s write\n\n%s[plugins.%q.registry]\n  config_path = %q\n\nand restart containerd", c.File, c.versionLine(format), criPlugin(format), dir)
	paths := filepath.SplitList(c.ConfigPath)
	switch {
	case c.Mirrors:
		return "registry.mirrors in containerd's configuration excludes hosts.toml files", "move the mirrors to hosts.toml files and remove the table; then " + mend
	case c.ConfigPath == "":
		// From 2.2 on there is a default, but it is a list.
		return "containerd's CRI plugin is not told where hosts.toml files are", mend
	case !slices.ContainsFunc(paths, func(p string) bool { return filepath.Clean(p) == filepath.Clean(dir) }):
		return fmt.Sprintf("containerd's CRI plugin looks for hosts.toml files in %s, not in %s", c.ConfigPath, dir), mend + "; or install into the folder that it has, with --containerd-config-dir"
	case len(paths) > 1 && (format >= 3 || major >= 2) && !c.LocalPull:
		// The transfer service takes the list for the name of one folder.
		return fmt.Sprintf("containerd 2 finds nothing by a config_path that is a list (%s)", c.ConfigPath), mend
	default:
		return "", ""
	}
}

// versionLine is what a new file has to begin with.
func (c Containerd) versionLine(format int) string {
	if c.Exists {
		return ""
	}
	return "version = " + strconv.Itoa(format) + "\n\n"
}

// majorVersion of "v2.4.2" is 2; 0 where it cannot be told.
func majorVersion(version string) int {
	text, _, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	major, err := strconv.Atoi(text)
	if err != nil {
		return 0
	}
	return major
}
