package profile

import "strings"

// jsImport is a module's name as a JavaScript source has it.
type jsImport struct {
	name     string
	required bool // by require(), not by import
}

const maxJSImports = 1000

// jsImports finds what a source loads when it is loaded itself. What stands in braces
// is in a function mostly, and runs later; but where all of a file is wrapped in one, as
// bundlers do, everything counts.
func jsImports(source string) []jsImport {
	s := jsScanner{text: source}
	s.scan()
	if len(s.top) == 0 {
		return s.all
	}
	return s.top
}

type jsScanner struct {
	text     string
	at       int
	depth    int // of braces
	top, all []jsImport
	// regexp says that a slash would begin a regular expression here, not divide.
	regexp bool
	word   string // the last one, if only spaces and an opening parenthesis followed
	from   bool   // the statement began with import or export
}

func (s *jsScanner) scan() {
	for s.at < len(s.text) && len(s.all) < maxJSImports {
		c := s.text[s.at]
		switch {
		case strings.HasPrefix(s.text[s.at:], "//"), s.at == 0 && strings.HasPrefix(s.text, "#!"):
			s.skipTo("\n")
		case strings.HasPrefix(s.text[s.at:], "/*"):
			s.skipTo("*/")
		case c == '\'' || c == '"' || c == '`':
			s.literal(s.quoted(c))
		case c == '/' && s.regexp:
			s.skipRegexp()
		case isWordByte(c):
			begin := s.at
			for s.at < len(s.text) && isWordByte(s.text[s.at]) {
				s.at++
			}
			s.take(s.text[begin:s.at], begin)
		default:
			s.punctuation(c)
			s.at++
		}
	}
}

func (s *jsScanner) take(word string, begin int) {
	if begin > 0 && s.text[begin-1] == '.' {
		word = "." + word // a property
	}
	switch word {
	case "import", "export":
		s.from = s.depth == 0
	}
	s.word = word
	switch word {
	case "return", "typeof", "case", "in", "of", "do", "else", "void", "delete", "throw", "new":
		s.regexp = true
	default:
		s.regexp = false
	}
}

func (s *jsScanner) punctuation(c byte) {
	switch c {
	case ' ', '\t', '\r', '\n':
		return
	case '{':
		s.depth++
	case '}':
		s.depth = max(0, s.depth-1)
	case '(':
		s.regexp = true
		if s.word != "require" && s.word != "import" {
			s.word = ""
		}
		return
	case ';':
		s.from = false
	}
	s.word = ""
	s.regexp = c != ')' && c != ']' && c != '}'
}

// literal takes a string that a word came before.
func (s *jsScanner) literal(text string) {
	word := s.word
	s.word, s.regexp = "", false
	required := word == "require"
	if text == "" || (!required && word != "import" && (word != "from" || !s.from)) {
		return
	}
	i := jsImport{name: strings.Clone(text), required: required} // the source is not kept while others are read
	s.all = append(s.all, i)
	if s.depth == 0 || (word == "from" && s.from) {
		s.top = append(s.top, i)
	}
	s.from = false
}

// quoted reads a string, and returns it if it is short and plain.
func (s *jsScanner) quoted(quote byte) string {
	s.at++
	begin := s.at
	plain := true
	for s.at < len(s.text) {
		switch c := s.text[s.at]; {
		case c == '\\':
			plain = false
			s.at = min(s.at+2, len(s.text))
		case c == quote:
			text := s.text[begin:s.at]
			s.at++
			if plain && len(text) <= maxPyQuoted {
				return text
			}
			return ""
		case c == '\n' && quote != '`':
			return "" // no string after all
		case c == '$' && quote == '`' && strings.HasPrefix(s.text[s.at:], "${"):
			plain = false
			s.at++
		default:
			s.at++
		}
	}
	return ""
}

func (s *jsScanner) skipRegexp() {
	s.at++
	inClass := false
	for s.at < len(s.text) {
		switch s.text[s.at] {
		case '\\':
			s.at++
		case '[':
			inClass = true
		case ']':
			inClass = false
		case '\n':
			return
		case '/':
			if !inClass {
				s.at++
				s.regexp = false
				return
			}
		}
		s.at++
	}
}

func (s *jsScanner) skipTo(end string) {
	n := strings.Index(s.text[s.at:], end)
	if n < 0 {
		s.at = len(s.text)
		return
	}
	s.at += n + len(end)
}

func isWordByte(c byte) bool {
	return c == '_' || c == '$' || c >= 0x80 || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')
}
