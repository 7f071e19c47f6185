package install

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

const (
	hostsFile = "hosts.toml"
	// everything is the folder that containerd takes for hosts without one of their own.
	everything = "_default"
)

// hosts is the hosts.toml of one registry name.
type hosts struct {
	name      string // as in image references, or everything
	plainHTTP bool
	caFile    string
	mirror    string
	headers   map[string]string
}

// folders are the names that containerd looks for, in its order; the last is
// shared by all.
func (h hosts) folders() []string {
	if h.name == everything {
		return []string{everything}
	}
	var names []string
	if i := strings.LastIndex(h.name, ":"); i > 0 {
		names = append(names, h.name[:i]+"_"+h.name[i+1:]+"_")
	}
	return append(names, h.name, everything)
}

// mirrorTable is the part that makes containerd ask the node first. Capabilities
// are those that every version from 1.6 on knows; pushes stay with the registry.
func (h hosts) mirrorTable() string {
	table := fmt.Sprintf("[host.%s]\n  capabilities = [\"pull\", \"resolve\"]\n", tomlString(h.mirror))
	if len(h.headers) > 0 {
		table += fmt.Sprintf("[host.%s.header]\n", tomlString(h.mirror))
	}
	for _, name := range slices.Sorted(maps.Keys(h.headers)) {
		table += fmt.Sprintf("  %s = %s\n", tomlString(name), tomlString(h.headers[name]))
	}
	return table
}

// content is the whole file. What containerd finds beside its mirrors is used when the node
// does not answer, so it says how the registry itself is reached.
func (h hosts) content(certificates string) string {
	var b strings.Builder
	if h.name != everything {
		server := "https://" + h.name
		switch {
		case h.name == "docker.io":
			server = "https://registry-1.docker.io"
		case h.plainHTTP:
			server = "http://" + h.name
		}
		fmt.Fprintf(&b, "server = %s\n%s\n", tomlString(server), certificates)
	}
	return b.String() + h.mirrorTable()
}

// tomlString is s as a basic string: JSON's escapes are among TOML's.
func tomlString(s string) string {
	raw, err := json.Marshal(s)
	if err != nil {
		return `""` // a string always can be
	}
	return string(raw)
}

// planHost says what it takes for one registry name.
func (o *Options) planHost(h hosts) (Change, error) {
	base := filepath.Join(o.Root, o.ConfigDir)
	// Of its folders containerd takes the first that is there, for everything.
	var dir string
	names := h.folders()
	for _, name := range names {
		if name == everything && h.name != everything {
			break
		}
		if _, err := os.Stat(filepath.Join(base, name)); err == nil {
			dir = filepath.Join(base, name)
			break
		}
	}
	shadowed := dir == "" && h.name != everything
	if dir == "" {
		dir = filepath.Join(base, names[0])
	}
	path := filepath.Join(dir, hostsFile)
	c, err := planFile(path, h.content(h.certificates(dir)))
	if err != nil {
		return c, err
	}
	if c.Action == Conflict {
		c.Content = h.mirrorTable()
		f, err := look(path)
		return o.mergeNote(c, h, f), err
	}
	if shadowed {
		shared := filepath.Join(base, everything, hostsFile)
		f, err := look(shared)
		if err != nil {
			return c, err
		}
		if f.owner == others || f.owner == changed {
			c.Note = fmt.Sprintf("what %s says no longer counts for %s", shared, h.name)
		}
	}
	return c, nil
}

// mergeNote says what to do with a file that is somebody else's; one that names
// the node first is fine as it is.
func (o *Options) mergeNote(c Change, h hosts, f file) Change {
	named := NamedHosts(f.content)
	switch i := slices.Index(named, h.mirror); {
	case i == 0:
		return Change{Path: c.Path, Action: Keep, Note: "somebody else's, and it names the node first"}
	case i > 0:
		c.Note += fmt.Sprintf("; it asks %s before the node: move the node's table above the others", named[0])
	default:
		c.Note += "; put this above its first [host] table"
	}
	return c
}

// certificates carries over what lies in the host's folder in docker's way (*.crt, *.cert with
// *.key), which containerd reads only where there is no hosts.toml.
func (h hosts) certificates(dir string) string {
	var cas, pairs []string
	if h.caFile != "" {
		cas = append(cas, tomlString(h.caFile))
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		entries = nil // no folder: nothing to carry over
	}
	for _, e := range entries {
		switch name := e.Name(); filepath.Ext(name) {
		case ".crt":
			cas = append(cas, tomlString(name))
		case ".cert":
			key := strings.TrimSuffix(name, ".cert") + ".key"
			if _, err := os.Stat(filepath.Join(dir, key)); err == nil {
				pairs = append(pairs, fmt.Sprintf("[%s, %s]", tomlString(name), tomlString(key)))
			} else {
				pairs = append(pairs, tomlString(name))
			}
		}
	}
	var b strings.Builder
	if len(cas) > 0 && !h.plainHTTP {
		fmt.Fprintf(&b, "ca = [%s]\n", strings.Join(cas, ", "))
	}
	if len(pairs) > 0 && !h.plainHTTP {
		fmt.Fprintf(&b, "client = [%s]\n", strings.Join(pairs, ", "))
	}
	return b.String()
}

// NamedHosts lists the hosts of a hosts.toml in the order in which containerd
// asks them; nothing where the file cannot be read as such.
func NamedHosts(content string) []string {
	if toml.Unmarshal([]byte(content), &map[string]any{}) != nil {
		return nil
	}
	var named []string
	p := unstable.Parser{}
	p.Reset([]byte(content))
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table {
			continue
		}
		var parts []string
		for it := e.Key(); it.Next(); {
			parts = append(parts, string(it.Node().Data))
		}
		if len(parts) >= 2 && parts[0] == "host" && !slices.Contains(named, parts[1]) {
			named = append(named, parts[1])
		}
	}
	return named
}
