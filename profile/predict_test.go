package profile_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"accel"
	"accel/profile"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// imageOf is an image of one layer with files by name. "-> x" makes a symlink; everything
// may be run.
func imageOf(t testing.TB, files map[string]string) profile.View {
	t.Helper()
	var entries []*estargz.TOCEntry
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if to, ok := strings.CutPrefix(files[name], "-> "); ok {
			entries = append(entries, symlink(name, to))
		} else {
			entries = append(entries, file(name, int64(len(files[name])), files[name]))
		}
	}
	return profile.View{Tree: treeOf(t, layerOf(t, entries...)), Read: func(_ context.Context, _ int, e *profile.Entry, offset, n int64) ([]byte, error) {
		return []byte(files[e.Path][offset : offset+n]), nil
	}}
}

// elf is a program or library for amd64.
type elf struct {
	interp, rpath, runpath string
	needed                 []string
	code                   int64 // bytes of it
	machine                uint16
}

func (x elf) String() string {
	var names bytes.Buffer
	names.WriteByte(0)
	name := func(s string) uint64 {
		at := names.Len()
		names.WriteString(s + "\x00")
		return uint64(at)
	}
	const base, headers = 0x400000, 64 + 4*56
	var dynamic []uint64
	for _, n := range x.needed {
		dynamic = append(dynamic, 1, name(n))
	}
	if x.rpath != "" {
		dynamic = append(dynamic, 15, name(x.rpath))
	}
	if x.runpath != "" {
		dynamic = append(dynamic, 29, name(x.runpath))
	}
	interp := x.interp + "\x00"
	stringsAt := headers + len(interp)
	dynamic = append(dynamic, 5, uint64(base+stringsAt), 0, 0)
	dynamicAt := stringsAt + names.Len()
	codeAt := dynamicAt + 8*len(dynamic)
	if x.machine == 0 {
		x.machine = 62
	}
	var b bytes.Buffer
	le := func(v ...any) {
		for _, one := range v {
			binary.Write(&b, binary.LittleEndian, one)
		}
	}
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	le(uint16(3), x.machine, uint32(1), uint64(0), uint64(64), uint64(0), uint32(0), uint16(64), uint16(56), uint16(4), uint16(0), uint16(0), uint16(0))
	segment := func(kind, flags uint32, at, n int) {
		le(kind, flags, uint64(at), uint64(base+at), uint64(base+at), uint64(n), uint64(n), uint64(4096))
	}
	segment(1, 4, 0, codeAt)
	segment(1, 5, codeAt, int(x.code))
	segment(2, 6, dynamicAt, 8*len(dynamic))
	kind := uint32(3)
	if x.interp == "" {
		kind = 0
	}
	segment(kind, 4, headers, len(interp))
	b.WriteString(interp)
	b.Write(names.Bytes())
	le(dynamic)
	b.WriteString(strings.Repeat("c", int(x.code)))
	return b.String()
}

// ldCache is a ld.so.cache of name, file, name, file...
func ldCache(pairs ...string) string {
	var b, names bytes.Buffer
	le := binary.LittleEndian
	head := 48 + 24*len(pairs)/2
	b.WriteString("glibc-ld.so.cache1.1")
	binary.Write(&b, le, []uint32{uint32(len(pairs) / 2), 0, 0, 0, 0, 0, 0})
	for n := 0; n < len(pairs); n += 2 {
		key := uint32(head + names.Len())
		names.WriteString(pairs[n] + "\x00")
		value := uint32(head + names.Len())
		names.WriteString(pairs[n+1] + "\x00")
		binary.Write(&b, le, []uint32{0x303, key, value, 0, 0, 0})
	}
	return b.String() + names.String()
}

// predicted is the names of the files that a start of a view is predicted to read, in
// order.
func predicted(t testing.TB, v profile.View, s profile.Start) (names []string) {
	t.Helper()
	items, err := profile.Predict(t.Context(), v, s)
	must(t, err)
	if _, err := profile.Encode(accel.Profile{Manifest: imageA, Origin: accel.ProfilePredicted, Items: items}); err != nil {
		t.Fatal(err)
	}
	for _, i := range items {
		if len(names) == 0 || !slices.Contains(names, i.Path) {
			names = append(names, i.Path)
		}
	}
	return names
}

const glibc = "/lib64/ld-linux-x86-64.so.2"

