package profile

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"io"
	"path"
	"strings"
)

const (
	maxJars = 1000
	// maxWholeJarBytes: of larger jars only the directory and the beginning.
	maxWholeJarBytes = 32 << 20
	jarHeadBytes     = 8 << 20
	maxJarDirBytes   = 4 << 20 // 50,000 files
	maxManifestBytes = 256 << 10
	// sharedlessBytes of the classes' file are read at its beginning where the JVM has no
	// archive of the classes that every program needs.
	sharedlessBytes = 16 << 20
)

// javaFiles are what every JVM reads below its home, libraries in the order that they
// are loaded.
var javaFiles = []string{
	"lib/jvm.cfg", "conf/net.properties", "conf/security/java.security", "lib/tzdb.dat", "lib/currency.properties", "release",
}

var javaLibraries = []string{
	"lib/server/libjvm.so", "lib/libjava.so", "lib/libjimage.so", "lib/libzip.so", "lib/libnio.so", "lib/libnet.so", "lib/libextnet.so", "lib/libjsvml.so",
}

// java predicts a JVM with its arguments. real is its program's file.
func (p *predictor) java(real string, args []string) {
	home := path.Join("/", path.Dir(path.Dir(real)))
	for _, f := range javaFiles {
		p.whole(path.Join(home, f))
	}
	for n, l := range javaLibraries {
		e, real := p.regular(path.Join(home, l))
		if e == nil {
			continue
		}
		if n == 0 { // the program itself, in fact
			p.elf(e, real)
		} else {
			p.extension(e, real)
		}
	}
	j := &javaStart{p: p, jars: map[*Entry]bool{}}
	archive := path.Join(home, "lib/server/classes.jsa")
	options := strings.Fields(p.env["JDK_JAVA_OPTIONS"] + " " + p.env["JAVA_TOOL_OPTIONS"])
	options = append(options, args...)
	classPath, jar, main := p.env["CLASSPATH"], "", ""
	for k := 0; k < len(options); k++ {
		o := options[k]
		name, value, _ := strings.Cut(o, "=")
		switch {
		case (o == "-cp" || o == "-classpath" || o == "--class-path" || o == "-p" || o == "--module-path" || o == "-m" || o == "--module" || o == "--add-modules" || o == "--add-opens" || o == "--add-exports") && k+1 < len(options):
			k++
			if strings.Contains(o, "c") && strings.Contains(o, "p") || strings.Contains(o, "class") {
				classPath = options[k]
			} else if o == "-p" || o == "--module-path" {
				classPath += ":" + options[k]
			}
			if o == "-m" || o == "--module" {
				main = "-"
			}
		case o == "-jar" && k+1 < len(options):
			jar, main = options[k+1], "-"
		case name == "-XX:SharedArchiveFile":
			p.whole(p.inDir(value))
		case strings.HasPrefix(o, "-javaagent:"):
			file, _, _ := strings.Cut(o[len("-javaagent:"):], "=")
			j.jar(p.inDir(file))
		case strings.HasPrefix(o, "-"):
		case strings.HasPrefix(o, "@"):
			p.whole(p.inDir(o[1:]))
		default:
			main = o
		}
		if main != "" {
			break
		}
	}
	j.modules(path.Join(home, "lib/modules"), p.whole(archive) != nil)
	p.whole(path.Join(home, "lib/rt.jar")) // up to Java 8
	if jar != "" {
		j.jar(p.inDir(jar))
		return
	}
	if classPath == "" {
		classPath = "."
	}
	for c := range strings.SplitSeq(classPath, ":") {
		if dir, ok := strings.CutSuffix(c, "*"); ok {
			for _, name := range p.tree.Names(p.inDir(dir)) {
				if strings.HasSuffix(strings.ToLower(name), ".jar") {
					j.jar(path.Join(p.inDir(dir), name))
				}
			}
			continue
		}
		j.jar(p.inDir(c))
		p.whole(path.Join(p.inDir(c), strings.ReplaceAll(main, ".", "/")+".class"))
	}
}

// javaStart is one JVM's class path.
type javaStart struct {
	p    *predictor
	jars map[*Entry]bool
}

// modules adds the tables at the beginning of the JDK's classes; of the classes themselves
// few are read, if there is an archive of them.
func (j *javaStart) modules(name string, archived bool) {
	const magic, headerBytes = 0xCAFEDADA, 28
	e, _ := j.p.regular(name)
	if e == nil {
		return
	}
	h := j.p.r.at(e, 0, headerBytes)
	if len(h) < headerBytes {
		return
	}
	var order binary.ByteOrder = binary.LittleEndian
	if order.Uint32(h) != magic {
		order = binary.BigEndian
	}
	if order.Uint32(h) != magic {
		return
	}
	table, locations, names := int64(order.Uint32(h[16:])), int64(order.Uint32(h[20:])), int64(order.Uint32(h[24:]))
	n := headerBytes + 8*table + locations + names
	if !archived {
		n += sharedlessBytes
	}
	j.p.part(e, 0, min(n, maxWholeBytes))
}

// jar adds a jar, and those that its manifest names.
func (j *javaStart) jar(name string) {
	e, real := j.p.regular(name)
	if e == nil || j.jars[e] || len(j.jars) >= maxJars {
		return
	}
	j.jars[e] = true
	offset, bytes := j.directory(e)
	j.p.part(e, offset, bytes+64<<10)
	if e.Size <= maxWholeJarBytes {
		j.p.entry(e)
	} else {
		j.p.part(e, 0, jarHeadBytes)
	}
	if bytes == 0 {
		return
	}
	for _, other := range j.classPath(e) {
		if !strings.Contains(other, ":") {
			j.jar(path.Join("/", path.Dir(real), other))
		}
	}
}

// directory is where a zip file lists its files; 0 bytes where there is no list, or a
// huge one.
func (j *javaStart) directory(e *Entry) (offset, n int64) {
	const endBytes = 22
	from := max(0, e.Size-(64<<10)-endBytes)
	tail := j.p.r.at(e, from, e.Size-from)
	at := bytes.LastIndex(tail, []byte("PK\x05\x06"))
	if at < 0 || len(tail)-at < endBytes {
		return 0, 0
	}
	n, offset = int64(binary.LittleEndian.Uint32(tail[at+12:])), int64(binary.LittleEndian.Uint32(tail[at+16:]))
	if n > maxJarDirBytes || offset > e.Size-n {
		return 0, 0
	}
	return offset, n
}

// classPath is the Class-Path of a jar's manifest.
func (j *javaStart) classPath(e *Entry) []string {
	z, err := zip.NewReader(&readerAt{r: j.p.r, e: e}, e.Size)
	if err != nil {
		return nil
	}
	for _, f := range z.File {
		if f.Name != "META-INF/MANIFEST.MF" {
			continue
		}
		r, err := f.Open()
		if err != nil {
			return nil
		}
		defer r.Close()
		b, err := io.ReadAll(io.LimitReader(r, maxManifestBytes))
		if err != nil {
			return nil
		}
		text := strings.ReplaceAll(strings.ReplaceAll(string(b), "\r\n", "\n"), "\n ", "") // lines of 72 bytes
		for line := range strings.Lines(text) {
			if list, ok := strings.CutPrefix(line, "Class-Path:"); ok {
				return strings.Fields(list)
			}
		}
	}
	return nil
}
