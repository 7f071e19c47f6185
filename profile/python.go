package profile

import (
	"path"
	"strconv"
	"strings"
)

const (
	// maxModules bounds a language's modules. Python with pandas and scipy imports 1,500.
	maxModules = 8000
	// maxImportDepth bounds imports that import.
	maxImportDepth = 400
)

// pythonStart is one interpreter with what it has imported.
type pythonStart struct {
	p       *predictor
	minor   int    // of Python 3
	tag     string // in the names of compiled modules: "cpython-311"
	suffix  string // of extension modules
	stdlib  string
	path    []string
	modules map[string]*pyModule // by full name
}

// pyModule is a module that was found.
type pyModule struct {
	dirs []string // of a package: where its modules are
}

// pyFrozen are part of the interpreter from 3.11 on.
var pyFrozen = map[string]bool{
	"_collections_abc": true, "_sitebuiltins": true, "abc": true, "codecs": true, "genericpath": true, "importlib.machinery": true, "importlib.util": true,
	"io": true, "ntpath": true, "os": true, "posixpath": true, "runpy": true, "site": true, "stat": true, "zipimport": true, "importlib": true, "importlib._bootstrap": true, "importlib._bootstrap_external": true,
}

// pyServers import by names that they make, or get as arguments.
var pyServers = map[string][]string{
	"gunicorn": {"gunicorn.app.wsgiapp", "gunicorn.workers.sync", "gunicorn.glogging"},
	"uvicorn": {"uvicorn.main", "uvicorn.loops.auto", "uvicorn.protocols.http.auto", "uvicorn.protocols.websockets.auto", "uvicorn.lifespan.on", "uvloop", "httptools",
		"uvicorn.protocols.http.httptools_impl", "uvicorn.protocols.http.h11_impl"},
	"flask": {"flask.cli"}, "hypercorn": {"hypercorn.__main__"}, "celery": {"celery.bin.celery"}, "daphne": {"daphne.cli"}, "waitress-serve": {"waitress.runner"},
}

// python predicts an interpreter that was called by that name, whose file is real.
func (p *predictor) python(called, real string, args []string) {
	s := &pythonStart{p: p, modules: map[string]*pyModule{}}
	if !s.home(called, real) {
		return
	}
	p.whole("usr/lib/locale/C.utf8/LC_CTYPE")
	for _, m := range []string{"encodings", "encodings.aliases", "encodings.utf_8", "site", "sitecustomize", "usercustomize"} {
		s.load(m, 0)
	}
	for len(args) > 0 && strings.HasPrefix(args[0], "-") && args[0] != "-" {
		option := args[0]
		args = args[1:]
		if len(args) == 0 {
			return
		}
		switch option[len(option)-1] {
		case 'c':
			s.path = append([]string{p.cwd}, s.path...)
			s.source(args[0], "__main__", false, true, true, 0)
			return
		case 'm':
			s.path = append([]string{p.cwd}, s.path...)
			s.load("runpy", 0)
			s.loadMain(args[0])
			s.server(args[0], args[1:])
			return
		case 'W', 'X':
			args = args[1:]
		}
	}
	if len(args) == 0 {
		return
	}
	e, script := p.regular(p.inDir(args[0]))
	if e == nil { // a directory with a program
		dir := p.inDir(args[0])
		if e, script = p.regular(path.Join(dir, "__main__.py")); e == nil {
			return
		}
	}
	p.entry(e)
	s.path = append([]string{"/" + path.Dir(script)}, s.path...)
	s.source(string(p.r.text(e)), "__main__", false, true, true, 0)
	s.server(path.Base(args[0]), args[1:])
}