func TestPredictLibraries(t *testing.T) {
	for _, test := range []struct {
		name  string
		files map[string]string
		env   string
		want  string
	}{
		{"the cache, breadth first, each once", map[string]string{
			"bin/app": elf{interp: glibc, needed: []string{"liba.so.1", "libc.so.6"}}.String(), "lib64/ld-linux-x86-64.so.2": elf{}.String(),
			"etc/ld.so.cache": ldCache("liba.so.1", "/opt/liba.so.1", "libb.so.1", "/opt/libb.so.1", "libc.so.6", "/lib/libc.so.6"),
			"opt/liba.so.1":   "-> liba.so.1.2", "opt/liba.so.1.2": elf{needed: []string{"libb.so.1", "libc.so.6"}}.String(), "opt/libb.so.1": elf{needed: []string{"liba.so.1"}}.String(),
			"lib/libc.so.6": elf{}.String(), "lib/libb.so.1": elf{}.String(),
		}, "", "bin/app lib64/ld-linux-x86-64.so.2 etc/ld.so.cache opt/liba.so.1.2 lib/libc.so.6 opt/libb.so.1"},
		{"RUNPATH with $ORIGIN does not hold for what a library needs", map[string]string{
			"app/bin/app": elf{interp: glibc, needed: []string{"liba.so"}, runpath: "$ORIGIN/../lib:rel"}.String(), "app/lib/liba.so": elf{needed: []string{"libb.so"}}.String(),
			"app/lib/libb.so": elf{}.String(), "usr/lib/libb.so": elf{}.String(), "bin/app": "-> /app/bin/app",
		}, "", "app/bin/app app/lib/liba.so usr/lib/libb.so"},
		{"RPATH does", map[string]string{
			"bin/app": elf{interp: glibc, needed: []string{"liba.so"}, rpath: "${ORIGIN}/../own"}.String(), "own/liba.so": elf{needed: []string{"libb.so"}}.String(), "own/libb.so": elf{}.String(),
			"usr/lib/libb.so": elf{}.String(),
		}, "", "bin/app own/liba.so own/libb.so"},
		{"ld.so.conf where there is no cache", map[string]string{
			"bin/app": elf{interp: glibc, needed: []string{"liba.so"}}.String(), "etc/ld.so.conf": "include ld.so.conf.d/*.conf # x\n", "etc/ld.so.conf.d/a.conf": "include /etc/ld.so.conf\n/opt/lib\n", "opt/lib/liba.so": elf{}.String(),
		}, "", "bin/app opt/lib/liba.so"},
		{"LD_LIBRARY_PATH; a library of another machine", map[string]string{
			"bin/app": elf{interp: glibc, needed: []string{"liba.so"}}.String(), "x/liba.so": elf{machine: 3}.String(), "y/liba.so": elf{}.String(), "lib/liba.so": elf{}.String(),
		}, "LD_LIBRARY_PATH=/x:/y", "bin/app y/liba.so"},
		{"musl", map[string]string{
			"bin/app": elf{interp: "/lib/ld-musl-x86_64.so.1", needed: []string{"liba.so", "libc.musl-x86_64.so.1"}}.String(), "lib/ld-musl-x86_64.so.1": elf{}.String(), "etc/ld-musl-x86_64.path": "/m\n/n",
			"lib/libc.musl-x86_64.so.1": "-> ld-musl-x86_64.so.1", "n/liba.so": elf{}.String(), "lib/liba.so": elf{}.String(), "n/libc.musl-x86_64.so.1": "-> /lib/ld-musl-x86_64.so.1",
		}, "", "bin/app lib/ld-musl-x86_64.so.1 etc/ld-musl-x86_64.path n/liba.so"},
		{"static", map[string]string{"bin/app": elf{}.String()}, "", "bin/app"},
	} {
		if got := strings.Join(predicted(t, imageOf(t, test.files), profile.Start{Cmd: []string{"app"}, Env: []string{test.env}}), " "); got != test.want {
			t.Errorf("%s:\n got %s\nwant %s", test.name, got, test.want)
		}
	}
}

// Of a large program the code comes in as far as it is likely to be used, and what is not
// mapped does not.
func TestPredictLargeProgram(t *testing.T) {
	big := elf{code: 30 << 20}.String() + strings.Repeat("debug", 1<<20)
	items, err := profile.Predict(t.Context(), imageOf(t, map[string]string{"bin/app": big}), profile.Start{Entrypoint: []string{"/bin/app"}})
	must(t, err)
	if n := (accel.Profile{Items: items}).Bytes(); n < 20<<20 || n > 21<<20 {
		t.Errorf("%d bytes, %v", n, texts(items))
	}
}

