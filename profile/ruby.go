package profile

import (
	"path"
	"regexp"
	"strings"
)

// rubyStart is one interpreter with what it has required.
type rubyStart struct {
	p      *predictor
	path   []string
	gems   []string // directories of gems
	loaded map[*Entry]bool
	missed map[string]bool
}

// rubyBoot is what an interpreter requires by itself.
var rubyBoot = []string{
	"enc/encdb.so", "enc/trans/transdb.so", "rubygems", "monitor.so", "monitor", "error_highlight", "did_you_mean", "syntax_suggest/core_ext",
}

// rubyRequire matches requires at the beginning of a line; autoloads come later, if ever.
var rubyRequire = regexp.MustCompile(`(?m)^[ \t]*(?:[a-z]+[ \t]+)?(require|require_relative|load)[ \t(]+["']([^"'#\n]{1,200})["']`)

const (
	maxGems   = 500
	maxMissed = 2000 // names that stand for nothing
)

// ruby predicts an interpreter whose program is the file real.
func (p *predictor) ruby(real string, args []string) {
	r := &rubyStart{p: p, loaded: map[*Entry]bool{}, missed: map[string]bool{}}
	r.home(path.Join("/", path.Dir(path.Dir(real)), "lib"))
	for _, b := range rubyBoot {
		r.require(b, 0)
	}
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		o := args[0]
		args = args[1:]
		switch {
		case strings.HasPrefix(o, "-r") && len(o) > 2:
			r.require(o[2:], 0)
		case strings.HasPrefix(o, "-I") && len(o) > 2:
			r.path = append([]string{p.inDir(o[2:])}, r.path...)
		case o == "-r" && len(args) > 0:
			r.require(args[0], 0)
			args = args[1:]
		case o == "-I" && len(args) > 0:
			r.path = append([]string{p.inDir(args[0])}, r.path...)
			args = args[1:]
		case o == "-e":
			if len(args) > 0 {
				r.source(args[0], p.cwd, 0)
			}
			return
		case o == "-S" && len(args) > 0:
			if _, _, called := p.program(args[0]); called != "" {
				args[0] = called
			}
		}
	}
	if len(args) == 0 {
		return
	}
	if e, script := p.regular(p.inDir(args[0])); e != nil {
		r.file(e, script, 0)
	}
	// What web servers and frameworks begin with.
	for _, f := range []string{"config.ru", "config/boot.rb", "config/application.rb", "config/environment.rb", "config/puma.rb", "Gemfile", "Gemfile.lock"} {
		if e, name := p.regular(p.inDir(f)); e != nil {
			r.file(e, name, 0)
		}
	}
}

// home finds the directories that are searched: the newest version's below lib, and those of
// gems.
func (r *rubyStart) home(lib string) {
	version := ""
	for _, name := range r.p.names(path.Join(lib, "ruby")) {
		if name[0] >= '1' && name[0] <= '9' {
			version = name // the last one
		}
	}
	for _, d := range []string{"ruby/site_ruby/" + version, "ruby/site_ruby", "ruby/vendor_ruby/" + version, "ruby/vendor_ruby", "ruby/" + version} {
		r.path = append(r.path, path.Join(lib, d))
	}
	for _, arch := range []string{"x86_64-linux", "x86_64-linux-gnu", "aarch64-linux", "aarch64-linux-gnu", "x86_64-linux-musl", "aarch64-linux-musl"} {
		r.path = append(r.path, path.Join(lib, "ruby", version, arch), path.Join(lib, arch, "ruby", version), path.Join(lib, arch, "ruby/vendor_ruby", version))
	}
	homes := []string{path.Join(lib, "ruby/gems", version), "/usr/local/bundle", "/usr/share/rubygems-integration/all", "/usr/share/rubygems-integration/" + version, "/var/lib/gems/" + version}
	if own := r.p.env["GEM_HOME"]; path.IsAbs(own) {
		homes = append([]string{own}, homes...)
	}
	for _, b := range r.p.glob(path.Join(r.p.cwd, "vendor/bundle/ruby/*")) {
		homes = append([]string{b}, homes...)
	}
	for _, h := range homes {
		for _, name := range r.p.names(path.Join(h, "specifications")) {
			r.p.whole(path.Join(h, "specifications", name))
		}
		for _, name := range r.p.names(path.Join(h, "gems")) {
			if len(r.gems) < maxGems {
				r.gems = append(r.gems, path.Join(h, "gems", name, "lib"))
			}
		}
	}
}

// require finds what a name stands for, and loads it.
func (r *rubyStart) require(name string, depth int) {
	if path.IsAbs(name) {
		r.at(name, depth)
		return
	}
	if r.missed[name] || len(r.missed) >= maxMissed {
		return
	}
	for _, dirs := range [][]string{r.path, r.gems} {
		for _, d := range dirs {
			if r.at(path.Join(d, name), depth) {
				return
			}
		}
	}
	r.missed[name] = true
}

// at loads the file of that name, with an ending or without.
func (r *rubyStart) at(name string, depth int) bool {
	for _, ending := range []string{"", ".rb", ".so"} {
		if e, real := r.p.regular(name + ending); e != nil && (ending != "" || strings.HasSuffix(name, ".rb") || strings.HasSuffix(name, ".so")) {
			r.file(e, real, depth)
			return true
		}
	}
	return false
}

func (r *rubyStart) file(e *Entry, real string, depth int) {
	if r.loaded[e] || len(r.loaded) >= maxModules || depth > maxImportDepth || r.p.r.err != nil {
		return
	}
	r.loaded[e] = true
	if strings.HasSuffix(real, ".so") {
		r.p.extension(e, real)
		return
	}
	r.p.entry(e)
	r.source(string(r.p.r.text(e)), "/"+path.Dir(real), depth)
}

// source requires what a source in that directory does.
func (r *rubyStart) source(text, dir string, depth int) {
	text, _, _ = strings.Cut(text, "\n__END__\n")
	type load struct {
		name     string
		relative bool
	}
	found := rubyRequire.FindAllStringSubmatch(text, maxJSImports)
	loads := make([]load, 0, len(found))
	for _, m := range found {
		loads = append(loads, load{strings.Clone(m[2]), m[1] == "require_relative"}) // the text is not kept while others are read
	}
	for _, l := range loads {
		if l.relative {
			r.at(path.Join(dir, l.name), depth+1)
		} else {
			r.require(l.name, depth+1)
		}
	}
}
