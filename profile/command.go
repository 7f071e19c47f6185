package profile

import (
	"bytes"
	"path"
	"slices"
	"strings"
)

const (
	// maxCommands bounds the programs and scripts that are looked into: entry scripts call
	// many.
	maxCommands = 64
	// maxDepth bounds programs that run programs.
	maxDepth = 8
	// maxArgs and maxArgBytes bound a command line; each word is bounded by maxWordBytes too.
	maxArgs     = 1000
	maxArgBytes = 1 << 20
)

// fits says that a command line is within the bounds.
func fits(argv []string) bool {
	bytes := 0
	for _, a := range argv[:min(len(argv), maxArgs)] {
		if bytes += len(a); len(a) > maxWordBytes || bytes > maxArgBytes {
			return false
		}
	}
	return len(argv) <= maxArgs
}

// run predicts a command: the program, its interpreter, and what its arguments make
// it read.
func (p *predictor) run(argv []string, depth int) {
	if len(argv) == 0 || depth > maxDepth || !fits(argv) || p.r.err != nil {
		return
	}
	if p.commands++; p.commands > maxCommands {
		return
	}
	e, real, called := p.program(argv[0])
	if e == nil {
		return
	}
	if line := p.shebang(e); line != nil {
		p.entry(e)
		p.run(append(append(line, called), argv[1:]...), depth+1)
		return
	}
	if !p.elf(e, real) {
		// No ELF file and no #!: execvp hands it to the shell.
		if text := p.r.text(e); len(text) > 0 && bytes.IndexByte(text, 0) < 0 {
			p.run(append([]string{"/bin/sh", "/" + real}, argv[1:]...), depth+1)
		} else {
			p.entry(e)
		}
		return
	}
	p.arguments(called, real, argv[1:], depth)
}

// shebang is the interpreter's command line in a script's first line, nil for anything
// else.
func (p *predictor) shebang(e *Entry) []string {
	head := p.r.at(e, 0, 256)
	if !bytes.HasPrefix(head, []byte("#!")) {
		return nil
	}
	line, _, _ := bytes.Cut(head[2:], []byte("\n"))
	return strings.Fields(string(line))
}

// arguments predicts what a program that is known reads because of its arguments. called is
// the path by which it was found, real its file.
func (p *predictor) arguments(called, real string, args []string, depth int) {
	name, base := path.Base(called), path.Base(real)
	switch {
	case isShell(name):
		p.shell(args, depth)
	case wrappers[name] != nil:
		p.run(wrappers[name](args), depth+1)
	case base == "busybox" && len(args) > 0 && name == base:
		p.arguments(args[0], args[0], args[1:], depth+1)
	case strings.HasPrefix(base, "python") || strings.HasPrefix(base, "pypy"):
		p.python(called, real, args)
	case name == "node" || name == "nodejs" || base == "node":
		p.node(args, depth)
	case name == "java" || base == "java":
		p.java(real, args)
	case strings.HasPrefix(base, "ruby"):
		p.ruby(real, args)
	default:
		p.server(name, args)
	}
}

func isShell(name string) bool {
	switch name {
	case "sh", "bash", "dash", "ash", "zsh", "ksh":
		return true
	}
	return false
}

// wrappers run the rest of their command line.
var wrappers = map[string]func([]string) []string{
	"env":  envCommand,
	"nice": func(a []string) []string { return skipWords(a, "n", false) },
	"tini": func(a []string) []string { return skipWords(a, "pe", false) }, "docker-init": func(a []string) []string { return skipWords(a, "pe", false) },
	"dumb-init": func(a []string) []string { return skipWords(a, "r", false) }, "exec": func(a []string) []string { return skipWords(a, "a", false) },
	"nohup": func(a []string) []string { return skipWords(a, "", false) }, "setsid": func(a []string) []string { return skipWords(a, "", false) },
	"stdbuf": func(a []string) []string { return skipWords(a, "ioe", false) }, "catchsegv": func(a []string) []string { return a },
	"ionice": func(a []string) []string { return skipWords(a, "cnp", false) },
	// These have a word of their own before the command.
	"gosu": skipFirst, "su-exec": skipFirst, "chroot": skipFirst,
	"timeout": func(a []string) []string { return skipFirst(skipWords(a, "ks", false)) },
	"setpriv": func(a []string) []string { return skipWords(a, "", false) },
	"chpst":   func(a []string) []string { return skipWords(a, "uUbednmo/", false) },
}