func TestPredictCommands(t *testing.T) {
	bin := elf{}.String()
	files := map[string]string{
		"bin/sh": "-> dash", "bin/dash": bin, "usr/bin/env": bin, "usr/bin/tini": bin, "usr/local/bin/gosu": bin, "app/serve": bin, "app/other": bin, "usr/bin/redis-server": bin,
		"entry.sh":       "#!/bin/sh\nset -e\n# serve is not run here\nif [ \"$1\" = 'x' ]; then echo \"no; serve\"; fi\nNAME=other\n. /lib.sh\nexec \"$@\" --more\n",
		"lib.sh":         "other >/dev/null 2>&1\n",
		"noshebang":      "exec serve\n",
		"usr/bin/nested": "#!/usr/bin/env -S sh -e\ncd /app && ./serve\n",
		"etc/redis.conf": "dir /data\ninclude /etc/more/*.conf\nloadmodule /m/mod.so arg\n", "etc/more/a.conf": "x\n", "m/mod.so": bin,
	}
	v := imageOf(t, files)
	path := "PATH=/app:/usr/local/bin:/usr/bin:/bin"
	for _, test := range []struct {
		cmd  string
		want string
	}{
		{"serve", "app/serve"},
		{"./serve", "app/serve"},
		{"sh|-c|exec serve --flag", "bin/dash app/serve"},
		{"/bin/sh|-ec|cd / && FOO=bar $NOTHING ${X:-./app/serve} & other", "bin/dash app/serve app/other"},
		{"sh|-c|serve 'a b' \"c\\\"d\" > /dev/null; (other)", "bin/dash app/serve app/other"},
		{"tini|--|/entry.sh|serve", "usr/bin/tini entry.sh bin/dash lib.sh app/other app/serve"},
		{"tini|-g|-e|143|--|gosu|nobody|env|A=b|-u|C|serve", "usr/bin/tini usr/local/bin/gosu usr/bin/env app/serve"},
		{"/noshebang", "bin/dash noshebang app/serve"},
		{"nested", "usr/bin/nested usr/bin/env bin/dash app/serve"},
		{"redis-server|/etc/redis.conf", "usr/bin/redis-server etc/redis.conf etc/more/a.conf m/mod.so"},
		{"nowhere", ""},
		{"", ""},
	} {
		got := strings.Join(predicted(t, v, profile.Start{Cmd: strings.Split(test.cmd, "|"), Env: []string{path}, WorkingDir: "/app"}), " ")
		if got != test.want {
			t.Errorf("%s:\n got %s\nwant %s", test.cmd, got, test.want)
		}
	}
	// The entrypoint and the command are one line; the label's list comes first.
	got := strings.Join(predicted(t, v, profile.Start{Entrypoint: []string{"sh"}, Cmd: []string{"-c", "serve"}, Env: []string{path}, Listed: listed(t, v.Tree, "/etc/more/, nowhere\n/lib*.sh,/etc/*.conf")}), " ")
	if want := "etc/more/a.conf lib.sh etc/redis.conf bin/dash app/serve"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	// Programs that run each other without an end.
	loop := imageOf(t, map[string]string{"bin/sh": bin, "a": "#!/b\n", "b": "#!/a\n", "c": "#!/bin/sh\n. /c\n/c\n"})
	predicted(t, loop, profile.Start{Cmd: []string{"/a"}})
	predicted(t, loop, profile.Start{Cmd: []string{"/c"}})
	predicted(t, imageOf(t, map[string]string{"bin/sh": bin, "c": strings.Repeat(". /c\n", 100)}), profile.Start{Cmd: []string{"sh", "/c"}})
}

