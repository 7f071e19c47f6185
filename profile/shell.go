package profile

import "strings"

// allArguments is how shellCommands says "$@".
const allArguments = "\x00@"

const (
	maxShellCommands = 10_000
	// maxShellWords bounds those of all commands of one text.
	maxShellWords = 100_000
)

// shellCommands splits a shell's text into simple commands of words. It knows quotes,
// comments, separators and plain variables, which it looks up; words with anything else
// that a shell would expand are kept as they are, and will name no file. Here-documents
// and functions are not understood: their lines look like commands, of which most will
// not exist.
//
// Words are at most maxWordBytes long, and what they hold is paid by w: a word may be made of many variables.
func shellCommands(w *work, text string, lookup func(string) (string, bool)) (commands [][]string) {
	s := shellScanner{w: w, text: text, lookup: lookup, left: maxShellWords}
	for s.at < len(s.text) && len(commands) < maxShellCommands && s.left > 0 && w.err == nil {
		if words := s.command(); len(words) > 0 {
			commands = append(commands, words)
		}
	}
	return commands
}

type shellScanner struct {
	w      *work
	text   string
	at     int
	lookup func(string) (string, bool)
	left   int // words
}

// shellWord is a word that is made; what is beyond the bound is left out.
type shellWord struct {
	strings.Builder
	w *work
}

func (b *shellWord) add(s string) {
	if s = s[:min(len(s), maxWordBytes-b.Len())]; s != "" && b.w.spend(len(s)) {
		b.WriteString(s)
	}
}

// command reads words until a separator.
func (s *shellScanner) command() (words []string) {
	for s.at < len(s.text) {
		switch c := s.text[s.at]; {
		case c == ' ' || c == '\t' || c == '\r':
			s.at++
		case strings.HasPrefix(s.text[s.at:], "\\\n"):
			s.at += 2
		case c == '#':
			for s.at < len(s.text) && s.text[s.at] != '\n' {
				s.at++
			}
		case strings.IndexByte("\n;&|()", c) >= 0:
			s.at++
			return words
		case c == '<' || c == '>':
			for s.at < len(s.text) && strings.IndexByte("<>&- \t", s.text[s.at]) >= 0 {
				s.at++
			}
			s.word() // the file's name, or the end of a here-document
		default:
			from := s.at
			w := s.word()
			if s.at < len(s.text) && (s.text[s.at] == '<' || s.text[s.at] == '>') && strings.Trim(s.text[from:s.at], "0123456789") == "" {
				continue // the number of a redirected descriptor
			}
			if w != "" || strings.ContainsAny(s.text[from:s.at], `"'`) { // an empty variable is no word
				if s.left--; s.left < 0 || s.w.err != nil {
					return nil
				}
				words = append(words, w)
			}
		}
	}
	return words
}

// word reads one word.
func (s *shellScanner) word() string {
	w := shellWord{w: s.w}
	for s.at < len(s.text) {
		c := s.text[s.at]
		switch {
		case strings.IndexByte(" \t\r\n;&|()<>", c) >= 0:
			return w.String()
		case c == '\\':
			s.at++
			if s.at < len(s.text) {
				if s.text[s.at] != '\n' {
					w.add(s.text[s.at : s.at+1])
				}
				s.at++
			}
		case c == '\'':
			end := strings.IndexByte(s.text[s.at+1:], '\'')
			if end < 0 {
				end = len(s.text) - s.at - 1
			}
			w.add(s.text[s.at+1 : s.at+1+end])
			s.at = min(s.at+end+2, len(s.text))
		case c == '"':
			s.at++
			for s.at < len(s.text) && s.text[s.at] != '"' {
				switch {
				case s.text[s.at] == '\\' && s.at+1 < len(s.text):
					w.add(s.text[s.at+1 : s.at+2])
					s.at += 2
				case s.text[s.at] == '$':
					s.variable(&w)
				default:
					w.add(s.text[s.at : s.at+1])
					s.at++
				}
			}
			s.at = min(s.at+1, len(s.text))
		case c == '$':
			s.variable(&w)
		default:
			w.add(s.text[s.at : s.at+1])
			s.at++
		}
	}
	return w.String()
}

// variable reads $name, ${name}, ${name:-default} or $@.
func (s *shellScanner) variable(w *shellWord) {
	rest := s.text[s.at+1:]
	name, fallback, n := "", "", 0
	switch {
	case strings.HasPrefix(rest, "@") || strings.HasPrefix(rest, "*"):
		w.add(allArguments)
		s.at += 2
		return
	case strings.HasPrefix(rest, "{"):
		end := strings.IndexByte(rest[:min(len(rest), maxStringBytes)], '}')
		if end < 0 {
			break
		}
		name, n = rest[1:end], end+1
		if name == "@" {
			w.add(allArguments)
			s.at += 1 + n
			return
		}
		if plain, other, ok := strings.Cut(name, ":-"); ok {
			name, fallback = plain, other
		}
	default:
		for n < len(rest) && isNameByte(rest[n], n) {
			n++
		}
		name = rest[:n]
	}
	if !isName(name) {
		w.add("$")
		s.at++
		return
	}
	s.at += 1 + n
	if v, ok := s.lookup(name); ok && v != "" {
		w.add(v)
	} else {
		w.add(fallback)
	}
}
