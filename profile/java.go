package profile

import (
	"encoding/binary"
	"path"
	"strings"
)

const (
	maxJars = 1000
	// maxWholeJarBytes: of larger jars only the directory and the beginning.
	maxWholeJarBytes = 32 << 20
	jarHeadBytes     = 8 << 20
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
	// A variable may hold as many words as it has room for.
	options = options[:min(len(options), 2*maxArgs)]
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
	class := strings.ReplaceAll(main, ".", "/") + ".class"
	for c := range strings.SplitSeq(classPath, ":") {
		if p.r.err != nil || len(class) > MaxPathBytes {
			return
		}
		if dir, ok := strings.CutSuffix(c, "*"); ok {
			for _, name := range p.names(p.inDir(dir)) {
				if strings.HasSuffix(strings.ToLower(name), ".jar") {
					j.jar(path.Join(p.inDir(dir), name))
				}
			}
			continue
		}
		j.jar(p.inDir(c))
		p.whole(path.Join(p.inDir(c), class))
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
	z := j.p.readZip(e)
	j.p.part(e, z.offset, z.bytes+zipTailBytes)
	if e.Size <= maxWholeJarBytes {
		j.p.entry(e)
	} else {
		j.p.part(e, 0, jarHeadBytes)
	}
	list := z.classPath(j.p)
	for other := range strings.FieldsSeq(list) {
		if !strings.Contains(other, ":") {
			j.jar(path.Join("/", path.Dir(real), other))
		}
	}
}
