package profile

import "strings"

// pyImport is one name that a Python module imports when it is imported itself.
type pyImport struct {
	level  int      // leading dots
	module string   // "a.b"; empty in "from . import x"
	names  []string // of "from ... import"; each may be a submodule
}

const (
	maxPyImports = 2000 // and names of one import
	maxPyLines   = 200_000
	// maxPyName is longer than any module's name, and maxPyImportBytes bounds all of a source: they are kept
	// while what they import is read.
	maxPyName        = 500
	maxPyImportBytes = 256 << 10
)

// pyImports finds a module's imports in its source. Those in functions run later and
// do not count, nor do those for another system, another version or type checkers. main
// says that the module is the program. dotted are the strings that may be modules' names,
// as settings have them.
func pyImports(source string, main bool) (found []pyImport, dotted []string) {
	s := pyScanner{text: source}
	bytes := 0
	skipDeeper := -1 // lines that are indented deeper than this are in a block that is left out
	for n := 0; n < maxPyLines && len(found) < maxPyImports; n++ {
		line, indent, ok := s.line()
		if !ok {
			break
		}
		names := s.dotted
		s.dotted = nil
		if skipDeeper >= 0 {
			if indent > skipDeeper {
				continue
			}
			skipDeeper = -1
		}
		dotted = append(dotted, names[:min(len(names), maxPyImports-len(dotted))]...)
		word := line
		if end := strings.IndexAny(line, " \t(:."); end >= 0 {
			word = line[:end]
		}
		body := line
		switch word {
		case "def", "async":
			skipDeeper = indent
			continue
		case "if", "elif":
			condition, after, _ := strings.Cut(line, ":")
			if !pyHolds(condition, main) {
				skipDeeper = indent
				continue
			}
			body = after
		case "else", "with", "try":
			_, body, _ = strings.Cut(line, ":")
		case "except":
			// What a module imports where an import failed: mostly the older of two names.
			if strings.Contains(line, "ImportError") || strings.Contains(line, "ModuleNotFoundError") {
				skipDeeper = indent
			}
			continue
		}
		for statement := range strings.SplitSeq(body, ";") {
			for i := range pyStatement(strings.TrimSpace(statement)) {
				if bytes += i.bytes(); len(found) == maxPyImports || bytes > maxPyImportBytes {
					return found, dotted
				}
				found = append(found, i)
			}
		}
	}
	return found, dotted
}

func (i pyImport) bytes() (n int) {
	n = len(i.module)
	for _, name := range i.names {
		n += len(name)
	}
	return n
}

// pyHolds says whether a condition may hold on Linux, today, at the start.
func pyHolds(condition string, main bool) bool {
	if strings.Contains(condition, " not ") || strings.Contains(condition, "!=") {
		return true
	}
	if strings.Contains(condition, "__name__") {
		return main
	}
	for _, never := range []string{"TYPE_CHECKING", `"win32"`, "'win32'", `"nt"`, "'nt'", "darwin", "cygwin", "emscripten", "PY2", "IS_WINDOWS", "is_windows", "MYPY",
		"version_info < (", "version_info[0] < 3", "version_info[0] == 2", "PYPY", "IS_PYPY"} {
		if strings.Contains(condition, never) {
			return false
		}
	}
	return true
}

// pyStatement is what one statement imports.
func pyStatement(line string) func(yield func(pyImport) bool) {
	return func(yield func(pyImport) bool) {
		if after, ok := strings.CutPrefix(line, "import "); ok {
			for name := range strings.SplitSeq(after, ",") {
				if f := firstWord(name); f != "" && len(f) <= maxPyName && !yield(pyImport{module: strings.Clone(f)}) {
					return
				}
			}
			return
		}
		if after, ok := strings.CutPrefix(line, "from "); ok {
			if i, ok := pyFrom(after); ok {
				yield(i)
			}
			return
		}
		for _, call := range []string{"import_module(", "__import__("} {
			_, after, ok := strings.Cut(line, call)
			if !ok || len(after) < 2 || (after[0] != '"' && after[0] != '\'') {
				continue
			}
			if name, _, ok := strings.Cut(after[1:], after[:1]); ok && name != "" && len(name) <= maxPyName && !strings.HasPrefix(name, ".") && !yield(pyImport{module: strings.Clone(name)}) {
				return
			}
		}
	}
}

