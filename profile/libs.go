package profile

import (
	"bytes"
	"encoding/binary"
	"path"
	"slices"
	"strings"
)

// What the loader reads beside the libraries.
const (
	ldCache       = "etc/ld.so.cache"
	ldConf        = "etc/ld.so.conf"
	cacheMagic    = "glibc-ld.so.cache1.1"
	cacheOldMagic = "ld.so-1.7.0"
	maxCacheBytes = 4 << 20
	maxLdDirs     = 256
)

// loader finds libraries as the image's own dynamic loader would.
type loader struct {
	cache map[string][]string // of ld.so.cache, by name
	dirs  []string            // searched last
	extra []string            // LD_LIBRARY_PATH
	confs int                 // files read for dirs
}

// loaderOf reads the loader's configuration. interp is the program's interpreter, which
// says whose it is.
func (p *predictor) loaderOf(interp string) *loader {
	musl := strings.HasPrefix(path.Base(interp), "ld-musl-")
	if l := p.loaders[musl]; l != nil {
		return l
	}
	l := &loader{cache: map[string][]string{}}
	p.loaders[musl] = l
	for d := range strings.SplitSeq(strings.ReplaceAll(p.env["LD_LIBRARY_PATH"], ";", ":"), ":") {
		if strings.HasPrefix(d, "/") && len(l.extra) < maxLdDirs {
			l.extra = append(l.extra, d)
		}
	}
	if musl {
		arch := strings.TrimSuffix(strings.TrimPrefix(path.Base(interp), "ld-musl-"), ".so.1")
		l.dirs = []string{"/lib", "/usr/local/lib", "/usr/lib"}
		if e := p.whole("etc/ld-musl-" + arch + ".path"); e != nil {
			l.dirs = strings.FieldsFunc(string(p.r.text(e)), func(r rune) bool { return r == ':' || r == '\n' })
		}
		l.dirs = l.dirs[:min(len(l.dirs), maxLdDirs)]
		return l
	}
	if e, _ := p.resolve(ldCache); e != nil && e.Regular() && e.Size <= maxCacheBytes {
		l.cache = readLdCache(p.r.at(e, 0, e.Size))
	}
	if len(l.cache) == 0 {
		l.conf(p, ldConf, 0)
	}
	l.dirs = append(l.dirs, "/lib", "/usr/lib", "/lib64", "/usr/lib64")
	return l
}

// conf reads ld.so.conf and what it includes; only an image that never ran ldconfig needs
// it.
func (l *loader) conf(p *predictor, name string, depth int) {
	if l.confs++; l.confs > maxLdDirs {
		return
	}
	e, _ := p.resolve(name)
	for line := range strings.Lines(string(p.r.text(e))) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "include" && depth < 4:
			pattern := f[1]
			if !path.IsAbs(pattern) {
				pattern = path.Join(path.Dir("/"+name), pattern)
			}
			for _, m := range p.glob(pattern) {
				l.conf(p, m, depth+1)
			}
		case len(f) == 1 && path.IsAbs(f[0]) && len(l.dirs) < maxLdDirs:
			l.dirs = append(l.dirs, f[0])
		}
	}
}

// readLdCache is each library's paths in a ld.so.cache of glibc 2.2 or later. Those for
// special processors are left out.
func readLdCache(b []byte) map[string][]string {
	const headerBytes, entryBytes = 48, 24
	libs := map[string][]string{}
	if bytes.HasPrefix(b, []byte(cacheOldMagic)) { // the new format follows the old
		at := bytes.Index(b, []byte(cacheMagic))
		if at < 0 {
			return libs
		}
		b = b[at:]
	}
	if len(b) < headerBytes || !bytes.HasPrefix(b, []byte(cacheMagic)) {
		return libs
	}
	var order binary.ByteOrder = binary.LittleEndian
	count := int64(order.Uint32(b[20:]))
	if count*entryBytes > int64(len(b)) {
		order = binary.BigEndian
		count = int64(order.Uint32(b[20:]))
	}
	all := string(b) // all names are parts of it: many may share one long one
	text := func(at uint32) string {
		if int64(at) >= int64(len(all)) {
			return ""
		}
		s, _, ended := strings.Cut(all[at:min(len(all), int(at)+maxStringBytes)], "\x00")
		if !ended {
			return ""
		}
		return s
	}
	for n := range min(count, int64(len(b)-headerBytes)/entryBytes) {
		e := b[headerBytes+n*entryBytes:]
		if order.Uint64(e[16:]) != 0 {
			continue
		}
		if name, file := text(order.Uint32(e[4:])), text(order.Uint32(e[8:])); name != "" && file != "" {
			libs[name] = append(libs[name], file)
		}
	}
	return libs
}

// find is the library called name that fits a program, needed by a file with the given
// search paths.
func (l *loader) find(p *predictor, name string, like *elfFile, rpaths, runpaths []string) (*Entry, *elfFile) {
	fits := func(file string) (*Entry, *elfFile) {
		e, _ := p.resolve(file)
		if e == nil || !e.Regular() {
			return nil, nil
		}
		if f := p.elfOf(e); f != nil && f.machine == like.machine && f.is64 == like.is64 {
			return e, f
		}
		return nil, nil
	}
	if strings.Contains(name, "/") {
		return fits(name)
	}
	for _, dirs := range [][]string{rpaths, l.extra, runpaths} {
		for _, d := range dirs {
			if e, f := fits(path.Join(d, name)); e != nil {
				return e, f
			}
		}
	}
	for _, file := range l.cache[name] {
		if e, f := fits(file); e != nil {
			return e, f
		}
	}
	for _, d := range l.dirs {
		if e, f := fits(path.Join(d, name)); e != nil {
			return e, f
		}
	}
	return nil, nil
}

