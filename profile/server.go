package profile

import (
	"bytes"
	"path"
	"strings"
)

// defaultConfs is where servers look when no argument says.
var defaultConfs = map[string][]string{
	"nginx":        {"etc/nginx/nginx.conf", "usr/local/openresty/nginx/conf/nginx.conf"},
	"openresty":    {"usr/local/openresty/nginx/conf/nginx.conf"},
	"apache2":      {"etc/apache2/apache2.conf"},
	"httpd":        {"usr/local/apache2/conf/httpd.conf", "etc/httpd/conf/httpd.conf", "etc/apache2/httpd.conf"},
	"redis-server": {},
	"haproxy":      {"etc/haproxy/haproxy.cfg", "usr/local/etc/haproxy/haproxy.cfg"},
	"memcached":    {},
	"mysqld":       {"etc/mysql/my.cnf", "etc/my.cnf"},
	"mariadbd":     {"etc/mysql/my.cnf", "etc/my.cnf"},
	"caddy":        {"etc/caddy/Caddyfile"},
}

// systemFiles are what the C library reads of many programs; each is small.
var systemFiles = []string{"etc/nsswitch.conf", "etc/passwd", "etc/group", "etc/localtime"}

const (
	// maxConfFiles bounds the files that configurations name.
	maxConfFiles = 500
	maxConfBytes = 1 << 20
	// Bounds of all of them together.
	maxConfWords    = 1 << 20
	maxConfPatterns = 200
)

// server predicts a program about which nothing else is known: files that its arguments
// name, and the files that these name in turn.
func (p *predictor) server(name string, args []string) {
	for _, f := range systemFiles {
		p.whole(f)
	}
	c := &confs{p: p, seen: map[*Entry]bool{}, words: maxConfWords, patterns: maxConfPatterns}
	for _, f := range defaultConfs[name] {
		c.file(f, "/")
	}
	for _, a := range args {
		if _, value, ok := strings.Cut(a, "="); ok && strings.HasPrefix(a, "-") {
			a = value
		}
		c.file(p.inDir(a), "/")
	}
}

// confs follows the names in configuration files.
type confs struct {
	p    *predictor
	seen map[*Entry]bool
	// words and patterns may still be looked at.
	words, patterns int
}

// file takes in a file that a configuration names. prefix is what relative names in it
// may start from, beside the file's own directory.
func (c *confs) file(name, prefix string) {
	e, real := c.p.regular(name)
	if e == nil || c.seen[e] || len(c.seen) >= maxConfFiles {
		return
	}
	c.seen[e] = true
	if strings.HasSuffix(real, ".so") || strings.Contains(real, ".so.") {
		c.p.elf(e, real)
		return
	}
	if e.Size > maxConfBytes {
		return // data, not read to the end before the program is up
	}
	c.p.entry(e)
	text := c.p.r.text(e)
	if bytes.IndexByte(text, 0) >= 0 {
		return
	}
	dir := "/" + path.Dir(real)
	if prefix == "/" {
		prefix = dir
	}
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); len(line) == 0 || line[0] == '#' || line[0] == ';' {
			continue
		}
		for word := range strings.FieldsFuncSeq(string(line), func(r rune) bool { return strings.ContainsRune(" \t\"';,={}()<>", r) }) {
			c.word(word, dir, prefix)
		}
	}
}

// word follows one word of a configuration if it looks like a file's name.
func (c *confs) word(word, dir, prefix string) {
	if c.words--; c.words < 0 || !strings.ContainsAny(word, "./") || len(word) > MaxPathBytes || word == "/" || word == "." || word == ".." {
		return
	}
	from := []string{"/"}
	if !path.IsAbs(word) {
		from = []string{prefix, dir}
		if dir == prefix {
			from = from[:1]
		}
	}
	for _, d := range from {
		name := path.Join(d, word)
		if !strings.ContainsAny(word, "*?[") {
			c.file(name, prefix)
			continue
		}
		if c.patterns--; c.patterns < 0 {
			return
		}
		for _, match := range c.p.glob(name) {
			c.file(match, prefix)
		}
	}
}
