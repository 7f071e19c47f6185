package profile

import (
	"encoding/json"
	"path"
	"strings"
)

// nodeStart is one Node.js with the modules that it has loaded.
type nodeStart struct {
	p       *predictor
	loaded  map[*Entry]bool
	configs map[string]*nodePackage // by directory; nil: none
}

// nodePackage is what a package.json says.
type nodePackage struct {
	dir     string
	Main    string            `json:"main"`
	Exports json.RawMessage   `json:"exports"`
	Imports json.RawMessage   `json:"imports"`
	Scripts map[string]string `json:"scripts"`
}

// nodeGlobals are directories where Debian's Node.js looks last.
var nodeGlobals = []string{"/usr/local/lib/node_modules", "/usr/lib/node_modules", "/usr/lib/x86_64-linux-gnu/nodejs", "/usr/lib/aarch64-linux-gnu/nodejs", "/usr/share/nodejs", "/usr/lib/nodejs"}

// nodeBuiltins are modules that Debian takes out of the program; it reads them at every
// start.
var nodeBuiltins = []string{
	"usr/share/nodejs/undici/undici-fetch.js", "usr/share/nodejs/acorn/dist/acorn.js", "usr/share/nodejs/acorn-walk/dist/walk.js",
	"usr/share/nodejs/cjs-module-lexer/lexer.js", "usr/share/nodejs/cjs-module-lexer/dist/lexer.js",
}

// nodeInside are modules that are part of the program, by the first part of the name.
var nodeInside = words(`assert async_hooks buffer child_process cluster console constants crypto dgram diagnostics_channel dns domain events fs
	http http2 https inspector module net os path perf_hooks process punycode querystring readline repl stream string_decoder sys timers tls trace_events
	tty url util v8 vm wasi worker_threads zlib`)

func words(list string) map[string]bool {
	set := map[string]bool{}
	for w := range strings.FieldsSeq(list) {
		set[w] = true
	}
	return set
}

const maxPackageBytes = 1 << 20

// node predicts Node.js with its arguments.
func (p *predictor) node(args []string, depth int) {
	n := &nodeStart{p: p, loaded: map[*Entry]bool{}, configs: map[string]*nodePackage{}}
	for _, b := range nodeBuiltins {
		p.whole(b)
	}
	options := append(strings.Fields(p.env["NODE_OPTIONS"]), args...)
	for k := 0; k < len(options); k++ {
		o := options[k]
		if !strings.HasPrefix(o, "-") {
			args = options[k:]
			break
		}
		name, value, joined := strings.Cut(o, "=")
		switch name {
		case "-r", "--require", "--import", "--loader", "--experimental-loader":
			if !joined && k+1 < len(options) {
				k++
				value = options[k]
			}
			n.load(value, p.cwd, true, 0)
		case "-e", "--eval", "-p", "--print":
			if k+1 < len(options) {
				n.source(options[k+1], p.cwd, 0)
			}
			return
		case "-C", "--conditions", "--env-file", "--title", "--input-type":
			if !joined {
				k++
			}
		}
		args = nil
	}
	if len(args) == 0 {
		return
	}
	e, real := n.file(p.inDir(args[0]), true)
	if e == nil {
		return
	}
	n.module(e, real, 0)
	switch path.Base(args[0]) {
	case "npm", "npm-cli.js", "yarn", "yarn.js", "pnpm", "pnpm.cjs":
		n.script(args[1:], depth)
	}
}

// script is what "npm run x" runs.
func (n *nodeStart) script(args []string, depth int) {
	name := ""
	for _, a := range args {
		if strings.HasPrefix(a, "-") || a == "run" || a == "run-script" {
			continue
		}
		name = a
		break
	}
	c := n.config(n.p.cwd)
	if c == nil || name == "" {
		return
	}
	path := n.p.env["PATH"]
	n.p.env["PATH"] = n.p.cwd + "/node_modules/.bin:" + path
	for _, s := range []string{"pre" + name, name} {
		if text := c.Scripts[s]; text != "" && len(text) < maxStringBytes {
			n.p.run([]string{"sh", "-c", text}, depth+1)
		}
	}
	n.p.env["PATH"] = path
}

// module adds a module's file and what it loads.
func (n *nodeStart) module(e *Entry, real string, depth int) {
	if n.loaded[e] || len(n.loaded) >= maxModules || depth > maxImportDepth || n.p.r.err != nil {
		return
	}
	n.loaded[e] = true
	n.scope("/" + path.Dir(real))
	if path.Ext(real) == ".node" {
		n.p.extension(e, real)
		return
	}
	n.p.entry(e)
	switch path.Ext(real) {
	case ".json", ".wasm":
	default:
		n.source(string(n.p.r.text(e)), "/"+path.Dir(real), depth)
	}
}

// source loads what a source in that directory does.
func (n *nodeStart) source(text, dir string, depth int) {
	for _, i := range jsImports(text) {
		n.load(i.name, dir, i.required, depth+1)
	}
}