// home finds the version, and where modules are.
func (s *pythonStart) home(called, real string) bool {
	prefix := path.Dir(path.Dir(real))
	base := path.Base(real)
	_, minor, ok := strings.Cut(base, "3.")
	n, err := strconv.Atoi(strings.TrimRight(minor, "dmu"))
	if !ok || err != nil {
		return false
	}
	s.minor, s.tag = n, "cpython-3"+strconv.Itoa(n)
	version := "python3." + strconv.Itoa(n)
	stdlib := path.Join("/", prefix, "lib", version)
	if len(s.p.names(stdlib)) == 0 {
		stdlib = path.Join("/", prefix, "lib64", version)
	}
	dynload := path.Join(stdlib, "lib-dynload")
	for _, name := range s.p.names(dynload) {
		if at := strings.Index(name, "."+s.tag+"-"); at >= 0 {
			s.suffix = name[at:]
			break
		}
	}
	for d := range strings.SplitSeq(s.p.env["PYTHONPATH"], ":") {
		if d != "" && len(s.path) < maxLdDirs {
			s.path = append(s.path, s.p.inDir(d))
		}
	}
	s.stdlib = stdlib
	s.path = append(s.path, stdlib, dynload)
	sites := []string{path.Join("/usr/local/lib", version, "dist-packages"), "/usr/lib/python3/dist-packages", path.Join("/usr/local/lib", version, "site-packages"), path.Join(stdlib, "site-packages")}
	venv := path.Dir(path.Dir(called))
	if e, _ := s.p.regular(path.Join(venv, "pyvenv.cfg")); e != nil {
		s.p.entry(e)
		own := path.Join(venv, "lib", version, "site-packages")
		if strings.Contains(string(s.p.r.text(e)), "include-system-site-packages = true") {
			sites = append([]string{own}, sites...)
		} else {
			sites = []string{own}
		}
	}
	done := map[string]bool{}
	for _, site := range sites {
		if e, name := s.p.resolve(site); e != nil && e.Kind == "dir" && !done[name] {
			done[name] = true
			s.path = append(s.path, site)
			s.pth(site)
		}
	}
	return true
}

// pth reads a site directory's path files.
func (s *pythonStart) pth(site string) {
	for _, name := range s.p.names(site) {
		if !strings.HasSuffix(name, ".pth") {
			continue
		}
		e := s.p.whole(path.Join(site, name))
		for line := range strings.Lines(string(s.p.r.text(e))) {
			line = strings.TrimSpace(line)
			if line == "" || line[0] == '#' || len(s.path) > maxLdDirs {
				continue
			}
			if strings.HasPrefix(line, "import ") {
				s.source(line, "", false, false, false, 0)
			} else if d := path.Join(site, line); path.IsAbs(line) {
				s.path = append(s.path, line)
			} else {
				s.path = append(s.path, d)
			}
		}
	}
}

// server imports what a server's program is told to by its arguments, and by itself.
func (s *pythonStart) server(program string, args []string) {
	program = strings.TrimSuffix(program, ".__main__")
	own, known := pyServers[program]
	if !known {
		return
	}
	s.path = append([]string{s.p.cwd}, s.path...)
	for _, m := range own {
		s.load(m, 0)
	}
	if program == "flask" {
		args = append(args, s.p.env["FLASK_APP"], "app", "wsgi")
	}
	for _, a := range args {
		if _, value, ok := strings.Cut(a, "="); ok && strings.HasPrefix(a, "-") {
			a = value
		}
		if e, real := s.p.resolve(s.p.inDir(a)); strings.Contains(a, "/") && e != nil && e.Kind == "dir" {
			s.path = append([]string{"/" + real}, s.path...) // --chdir and its like
			continue
		}
		module, _, _ := strings.Cut(a, ":")
		module = strings.TrimSuffix(module, ".py")
		if isDotted(module) && s.load(module, 0) == nil {
			if parent, _, ok := cutLast(module); ok { // a class in it
				s.load(parent, 0)
			}
		}
	}
}

func isDotted(s string) bool {
	for part := range strings.SplitSeq(s, ".") {
		if !isName(part) {
			return false
		}
	}
	return true
}

func cutLast(s string) (before, after string, ok bool) {
	at := strings.LastIndexByte(s, '.')
	if at < 0 {
		return "", s, false
	}
	return s[:at], s[at+1:], true
}