// pyFrom is what stands behind "from".
func pyFrom(line string) (i pyImport, ok bool) {
	module, names, ok := strings.Cut(line, " import")
	if !ok || len(module) > 2*maxPyName {
		return i, false
	}
	module = strings.ReplaceAll(strings.TrimSpace(module), " ", "")
	i.module = strings.Clone(strings.TrimLeft(module, "."))
	i.level = len(module) - len(i.module)
	for name := range strings.SplitSeq(strings.Trim(strings.TrimSpace(names), "()"), ",") {
		if f := firstWord(name); f != "" && f != "*" && len(f) <= maxPyName {
			if i.names = append(i.names, strings.Clone(f)); len(i.names) == maxPyImports {
				break
			}
		}
	}
	return i, true
}

func firstWord(s string) string {
	for f := range strings.FieldsSeq(s) {
		return f
	}
	return ""
}

// pyScanner reads Python's logical lines: comments left out, brackets and continued
// lines joined, long strings emptied.
type pyScanner struct {
	text   string
	at     int
	dotted []string // strings like "a.b.c" since they were taken last
}

func (s *pyScanner) line() (line string, indent int, ok bool) {
	var b strings.Builder
	depth := 0
	start := true
	for s.at < len(s.text) {
		c := s.text[s.at]
		switch {
		case start && (c == ' ' || c == '\t' || c == '\f'):
			indent++
			if c == '\t' {
				indent += 7 - (indent-1)%8
			}
			s.at++
			continue
		case c == '#':
			for s.at < len(s.text) && s.text[s.at] != '\n' {
				s.at++
			}
			continue
		case c == '\n':
			s.at++
			if depth > 0 {
				b.WriteByte(' ')
				continue
			}
			if b.Len() > 0 {
				return b.String(), indent, true
			}
			indent, start = 0, true
			continue
		case c == '\\' && s.at+1 < len(s.text) && (s.text[s.at+1] == '\n' || s.text[s.at+1] == '\r'):
			s.at += 2
			b.WriteByte(' ')
			continue
		case c == '"' || c == '\'':
			start = false
			b.WriteString(s.quoted())
			continue
		case strings.IndexByte("([{", c) >= 0:
			depth++
		case strings.IndexByte(")]}", c) >= 0:
			depth = max(0, depth-1)
		}
		start = false
		if c != '\r' {
			b.WriteByte(c)
		}
		s.at++
	}
	return b.String(), indent, b.Len() > 0
}

// maxPyQuoted is the longest string that can be a module's name.
const maxPyQuoted = 200

// quoted reads a string, and returns it if it is short and plain.
func (s *pyScanner) quoted() string {
	from := s.at
	quote := s.text[s.at : s.at+1]
	long := strings.HasPrefix(s.text[s.at:], strings.Repeat(quote, 3))
	if long {
		quote = strings.Repeat(quote, 3)
	}
	s.at += len(quote)
	for s.at < len(s.text) {
		switch {
		case s.text[s.at] == '\\':
			s.at = min(s.at+2, len(s.text))
		case strings.HasPrefix(s.text[s.at:], quote):
			s.at += len(quote)
			if w := s.text[from:s.at]; !long && len(w) <= maxPyQuoted && !strings.ContainsAny(w, ";:") {
				if name := w[1 : len(w)-1]; strings.Contains(name, ".") && isDotted(name) && len(s.dotted) < maxPyImports {
					s.dotted = append(s.dotted, strings.Clone(name))
				}
				return w
			}
			return `""`
		case s.text[s.at] == '\n' && !long:
			return `""`
		default:
			s.at++
		}
	}
	return `""`
}
