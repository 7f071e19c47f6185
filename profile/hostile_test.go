package profile_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"

	"accel"
	"accel/profile"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// takes says how much memory do asks for in all.
func takes(do func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Whatever an image's maker writes, a prediction takes bounded memory, and ends.
func TestHostileImages(t *testing.T) {
	bin := elf{}.String()
	double := strings.Repeat("A=$A$A\nexport B=\"$A$A$B\"\n", 100)
	end := "PK\x05\x06\x00\x00\x00\x00\xff\xff\xff\xff\xa0\x00\x00\x00\x00\x00\x00\x00\x00\x00" // 65,535 files in 160 bytes
	cache := []string{}
	long := "/" + strings.Repeat("l/", 2000) + "lib.so"
	for n := range 20_000 {
		cache = append(cache, fmt.Sprint("lib", n%3, ".so"), "/lib/x.so")
	}
	cache[1] = long
	for name, c := range map[string]struct {
		files map[string]string
		start profile.Start
	}{
		"variables that double":   {map[string]string{"bin/sh": bin, "c": double + ". /c\n" + double + "/$A $B\n"}, profile.Start{Cmd: []string{"sh", "/c", "x"}, Env: []string{"A=" + strings.Repeat("a", 1000)}}},
		"arguments that double":   {map[string]string{"bin/sh": bin, "c": strings.Repeat(`. /c "$@" "$@"`+"\n"+`/c "$@" "$@" "$@" "$@" "$@" "$@"`+"\n", 500)}, profile.Start{Cmd: append([]string{"sh", "/c"}, strings.Fields(strings.Repeat("argument ", 900))...)}},
		"arguments in one word":   {map[string]string{"bin/sh": bin, "c": strings.Repeat(`"$A$A$A$A$A$A$A$A" `, 100_000)}, profile.Start{Cmd: []string{"sh", "/c"}, Env: []string{"A=" + strings.Repeat("a", 120_000)}}},
		"a directory that grows":  {map[string]string{"bin/sh": bin, "c": strings.Repeat("cd ./"+strings.Repeat("d", 200)+"\n", 2000), "d": "x"}, profile.Start{Cmd: []string{"sh", "/c"}}},
		"a path of a million":     {map[string]string{"bin/sh": bin, "c": strings.Repeat("program\n", 9000)}, profile.Start{Cmd: []string{"sh", "/c"}, Env: []string{"PATH=/bin:" + strings.Repeat(":", 100_000)}}},
		"one import of a million": {map[string]string{"usr/bin/python3.11": bin, "usr/lib/python3.11/site.py": "import " + strings.Repeat("site,", 800_000) + "\nfrom x import " + strings.Repeat("y,", 50_000)}, profile.Start{Cmd: []string{"python3.11", "-m", "site"}}},
		"exports of many stars": {map[string]string{
			"usr/bin/node": bin, "node_modules/b/package.json": `{"exports":{"./*":"./` + strings.Repeat("*", 100_000) + `"}}`, "a.js": strings.Repeat("require('b/"+strings.Repeat("x", 180)+"')\n", 100),
		}, profile.Start{Cmd: []string{"node", "/a.js"}}},
		"a jar of files that are not there": {map[string]string{"opt/jdk/bin/java": bin, "a.jar": strings.Repeat("PK\x01\x02", 40) + end}, profile.Start{Cmd: []string{"/opt/jdk/bin/java", "-jar", "/a.jar"}}},
		"a cache of one long name":          {map[string]string{"bin/app": elf{interp: glibc, needed: []string{"lib0.so", "lib1.so"}}.String(), "lib64/ld-linux-x86-64.so.2": bin, "etc/ld.so.cache": ldCache(cache...)}, profile.Start{Cmd: []string{"/bin/app"}}},
		"a configuration of words":          {map[string]string{"usr/sbin/nginx": bin, "etc/nginx/nginx.conf": "include /*/*/*;" + strings.Repeat("./a/* ", 150_000)}, profile.Start{Cmd: []string{"nginx"}}},
	} {
		t.Run(name, func(t *testing.T) {
			v := imageOf(t, c.files)
			if n := takes(func() { predicted(t, v, c.start) }); n > 1<<30 {
				t.Errorf("it takes %d MB", n>>20)
			}
		})
	}
}

// An entry's size is what a TOC claims; a jar has room for as many files as it says.
func TestHostileJar(t *testing.T) {
	l := layerOf(t, file("opt/jdk/bin/java", 4, "j"))
	l.toc = bytes.Replace(l.toc, []byte(`]}`), []byte(`,{"name":"a.jar","type":"reg","size":1125899906842624,"offset":5}]}`), 1)
	tail := append([]byte("PK\x06\x06"), bytes.Repeat([]byte{0xff}, 52)...)
	tail = append(append(tail, "PK\x06\x07"...), make([]byte, 16)...)
	tail = append(append(tail, "PK\x05\x06"...), bytes.Repeat([]byte{0xff}, 18)...)
	tail[len(tail)-1], tail[len(tail)-2] = 0, 0
	v := profile.View{Tree: treeOf(t, l), Read: func(_ context.Context, _ int, e *profile.Entry, offset, n int64) ([]byte, error) {
		b := make([]byte, n)
		if e.Path != "a.jar" {
			copy(b, elf{}.String()[offset:])
		} else if offset+n == e.Size {
			copy(b[max(0, len(b)-len(tail)):], tail)
		}
		return b, nil
	}}
	if n := takes(func() {
		_, err := profile.Predict(t.Context(), v, profile.Start{Cmd: []string{"/opt/jdk/bin/java", "-jar", "/a.jar"}})
		must(t, err)
	}); n > 64<<20 {
		t.Errorf("it takes %d MB", n>>20)
	}
}

// A million lines, nonsense, and patterns that take long to match: what a list means is found within bounds.
func TestHostileLists(t *testing.T) {
	var files []*estargz.TOCEntry
	for d := range 100 {
		for f := range 100 {
			files = append(files, file(fmt.Sprintf("%s/d%d/%s%d", "data", d, strings.Repeat("a", 200), f), 10, "x"))
		}
	}
	files = append(files, file("app/[id]/page.js", 5, "p"), file("app/i/page.js", 6, "q"), file("etc/passwd", 7, "r"))
	tree := treeOf(t, layerOf(t, files...))
	list := func(lines ...string) profile.Listing {
		t.Helper()
		var l profile.Listing
		if n := takes(func() {
			var err error
			l, err = profile.Listed(t.Context(), tree, lines)
			must(t, err)
		}); n > 1<<30 {
			t.Errorf("%.60q takes %d MB", lines[0], n>>20)
		}
		return l
	}
	same(t, list("../../etc/passwd", "/etc/../../..//etc/passwd/").Items, "0:etc/passwd:0:7") // as at the container's root
	same(t, list("app/[id]/page.js").Items, "0:app/[id]/page.js:0:5")                         // a name that is there
	same(t, list("app/[i]/page.js").Items, "0:app/i/page.js:0:6")
	l := list("nul\x00", "\xff", "[", "no/such", "app/*/gone", strings.Repeat("x/", 4000), "/")
	if len(l.Unmatched) != 6 || len(l.Items) != len(files) {
		t.Errorf("%d unmatched, %d items", len(l.Unmatched), len(l.Items))
	}
	if l := list(repeated("/data/*/*", 1_000_000)...); len(l.Items) != 10_000 {
		t.Errorf("%d items of a million lines", len(l.Items))
	}
	slow := "/data/*/" + strings.Repeat("a*", 100) + "b"
	list(repeated(slow, profile.MaxListed)...)
	list(repeated("/*/*/"+strings.Repeat("x/", 2000)+"*", profile.MaxListed)...)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := profile.Listed(ctx, tree, repeated(slow, profile.MaxListed)); !errors.Is(err, context.Canceled) {
		t.Errorf("it goes on when it is stopped: %v", err)
	}
	v := profile.View{Tree: tree, Read: func(context.Context, int, *profile.Entry, int64, int64) ([]byte, error) { return nil, io.EOF }}
	if _, err := profile.Predict(ctx, v, profile.Start{Cmd: []string{"/data/d1/*"}}); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func repeated(line string, n int) []string {
	lines := make([]string, n)
	for k := range lines {
		lines[k] = line
	}
	return lines
}

// endless gives a beginning, then the same again and again, and counts what is taken.
type endless struct {
	begin, again string
	n            int64
}

func (e *endless) Read(p []byte) (n int, err error) {
	for n < len(p) {
		var from string
		if at := int(e.n); at < len(e.begin) {
			from = e.begin[at:]
		} else {
			from = e.again[(at-len(e.begin))%len(e.again):]
		}
		k := copy(p[n:], from)
		n, e.n = n+k, e.n+int64(k)
	}
	return n, nil
}

// A TOC is refused before it fills the memory: by its files, the directories that these need, chunks, and one
// value that does not end.
func TestHostileTOCs(t *testing.T) {
	deep := strings.Repeat("d/", 2000)
	for what, c := range map[string]struct {
		begin, again string
		mostBytes    int64
	}{
		"a name without an end":                      {`{"entries":[{"name":"`, "a", 16 << 20},
		"another value":                              {`{"x":[`, `"aaaa",`, 16 << 20},
		"files, chunks and whiteouts without an end": {`{"entries":[{"name":"a"}`, `,{"name":"a","type":"reg","size":9,"offset":1},{"name":"a","type":"chunk","offset":2},{"name":".wh..wh..opq","type":"reg"}`, 128 << 20},
	} {
		r := &endless{begin: c.begin, again: c.again}
		if err := profile.NewBuilder().Add(t.Context(), r); !errors.Is(err, accel.ErrInvalid) || r.n > c.mostBytes {
			t.Errorf("%s: %v after %d bytes", what, err, r.n)
		}
	}
	var toc strings.Builder
	toc.WriteString(`{"entries":[{"name":"a"}`)
	for n := range 2000 {
		fmt.Fprintf(&toc, `,{"name":"%d/%sf","type":"reg"}`, n, deep)
	}
	toc.WriteString(`]}`)
	if err := profile.NewBuilder().Add(t.Context(), strings.NewReader(toc.String())); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("four million directories: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := profile.NewBuilder().Add(ctx, &endless{begin: `{"entries":[{"name":"a"}`, again: `,{"name":"a","type":"chunk"}`}); !errors.Is(err, context.Canceled) {
		t.Errorf("it goes on when it is stopped: %v", err)
	}
}

func TestFileChunks(t *testing.T) {
	l := layerOf(t, file("a", 3*chunkBytes, "a"), file("b", 10, "b"))
	l.toc = bytes.Replace(l.toc, []byte(`]}`), []byte(`,{"name":"bad","type":"reg","size":100,"offset":9,"chunkSize":60},{"name":"bad","type":"chunk","offset":9,"chunkOffset":50,"chunkSize":50},
		{"name":"bad","type":"chunk","offset":9,"chunkOffset":60,"chunkSize":41},{"name":"a","type":"chunk","offset":9,"chunkOffset":9},{"name":"bad","type":"chunk","offset":11,"chunkOffset":60}]}`), 1)
	tree := treeOf(t, l)
	for name, want := range map[string]string{"a": "0+65536 65536+65536 131072+65536", "b": "0+10", "bad": "0+60 60+40"} {
		e, _ := tree.Lookup(name)
		var got []string
		for _, c := range e.Chunks {
			got = append(got, fmt.Sprintf("%d+%d", c.Offset, c.Bytes))
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%s: %s, want %s", name, g, want)
		}
	}
	if e, _ := tree.Lookup("a"); e.Chunks[1].SHA256 != l.chunks[1].Digest || e.Chunks[1].Member != l.chunks[1].BlobOffset {
		t.Errorf("%+v", e.Chunks[1])
	}
}