func TestPredictNginx(t *testing.T) {
	v := imageOf(t, map[string]string{
		"usr/sbin/nginx": elf{}.String(), "etc/passwd": "root", "etc/nginx/nginx.conf": "include /etc/nginx/modules/*.conf;\nhttp { include mime.types; include conf.d/*.conf; }\n# include gone.conf\n",
		"etc/nginx/mime.types": "types { text/html html; }\n", "etc/nginx/conf.d/a.conf": "ssl_certificate certs/a.pem;\n", "etc/nginx/certs/a.pem": "cert",
		"etc/nginx/modules/x.conf": "load_module modules/x.so;", "etc/nginx/modules/x.so": elf{}.String(), "etc/nginx/gone.conf": "x",
	})
	got := strings.Join(predicted(t, v, profile.Start{Cmd: []string{"nginx", "-g", "daemon off;"}}), " ")
	if want := "usr/sbin/nginx etc/passwd etc/nginx/nginx.conf etc/nginx/modules/x.conf etc/nginx/modules/x.so etc/nginx/mime.types etc/nginx/conf.d/a.conf etc/nginx/certs/a.pem"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A view that fails ends the prediction; so does the context.
func TestPredictErrors(t *testing.T) {
	v := imageOf(t, map[string]string{"bin/app": elf{}.String()})
	read := v.Read
	broken := errors.New("broken disk")
	for name, r := range map[string]func(context.Context, int, *profile.Entry, int64, int64) ([]byte, error){
		"error": func(context.Context, int, *profile.Entry, int64, int64) ([]byte, error) { return nil, broken },
		"short": func(ctx context.Context, l int, e *profile.Entry, at, n int64) ([]byte, error) {
			b, err := read(ctx, l, e, at, n)
			return b[:len(b)/2], err
		},
	} {
		v.Read = r
		if items, err := profile.Predict(t.Context(), v, profile.Start{Cmd: []string{"app"}}); err == nil || items != nil || (name == "error" && !errors.Is(err, broken)) {
			t.Errorf("%s: %v, %v", name, items, err)
		}
	}
	v.Read = read
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := profile.Predict(ctx, v, profile.Start{Cmd: []string{"app"}}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// listed is what a label's list means.
func listed(t testing.TB, tree *profile.Tree, label string) []accel.ProfileItem {
	t.Helper()
	l, err := profile.Listed(t.Context(), tree, profile.ListOf(label))
	must(t, err)
	return l.Items
}

func TestListed(t *testing.T) {
	v := imageOf(t, map[string]string{"a/b/c": "1", "a/b/d": "22", "a/e": "333", "link": "-> a/b", "empty": ""})
	for list, want := range map[string]string{
		"/a/e":           "0:a/e:0:3",
		"a/*":            "0:a/b/c:0:1 0:a/b/d:0:2 0:a/e:0:3",
		"link/d":         "0:a/b/d:0:2",
		"link":           "0:a/b/c:0:1 0:a/b/d:0:2",
		"/a/?/[c],a/b/c": "0:a/b/c:0:1",
		"empty, ,[,x/y":  "",
		"/":              "0:a/b/c:0:1 0:a/b/d:0:2 0:a/e:0:3",
	} {
		if got := strings.Join(texts(listed(t, v.Tree, list)), " "); got != want {
			t.Errorf("%s: %s, want %s", list, got, want)
		}
	}
}

// FuzzPredict lets a file that any language may read be anything.
func FuzzPredict(f *testing.F) {
	f.Add("python3 /f", "from . import x\nimport a.b, f\ntry:\n  import g\nexcept ImportError: pass\n")
	f.Add("node /f", "import x from './f'; require(`f`); /[/]\"/.test(y)")
	f.Add("sh /f", "exec ${X:-/f} \"$@\" '")
	f.Add("ruby /f", "require 'f'\nrequire_relative './f'\n")
	f.Add("java -jar /f", "PK\x05\x06")
	f.Add("nginx -c /f", "include /*;")
	f.Add("/f", elf{interp: "/f", needed: []string{"f"}, rpath: "/"}.String())
	f.Add("/f", "#!/f /f\n")
	cache := ldCache("f", "/f")
	f.Add("ls", cache)
	bin := elf{interp: glibc, needed: []string{"f"}}.String()
	f.Fuzz(func(t *testing.T, command, text string) {
		v := imageOf(t, map[string]string{
			"usr/bin/python3.11": bin, "usr/bin/python3": "-> python3.11", "usr/bin/node": bin, "usr/bin/sh": bin, "usr/bin/ruby": bin, "usr/bin/java": bin, "usr/sbin/nginx": bin, "usr/bin/ls": bin,
			"f": text, "f.py": text, "usr/lib/python3.11/site.py": text, "package.json": text, "lib/modules": text, "etc/ld.so.cache": text, "etc/ld.so.conf": text, "node_modules/f/package.json": text,
			"etc/nginx/nginx.conf": text, "usr/lib/server/libjvm.so": text, "usr/lib/modules": text,
		})
		items, err := profile.Predict(t.Context(), v, profile.Start{Cmd: strings.Fields(command), Listed: listed(t, v.Tree, text)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := profile.Encode(accel.Profile{Manifest: imageA, Origin: accel.ProfilePredicted, Items: items}); err != nil {
			t.Fatal(err)
		}
	})
}

func ExampleListed() {
	tree, err := profile.NewTree(context.Background(), [][]byte{[]byte(`{"version":1,"entries":[{"name":"srv/app.py","type":"reg","size":120},{"name":"srv/data.bin","type":"reg","size":9000}]}`)})
	if err != nil {
		fmt.Println(err)
		return
	}
	list, err := profile.Listed(context.Background(), tree, []string{"/srv/*.py", "/srv/gone"})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, i := range list.Items {
		fmt.Println(i.Path, i.Bytes)
	}
	fmt.Println("not there:", list.Unmatched)
	// Output:
	// srv/app.py 120
	// not there: [/srv/gone]
}