// envCommand is what env runs. Behind -S stands a whole command line, which the first line
// of a script has in words already.
func envCommand(a []string) []string {
	for n, w := range a {
		if w == "-S" && n+1 < len(a) {
			a = append(append(append([]string(nil), a[:n]...), strings.Fields(a[n+1])...), a[n+2:]...)
			break
		}
	}
	return skipWords(a, "uC", true)
}

func skipFirst(a []string) []string { return a[min(1, len(a)):] }

// skipWords leaves options out, those of one letter in withValue with their value; and
// variables' settings, where they may stand there.
func skipWords(a []string, withValue string, variables bool) []string {
	for len(a) > 0 {
		w := a[0]
		switch {
		case w == "--":
			return a[1:]
		case len(w) == 2 && w[0] == '-' && strings.Contains(withValue, w[1:]):
			a = a[1:]
		case strings.HasPrefix(w, "-") && len(w) > 1:
		case variables && strings.Contains(w, "=") && !strings.HasPrefix(w, "="):
		default:
			return a
		}
		a = a[min(1, len(a)):]
	}
	return nil
}

// shell predicts "sh -c text" and "sh script".
func (p *predictor) shell(args []string, depth int) {
	for len(args) > 0 && strings.HasPrefix(args[0], "-") && args[0] != "-" {
		options := args[0]
		args = args[1:]
		if !strings.HasPrefix(options, "--") && strings.Contains(options, "c") {
			if len(args) > 0 {
				p.script(args[0], args[min(2, len(args)):], depth)
			}
			return
		}
		if options == "-o" && len(args) > 0 {
			args = args[1:]
		}
	}
	if len(args) == 0 {
		return
	}
	if e, _ := p.regular(p.inDir(args[0])); e != nil {
		p.entry(e)
		p.script(string(p.r.text(e)), args[1:], depth)
	}
}

// script predicts a shell's commands, as if all of them were run once. args are what "$@"
// stands for.
func (p *predictor) script(text string, args []string, depth int) {
	cwd := p.cwd
	defer func() { p.cwd = cwd }()
	ran := map[string]bool{}
	for _, words := range shellCommands(p.r.work, text, func(name string) (string, bool) { v, ok := p.env[name]; return v, ok }) {
		if p.commands > maxCommands || p.r.err != nil {
			return
		}
		words = withArguments(p.simple(words), args)
		if len(words) == 0 || !fits(words) || !p.r.spend(len(words)) {
			continue
		}
		switch words[0] {
		case "cd":
			if len(words) > 1 {
				p.changeDir(words[1])
			}
			continue
		case ".", "source":
			if p.commands++; len(words) > 1 && p.commands <= maxCommands {
				if e, _ := p.regular(p.inDir(words[1])); e != nil && depth < maxDepth {
					p.entry(e)
					p.script(string(p.r.text(e)), args, depth+1)
				}
			}
			continue
		}
		if key := strings.Join(words, "\x00"); !ran[key] {
			ran[key] = true
			p.run(words, depth+1)
		}
	}
}

// withArguments puts args where a command says "$@"; nil where that makes too many words.
func withArguments(words, args []string) []string {
	if !slices.Contains(words, allArguments) {
		return words
	}
	var all []string
	for _, w := range words {
		more := []string{w}
		if w == allArguments {
			more = args
		}
		if len(all)+len(more) > maxArgs {
			return nil
		}
		all = append(all, more...)
	}
	return all
}

// simple takes what is not the command itself from a simple command's front, and keeps
// the variables that it sets.
func (p *predictor) simple(words []string) []string {
	for len(words) > 0 {
		switch w := words[0]; w {
		case "exec", "command", "if", "then", "else", "elif", "while", "until", "do", "!", "{", "time", "export", "readonly", "local", "nohup":
			words = words[1:]
		default:
			k, v, ok := strings.Cut(w, "=")
			if !ok || !isName(k) {
				return words
			}
			p.set(k, v)
			words = words[1:]
		}
	}
	return nil
}

func isName(s string) bool {
	for n := range len(s) {
		if !isNameByte(s[n], n) {
			return false
		}
	}
	return s != ""
}

func isNameByte(c byte, n int) bool {
	return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (n > 0 && c >= '0' && c <= '9')
}
