package profile

import (
	"context"
	"errors"
	"path"
	"slices"
	"strings"
)

// Start is what an image's configuration says about its start.
type Start struct {
	Entrypoint, Cmd, Env []string
	WorkingDir           string
	// Listed is what the image's maker lists; it comes first.
	Listed []Item
}

const (
	// maxWholeBytes is the largest file that is predicted whole.
	maxWholeBytes = 32 << 20
	// maxPredictedBytes bounds a prediction: beyond it, guesses cost more than they save.
	maxPredictedBytes = 256 << 20
)

// Predict is what a start of an image that never ran will read, as far as its files
// tell: the program and its libraries, its interpreter, the files that a language
// reads when it starts, and what the program's source imports. Nothing of the image
// is run. The error is the view's, or ctx's; nothing in an image is one.
func Predict(ctx context.Context, v View, s Start) ([]Item, error) {
	p := &predictor{
		r: &reader{work: &work{ctx: ctx, left: maxWork}, view: v, unread: maxReadBytes}, tree: v.Tree, env: map[string]string{}, seen: map[place]*spans{},
		elves: map[*Entry]*elfFile{}, mapped: map[*Entry]bool{}, loaded: map[string]bool{}, loaders: map[bool]*loader{}, cwd: "/",
	}
	for _, kv := range s.Env {
		if k, value, ok := strings.Cut(kv, "="); ok {
			p.set(k, value)
		}
	}
	if p.env["PATH"] == "" {
		p.env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	if s.WorkingDir != "" {
		p.changeDir(s.WorkingDir)
	}
	p.items = append(p.items, s.Listed[:min(len(s.Listed), MaxItems)]...)
	for _, i := range p.items {
		covered(p.seen, i)
	}
	p.run(slices.Concat(s.Entrypoint, s.Cmd), 0)
	if err := p.r.err; err != nil && !errors.Is(err, errSpent) {
		return nil, err
	}
	return bounded(p.items, MaxItems, maxPredictedBytes), nil
}

// predictor collects one image's items.
type predictor struct {
	r    *reader
	tree *Tree
	env  map[string]string
	cwd  string // absolute

	items []Item
	seen  map[place]*spans

	elves      map[*Entry]*elfFile
	mapped     map[*Entry]bool  // programs and libraries that are in already
	loaded     map[string]bool  // libraries' names as they are linked
	loaders    map[bool]*loader // by whether it is musl's
	extensions bool             // what is loaded now is no program, but loaded by one
	interp     string           // the program's dynamic loader
	commands   int              // looked into
}

const (
	maxVariables = 1000
	// maxWordBytes is the kernel's MAX_ARG_STRLEN, of an argument or a variable with its name.
	maxWordBytes = 128 << 10
)

// set sets an environment variable, as a system would take it.
func (p *predictor) set(name, value string) {
	if _, known := p.env[name]; (known || len(p.env) < maxVariables) && len(name)+len(value) < maxWordBytes {
		p.env[name] = value
	}
}

// changeDir is cd.
func (p *predictor) changeDir(to string) {
	if len(to) > MaxPathBytes {
		return
	}
	if dir := path.Join("/", p.inDir(to)); len(dir) <= MaxPathBytes {
		p.cwd = dir
	}
}

// part adds some bytes of a file, widened to pages.
func (p *predictor) part(e *Entry, offset, bytes int64) {
	if e == nil || !e.Regular() || offset < 0 || offset >= e.Size || bytes <= 0 || len(p.items) >= MaxItems {
		return
	}
	from := offset &^ (pageBytes - 1)
	to := min((offset+min(bytes, e.Size-offset)+pageBytes-1)&^(pageBytes-1), e.Size)
	i := Item{Layer: e.Layer, Path: e.Path, Offset: from, Bytes: to - from, Content: e.Content}
	for _, s := range covered(p.seen, i) {
		i.Offset, i.Bytes = s.from, s.to-s.from
		p.items = append(p.items, i)
	}
}

// entry adds a whole file, or the beginning of a huge one.
func (p *predictor) entry(e *Entry) {
	if e != nil {
		p.part(e, 0, min(e.Size, maxWholeBytes))
	}
}

// whole adds the file of that name; nil where there is none.
func (p *predictor) whole(name string) *Entry {
	e, _ := p.regular(name)
	if e == nil {
		return nil
	}
	p.entry(e)
	return e
}

// inDir is a name as a program would mean it. One that is too long names nothing, and stays.
func (p *predictor) inDir(name string) string {
	if path.IsAbs(name) || len(name) > MaxPathBytes {
		return name
	}
	return path.Join(p.cwd, name)
}

// resolve looks a name up, within the bound.
func (p *predictor) resolve(name string) (*Entry, string) { return p.tree.resolve(p.r.work, name) }

// names lists a directory, and glob matches names, within the bound.
func (p *predictor) names(dir string) []string    { return p.tree.names(p.r.work, dir) }
func (p *predictor) glob(pattern string) []string { return p.tree.glob(p.r.work, pattern) }

// regular resolves a name to a file with content.
func (p *predictor) regular(name string) (*Entry, string) {
	e, real := p.resolve(name)
	if e == nil || !e.Regular() {
		return nil, ""
	}
	return e, real
}

// program finds what a shell would run under that name: its file, that one's real name,
// and the path by which it was found.
func (p *predictor) program(name string) (e *Entry, real, called string) {
	if name == "" || len(name) > MaxPathBytes {
		return nil, "", ""
	}
	if strings.Contains(name, "/") {
		e, real = p.regular(p.inDir(name))
		return e, real, p.inDir(name)
	}
	for d := range strings.SplitSeq(p.env["PATH"], ":") {
		if p.r.err != nil {
			break
		}
		called = path.Join(p.inDir(d), name)
		if e, real = p.regular(called); e != nil && e.Executable() {
			return e, real, called
		}
	}
	return nil, "", ""
}