// loadMain is load for "-m".
func (s *pythonStart) loadMain(name string) {
	if m := s.load(name, 0); m != nil && m.dirs != nil {
		s.load(name+".__main__", 0)
	}
}

// load imports a module with its parents; nil where it has no file.
func (s *pythonStart) load(name string, depth int) *pyModule {
	if m, done := s.modules[name]; done {
		return m
	}
	if len(s.modules) >= maxModules || depth > maxImportDepth || s.p.r.err != nil || len(name) > 500 {
		return nil
	}
	dirs := s.path
	parent, last, below := cutLast(name)
	if below {
		m := s.load(parent, depth+1)
		if m == nil || m.dirs == nil {
			return nil
		}
		if m, done := s.modules[name]; done { // by its parent
			return m
		}
		dirs = m.dirs
	}
	s.modules[name] = nil
	m := &pyModule{}
	var namespace []string
	for _, d := range dirs {
		e, real := s.p.resolve(path.Join(d, last))
		if e != nil && e.Kind == "dir" {
			m.dirs = []string{"/" + real}
			s.modules[name] = m
			if s.file(path.Join("/", real, "__init__"), name, true, depth) {
				return m
			}
			m.dirs, s.modules[name] = nil, nil
			namespace = append(namespace, "/"+real)
		}
		s.modules[name] = m
		if s.file(path.Join(d, last), name, false, depth) {
			return m
		}
		s.modules[name] = nil
	}
	if before, after, ok := strings.Cut(name, ".extern."); ok && namespace == nil { // as pkg_resources has others' packages
		vendored := s.load(before+"._vendor."+after, depth+1)
		s.modules[name] = vendored
		return vendored
	}
	if namespace != nil {
		m.dirs = namespace
		s.modules[name] = m
		return m
	}
	return nil
}

// file loads a module from the file of that name, without a suffix, if there is one.
func (s *pythonStart) file(stem, name string, isPackage bool, depth int) bool {
	for _, suffix := range []string{s.suffix, ".abi3.so", ".so"} {
		if suffix == "" {
			continue
		}
		if e, real := s.p.regular(stem + suffix); e != nil {
			s.p.extension(e, real)
			return true
		}
	}
	if e, real := s.p.regular(stem + ".py"); e != nil {
		compiled, _ := s.p.regular(path.Join("/", path.Dir(real), "__pycache__", strings.TrimSuffix(path.Base(real), ".py")+"."+s.tag+".pyc"))
		switch {
		case s.minor >= 11 && pyFrozen[name]:
		case compiled != nil:
			s.p.entry(compiled)
		default:
			s.p.entry(e)
		}
		s.source(string(s.p.r.text(e)), name, isPackage, false, !strings.Contains(real, "-packages/") && !strings.HasPrefix("/"+real, s.stdlib), depth)
		return true
	}
	return s.p.whole(stem+".pyc") != nil
}

// source imports what a module's source does. own says that it is neither the library's nor
// a package's that was installed.
func (s *pythonStart) source(text, name string, isPackage, main, own bool, depth int) {
	imports, dotted := pyImports(text, main)
	for _, i := range imports {
		module := i.module
		if i.level > 0 {
			base := name
			up := i.level
			if isPackage {
				up--
			}
			for range up {
				base, _, _ = cutLast(base)
			}
			if base == "" {
				continue
			}
			module = strings.TrimSuffix(base+"."+i.module, ".")
		}
		m := s.load(module, depth+1)
		if m == nil || m.dirs == nil {
			continue
		}
		for _, n := range i.names {
			s.load(module+"."+n, depth+1)
		}
	}
	if own {
		s.named(dotted, depth)
	}
}

// named loads modules that the image's own source names in strings, such as Django's
// settings.
func (s *pythonStart) named(dotted []string, depth int) {
	for _, name := range dotted {
		m := s.load(name, depth+1)
		if parent, _, _ := cutLast(name); m == nil {
			s.load(parent, depth+1) // a class in it
		} else if m.dirs != nil && s.modules["django"] != nil {
			s.load(name+".apps", depth+1)
			s.load(name+".models", depth+1)
		}
	}
}