// searchDirs splits a RPATH or RUNPATH, with what it says of the file's own place.
func searchDirs(list, origin string) (dirs []string) {
	for d := range strings.SplitSeq(list, ":") {
		if d == "" || len(dirs) == maxLdDirs {
			continue
		}
		d = strings.NewReplacer("${ORIGIN}", origin, "$ORIGIN", origin, "${LIB}", "lib", "$LIB", "lib").Replace(d)
		if path.IsAbs(d) && len(d) <= MaxPathBytes {
			dirs = append(dirs, d)
		}
	}
	return dirs
}

// library is a file whose libraries are still to be found.
type library struct {
	file   *elfFile
	name   string // real
	rpaths []string
}

// elf adds a program or library and all that it is linked with, in the order that the
// loader maps them. It reports whether e is one. name is e's real name.
func (p *predictor) elf(e *Entry, name string) bool {
	f := p.elfOf(e)
	if f == nil {
		return false
	}
	if p.mapped[e] {
		return true
	}
	p.mapped[e] = true
	p.addELF(e, f)
	l := p.loaderOf(p.interp)
	if f.interp != "" {
		if i, _ := p.resolve(f.interp); i != nil && i.Regular() {
			if g := p.elfOf(i); g != nil && !p.mapped[i] {
				p.mapped[i] = true
				p.addELF(i, g)
			}
			p.interp = f.interp
			l = p.loaderOf(f.interp)
			if len(f.needed) > 0 && len(l.cache) > 0 {
				p.whole(ldCache)
			}
		}
	}
	queue := []library{{f, name, nil}}
	for len(queue) > 0 && p.r.err == nil {
		lib := queue[0]
		queue = queue[1:]
		origin := "/" + path.Dir(lib.name)
		runpaths := searchDirs(lib.file.runpath, origin)
		rpaths := lib.rpaths
		if lib.file.runpath == "" {
			rpaths = append(searchDirs(lib.file.rpath, origin), rpaths...)
			rpaths = rpaths[:min(len(rpaths), maxLdDirs)]
		}
		for _, needed := range lib.file.needed {
			if p.loaded[needed] { // one of that name is there already
				continue
			}
			e, f := l.find(p, needed, lib.file, rpaths, runpaths)
			if e == nil {
				continue
			}
			p.loaded[needed] = true
			if p.mapped[e] {
				continue
			}
			p.mapped[e] = true
			p.addELF(e, f)
			queue = append(queue, library{f, e.Path, slices.Clone(rpaths)})
			if strings.HasPrefix(needed, "libcrypto.so") {
				p.whole("usr/lib/ssl/openssl.cnf")
				p.whole("etc/ssl/openssl.cnf")
			}
		}
	}
	return true
}

// extension is elf for what a running program loads.
func (p *predictor) extension(e *Entry, name string) {
	before := p.extensions
	p.extensions = true
	p.elf(e, name)
	p.extensions = before
}

// elfOf is e's headers, read once.
func (p *predictor) elfOf(e *Entry) *elfFile {
	if f, ok := p.elves[e]; ok {
		return f
	}
	f := p.r.readELF(e)
	p.elves[e] = f
	return f
}

// Bounds of what is predicted of one program or library, measured with node, python and
// java: the kernel reads 128 KiB around each fault, so up to some size nearly all of the
// code comes in, and of larger ones what the linker put first.
const (
	maxHeadBytes     = 16 << 20 // symbols and relocations, which the loader goes through
	maxWritableBytes = 16 << 20 // relocated
	maxCodeBytes     = 20 << 20
	maxReadOnlyBytes = 6 << 20
	// An extension that a language loads, with what it is linked with, is mostly asked
	// for a few functions.
	maxExtensionBytes = 1 << 20
	// Constant data of a library with next to no code is looked up here and there.
	littleCodeBytes = 64 << 10
	tableBytes      = 256 << 10
	// A small file comes in whole: the parts that are not mapped lie between the others.
	smallELFBytes = 256 << 10
)

// addELF adds the parts of a program or library that a start touches. What is not
// mapped, such as debugging information, is left out.
func (p *predictor) addELF(e *Entry, f *elfFile) {
	if e.Size <= smallELFBytes {
		p.entry(e)
		return
	}
	code := int64(0)
	for _, l := range f.loads {
		if l.flags&pfExecute != 0 {
			code += l.bytes
		}
	}
	add := func(wanted func(n int, l load) bool, limit int64) {
		for n, l := range f.loads {
			if wanted(n, l) {
				p.part(e, l.offset, min(l.bytes, limit))
			}
		}
	}
	head := func(n int, l load) bool { return n == 0 && l.flags&(pfExecute|pfWrite) == 0 }
	maxCode, maxReadOnly := int64(maxCodeBytes), int64(maxReadOnlyBytes)
	// All of OpenSSL's code is walked through: it tests and registers itself.
	if p.extensions && !strings.HasPrefix(path.Base(e.Path), "libcrypto.so") {
		maxCode, maxReadOnly = maxExtensionBytes, maxExtensionBytes
	}
	add(head, maxHeadBytes)
	add(func(_ int, l load) bool { return l.flags&pfWrite != 0 }, maxWritableBytes)
	add(func(_ int, l load) bool { return l.flags&pfExecute != 0 }, maxCode)
	if code < littleCodeBytes {
		maxReadOnly = tableBytes
	}
	add(func(n int, l load) bool { return l.flags&(pfExecute|pfWrite) == 0 && !head(n, l) }, maxReadOnly)
}