// scope adds the package.json that says how the files of a directory are to be read.
func (n *nodeStart) scope(dir string) {
	for d := dir; ; d = path.Dir(d) {
		if n.config(d) != nil || d == "/" || path.Base(d) == "node_modules" {
			return
		}
	}
}

// config is a directory's package.json, nil where there is none.
func (n *nodeStart) config(dir string) *nodePackage {
	if c, done := n.configs[dir]; done {
		return c
	}
	n.configs[dir] = nil
	e, _ := n.p.regular(path.Join(dir, "package.json"))
	if e == nil || e.Size > maxPackageBytes {
		return nil
	}
	n.p.entry(e)
	c := &nodePackage{dir: dir}
	if json.Unmarshal(n.p.r.text(e), c) != nil {
		c = &nodePackage{dir: dir}
	}
	n.configs[dir] = c
	return c
}

// load finds a module by its name in a source, and adds it.
func (n *nodeStart) load(name, dir string, required bool, depth int) {
	if name == "" || len(name) > maxPyQuoted || strings.HasPrefix(name, "node:") || strings.HasPrefix(name, "data:") {
		return
	}
	if first, _, _ := strings.Cut(name, "/"); nodeInside[first] && !strings.HasSuffix(name, "/") {
		return
	}
	name = strings.TrimPrefix(name, "file://")
	if strings.HasPrefix(name, "/") || name == "." || name == ".." || strings.HasPrefix(name, "./") || strings.HasPrefix(name, "../") {
		at := name
		if !path.IsAbs(at) {
			at = path.Join(dir, name)
		}
		if e, real := n.file(at, required); e != nil {
			n.module(e, real, depth)
		}
		return
	}
	if name[0] == '#' {
		for d := dir; ; d = path.Dir(d) {
			if c := n.config(d); c != nil {
				n.target(c, n.choose(c.Imports, name, required), depth)
				return
			}
			if d == "/" {
				return
			}
		}
	}
	parts := strings.SplitN(name, "/", 3)
	own := 1
	if name[0] == '@' {
		own = 2
	}
	own = min(own, len(parts))
	pkg := strings.Join(parts[:own], "/")
	sub := strings.TrimPrefix(name[len(pkg):], "/")
	for _, d := range n.searched(dir) {
		if e, real := n.p.resolve(path.Join(d, pkg)); e != nil && e.Kind == "dir" {
			if n.inPackage("/"+real, sub, required, depth) {
				return
			}
		}
		if e, real := n.file(path.Join(d, name), required); e != nil {
			n.module(e, real, depth)
			return
		}
	}
}

// searched is where a package is looked for from a directory.
func (n *nodeStart) searched(dir string) (dirs []string) {
	for d := dir; len(dirs) < maxLdDirs; d = path.Dir(d) {
		if path.Base(d) != "node_modules" {
			dirs = append(dirs, path.Join(d, "node_modules"))
		}
		if d == "/" {
			break
		}
	}
	for d := range strings.SplitSeq(n.p.env["NODE_PATH"], ":") {
		if path.IsAbs(d) && len(dirs) < 2*maxLdDirs {
			dirs = append(dirs, d)
		}
	}
	return append(dirs, nodeGlobals...)
}

// inPackage adds the file that a package has for a name below it.
func (n *nodeStart) inPackage(dir, sub string, required bool, depth int) bool {
	if c := n.config(dir); c != nil && len(c.Exports) > 0 {
		key := "."
		if sub != "" {
			key = "./" + sub
		}
		if n.target(c, n.choose(c.Exports, key, required), depth) {
			return true
		}
	}
	e, real := n.file(path.Join(dir, sub), true)
	if e == nil {
		return false
	}
	n.module(e, real, depth)
	return true
}

// target adds the file that a package's exports or imports name.
func (n *nodeStart) target(c *nodePackage, target string, depth int) bool {
	if target == "" {
		return false
	}
	if !strings.HasPrefix(target, "./") {
		n.load(target, c.dir, true, depth)
		return true
	}
	e, real := n.file(path.Join(c.dir, path.Clean("/"+target)), true)
	if e == nil {
		return false
	}
	n.module(e, real, depth)
	return true
}

// file is what a path of a module stands for: itself, with an ending, or a directory.
func (n *nodeStart) file(name string, guess bool) (*Entry, string) {
	if e, real := n.p.regular(name); e != nil {
		return e, real
	}
	if !guess {
		return nil, ""
	}
	for _, ending := range []string{".js", ".json", ".node", ".mjs", ".cjs"} {
		if e, real := n.p.regular(name + ending); e != nil {
			return e, real
		}
	}
	if e, real := n.p.resolve(name); e == nil || e.Kind != "dir" {
		return nil, ""
	} else if c := n.config("/" + real); c != nil && c.Main != "" {
		at := path.Join("/", real, path.Clean("/"+c.Main))
		for _, ending := range []string{"", ".js", ".json", ".node", "/index.js"} {
			if e, real := n.p.regular(at + ending); e != nil {
				return e, real
			}
		}
	}
	for _, index := range []string{"index.js", "index.json", "index.node"} {
		if e, real := n.p.regular(path.Join(name, index)); e != nil {
			return e, real
		}
	}
	return nil, ""
}
