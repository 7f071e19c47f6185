package lazyfs

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"accel"

	"golang.org/x/sys/unix"
)

// overlaid mounts layers, the topmost first, as a snapshotter does.
func overlaid(t *testing.T, layers ...[]tarEntry) string {
	t.Helper()
	var dirs []string
	for _, l := range layers {
		dirs = append(dirs, mounted(t, stored(t, ours(t, tarOf(l...)))))
	}
	if len(dirs) == 1 {
		dirs = append(dirs, t.TempDir()) // overlayfs wants two
	}
	return mountAt(t, "overlay", "overlay", "lowerdir="+strings.Join(dirs, ":"))
}

func names(t *testing.T, root string) []string {
	t.Helper()
	all := slices.Sorted(maps.Keys(walked(t, root)))
	return slices.DeleteFunc(all, func(n string) bool { return n == "." })
}

func TestWhiteouts(t *testing.T) {
	needRoot(t)
	lower := []tarEntry{
		aDir("kept"), aFile("kept/a", "lower"), aFile("kept/b", "lower"),
		aDir("gone"), aFile("gone/a", "lower"), aFile("file", "lower"),
		aDir("opaque"), aFile("opaque/a", "lower"), aDir("again"), aFile("again/a", "lower"),
		aDir("late"), aFile("late/a", "lower"), aDir("to-file"), aFile("to-file/a", "lower"),
		aDir("first"), aFile("first/a", "lower"),
	}
	for name, c := range map[string]struct {
		upper []tarEntry
		want  []string // but for what stays of lower
		gone  []string // of lower
	}{
		"a file":                           {[]tarEntry{aFile(".wh.file", ""), aFile("kept/.wh.a", "")}, nil, []string{"file", "kept/a"}},
		"a directory":                      {[]tarEntry{aFile(".wh.gone", "")}, nil, []string{"gone", "gone/a"}},
		"an opaque one":                    {[]tarEntry{aDir("opaque"), aFile("opaque/.wh..wh..opq", ""), aFile("opaque/b", "")}, []string{"opaque/b"}, []string{"opaque/a"}},
		"opaque before the directory":      {[]tarEntry{aFile("opaque/.wh..wh..opq", ""), aDir("opaque", withXattr("user.k", "v"))}, nil, []string{"opaque/a"}},
		"beside a directory and before it": {[]tarEntry{aFile(".wh.again", ""), aDir("again"), aFile("again/b", "")}, []string{"again/b"}, []string{"again/a"}},
		"beside a directory and after it":  {[]tarEntry{aDir("late"), aFile("late/b", ""), aFile(".wh.late", "")}, []string{"late/b"}, []string{"late/a"}},
		"beside a file":                    {[]tarEntry{aFile(".wh.to-file", ""), aFile("to-file", "x")}, nil, []string{"to-file/a"}},
		"beside an implicit directory":     {[]tarEntry{aFile(".wh.again", ""), aFile("again/b", "")}, []string{"again/b"}, []string{"again/a"}},
		"twice":                            {[]tarEntry{aFile(".wh.file", ""), aFile(".wh.file", "")}, nil, []string{"file"}},
		"in an opaque directory":           {[]tarEntry{aDir("opaque"), aFile("opaque/.wh..wh..opq", ""), aFile("opaque/.wh.a", "")}, nil, []string{"opaque/a"}},
		"AUFS's books":                     {[]tarEntry{aFile(".wh..wh.aufs", ""), aDir(".wh..wh.plnk"), aFile(".wh..wh.plnk/1.2", "content"), aFile("n", "")}, []string{"n"}, nil},
		"below an opaque directory":        {[]tarEntry{aFile(".wh.again", ""), aFile("again/b/.wh.c", "")}, []string{"again/b"}, []string{"again/a"}},
		"below a whiteout":                 {[]tarEntry{aDir(".wh.file"), aFile(".wh.file/x", "content"), aFile("n", "content")}, []string{"n"}, []string{"file"}},
		"with content":                     {[]tarEntry{aFile(".wh.file", "whatever"), aFile("n", "content")}, []string{"n"}, []string{"file"}},
		"a file by another layer's name":   {[]tarEntry{aFile("kept/a", "upper"), aFile("kept/c", "upper")}, []string{"kept/c"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := names(t, overlaid(t, c.upper, lower))
			want := slices.Clone(c.want)
			for _, e := range lower {
				if !slices.Contains(c.gone, e.h.Name) {
					want = append(want, e.h.Name)
				}
			}
			if slices.Sort(want); !slices.Equal(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
		})
	}
}

// TestCopyUp: what a container changes is copied up with all that belongs to it.
func TestCopyUp(t *testing.T) {
	needRoot(t)
	entries := slices.DeleteFunc(everything(), func(e tarEntry) bool { return e.h.Name == "dev/whiteout-like" })
	lower := mounted(t, stored(t, ours(t, tarOf(entries...))))
	work := t.TempDir()
	must(unix.Mount("tmpfs", work, "tmpfs", 0, ""))
	t.Cleanup(func() { must(unix.Unmount(work, 0)) })
	for _, d := range []string{"upper", "work", "merged"} {
		must(os.Mkdir(filepath.Join(work, d), 0o755))
	}
	merged := filepath.Join(work, "merged")
	must(unix.Mount("overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, work, work)))
	t.Cleanup(func() { must(unix.Unmount(merged, 0)) })
	before := walked(t, merged)
	for name, s := range before {
		if err := os.Lchown(filepath.Join(merged, name), int(s.uid), int(s.gid)); err != nil {
			t.Error(err)
		}
	}
	for name, after := range walked(t, merged) {
		b := before[name]
		b.links, b.group, b.mtime = after.links, after.group, after.mtime // a copy is a file of its own
		if b.mode&0o7000 != 0 {
			b.mode = after.mode // chown takes setuid away
		}
		if strings.Contains(b.xattrs, "security.capability") {
			b.xattrs = after.xattrs // and capabilities
		}
		if b != after {
			t.Errorf("%s:\nwas %+v\nis  %+v", quoted(name), b, after)
		}
	}
}

func TestRootAttributes(t *testing.T) {
	needRoot(t)
	for _, name := range []string{"./", ".", "/", ""} {
		toc := fmt.Sprintf(`{"version":1,"entries":[{"name":%q,"type":"dir","mode":457,"uid":3,"gid":4,"modtime":"2001-02-03T04:05:06Z","xattrs":{"user.k":"dg=="}}]}`, name)
		got := walked(t, mounted(t, stored(t, esgz{toc: []byte(toc)})))["."]
		if got.mode != unix.S_IFDIR|0o711 || got.uid != 3 || got.gid != 4 || got.mtime != 981173106 || got.xattrs != `user.k="v"` {
			t.Errorf("%q: %+v", name, got)
		}
	}
}

// TestLargeDirectory: of many blocks, in which every name is found.
func TestLargeDirectory(t *testing.T) {
	needRoot(t)
	const n = 50_000
	entries := make([]tarEntry, 0, n)
	for i := range n {
		entries = append(entries, aFile(fmt.Sprintf("d/%x-%s", i*2654435761%n, strings.Repeat("n", i%90)), ""))
	}
	root := mounted(t, stored(t, ours(t, tarOf(entries...))))
	list, err := os.ReadDir(filepath.Join(root, "d"))
	must(err)
	if len(list) != n {
		t.Errorf("%d names, want %d", len(list), n)
	}
	for _, e := range entries {
		if _, err := os.Lstat(filepath.Join(root, e.h.Name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(filepath.Join(root, "d/no")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestDirectoryBlocks: names that end at a block's border, and just beside it.
func TestDirectoryBlocks(t *testing.T) {
	needRoot(t)
	for extra := range 40 {
		var entries []tarEntry
		for i := range 15 {
			entries = append(entries, aFile(fmt.Sprintf("d/%02d%s", i, strings.Repeat("x", 238)), ""))
		}
		entries = append(entries, aFile("d/"+strings.Repeat("y", 210+extra), ""))
		raw := tarOf(entries...)
		sameTree(t, walked(t, unpacked(t, raw)), walked(t, mounted(t, stored(t, ours(t, raw)))), named(entries))
	}
}

// TestLargeXattrs: values that fill several blocks.
func TestLargeXattrs(t *testing.T) {
	needRoot(t)
	value := noise(60_000, 1)
	for name, entries := range map[string][]tarEntry{
		"inline": {aFile("a", "x", withXattr("user.a", value), withXattr("user.b", "small")), aSymlink("s", "a", withXattr("security.s", value)), aDir("d", withXattr("user.d", noise(3000, 2)))},
		"shared": {aFile("a", "x", withXattr("user.a", value)), aFile("b", "y", withXattr("user.a", value))},
		"many":   {aFile("a", "x", manyXattrs(600)...), aFile("b", "x", manyXattrs(600)...)},
	} {
		t.Run(name, func(t *testing.T) {
			got := walked(t, mounted(t, stored(t, stock(t, tarOf(entries...)))))
			for _, e := range entries {
				for k, v := range e.h.PAXRecords {
					k = strings.TrimPrefix(k, "SCHILY.xattr.")
					if !strings.Contains(got[e.h.Name].xattrs, fmt.Sprintf("%s=%q", k, v)) {
						t.Errorf("%s has not %s", e.h.Name, k)
					}
				}
			}
		})
	}
}

// TestDeterministic: a layer has the same files whenever they are made, and what the
// data file holds stays.
func TestDeterministic(t *testing.T) {
	z := ours(t, tarOf(everything()...))
	a, b := stored(t, z), stored(t, z)
	l, err := Build(z.toc, z.tocOffset)
	must(err)
	must(l.Store(a)) // again
	total := int64(0)
	for _, pair := range [][2]string{{a.Meta, b.Meta}, {a.Table, b.Table}, {a.Data, b.Data}} {
		x, err := os.ReadFile(pair[0])
		must(err)
		y, err := os.ReadFile(pair[1])
		must(err)
		if !bytes.Equal(x, y) {
			t.Errorf("%s and %s differ", pair[0], pair[1])
		}
		total += int64(len(x))
	}
	if total != l.FilesBytes() {
		t.Errorf("FilesBytes %d, are %d", l.FilesBytes(), total)
	}
}

// TestReplacedContent: of a file that a later entry replaced nothing is fetched.
func TestReplacedContent(t *testing.T) {
	z := ours(t, tarOf(aFile("a", noise(100_000, 1)), aFile("b", "stays"), aFile("a", "second"), aDir("c"), aFile("c/d", noise(50_000, 2)), aFile("c", "")))
	l, err := Build(z.toc, z.tocOffset)
	must(err)
	if l.Chunks() != 2 || l.DataBytes() != 2*BlockBytes {
		t.Errorf("%d chunks in %d bytes", l.Chunks(), l.DataBytes())
	}
}

func TestBadTOCs(t *testing.T) {
	const sum = `"sha256:0000000000000000000000000000000000000000000000000000000000000000"`
	file := func(fields string) string {
		return `{"name":"f","type":"reg","size":10,"chunkDigest":` + sum + fields + `}`
	}
	long := strings.Repeat("n", 256)
	for entries, want := range map[string]error{
		`{"name":"a","type":"socket"}`:                                                                  ErrUnsupported,
		`{"name":"a"}`:                                                                                  ErrUnsupported,
		`{"name":"a","type":"dir","uid":-1}`:                                                            accel.ErrInvalid,
		`{"name":"a","type":"dir","gid":4294967296}`:                                                    accel.ErrInvalid,
		`{"name":"a","type":"dir","modtime":"yesterday"}`:                                               accel.ErrInvalid,
		`{"name":"a\u0000b","type":"dir"}`:                                                              accel.ErrInvalid,
		`{"name":"` + long + `","type":"dir"}`:                                                          accel.ErrInvalid,
		`{"name":"` + strings.Repeat("a/", 2100) + `","type":"dir"}`:                                    accel.ErrInvalid,
		`{"name":"","type":"symlink","linkName":"x"}`:                                                   accel.ErrInvalid,
		`{"name":"a","type":"symlink"}`:                                                                 accel.ErrInvalid,
		`{"name":"a","type":"char","devMajor":4096}`:                                                    accel.ErrInvalid,
		`{"name":"a","type":"block","devMinor":-1}`:                                                     accel.ErrInvalid,
		`{"name":"a","type":"hardlink","linkName":"b"}`:                                                 accel.ErrInvalid,
		`{"name":"a","type":"hardlink","linkName":"a"}`:                                                 accel.ErrInvalid,
		`{"name":"d","type":"dir"},{"name":"a","type":"hardlink","linkName":"d"}`:                       accel.ErrInvalid,
		`{"name":"a","type":"hardlink","linkName":"b"},{"name":"b","type":"hardlink","linkName":"a"}`:   accel.ErrInvalid,
		`{"name":"a","type":"hardlink","linkName":"d"},{"name":"d","type":"dir"}`:                       accel.ErrInvalid,
		`{"name":"a","type":"symlink","linkName":"x"},{"name":"a/b","type":"dir"}`:                      ErrUnsupported,
		`{"name":"a","type":"fifo"},{"name":"a/b","type":"dir"}`:                                        accel.ErrInvalid,
		`{"name":"d/.wh..wh..opq","type":"reg"},{"name":"d","type":"fifo"},{"name":"d/x","type":"dir"}`: accel.ErrInvalid,
		`{"name":".wh.","type":"reg"}`:                                                                  accel.ErrInvalid,
		`{"name":"a/.wh...","type":"reg"}`:                                                              accel.ErrInvalid,
		`{"name":"a","type":"dir","xattrs":{"user.k":"?"}}`:                                             accel.ErrInvalid,
		`{"name":"a","type":"dir","xattrs":{"user.k":1}}`:                                               accel.ErrInvalid,
		`{"name":"a","type":"dir","xattrs":{"user.` + long + `":""}}`:                                   accel.ErrInvalid,
		`{"name":"a","type":"dir","xattrs":{"user.k":"` + strings.Repeat("AAAA", 22_000) + `"}}`:        ErrUnsupported,
		`{"name":"a","type":"chunk"}`:                                                                   accel.ErrInvalid,
		file(``) + `,{"name":"g","type":"chunk","chunkOffset":10}`:                                      accel.ErrInvalid,
		file(`,"offset":-1`):                                                                            accel.ErrInvalid,
		file(`,"offset":1000`):                                                                          accel.ErrInvalid,
		file(`,"offset":999`) + `,` + file(`,"offset":998`):                                             accel.ErrInvalid,
		file(`,"innerOffset":20`) + `,` + file(`,"innerOffset":29`):                                     accel.ErrInvalid,
		file(`,"innerOffset":-1`):                                                                       accel.ErrInvalid,
		file(`,"innerOffset":268435456`):                                                                ErrUnsupported,
		file(`,"innerOffset":1040000`):                                                                  accel.ErrInvalid, // more than gzip holds
		file(`,"chunkSize":11`):                                                                         accel.ErrInvalid,
		file(`,"chunkSize":9`):                                                                          accel.ErrInvalid,
		file(`,"chunkOffset":1`):                                                                        accel.ErrInvalid,
		file(`,"chunkSize":-5`):                                                                         accel.ErrInvalid,
		`{"name":"f","type":"reg","size":-1}`:                                                           accel.ErrInvalid,
		`{"name":"f","type":"reg","size":10}`:                                                           ErrUnsupported,
		`{"name":"f","type":"reg","size":10,"digest":` + sum + `,"chunkSize":5}`:                        ErrUnsupported,
		`{"name":"f","type":"reg","size":10,"chunkDigest":"sha512:00"}`:                                 ErrUnsupported,
		`{"name":"f","type":"reg","size":16777217,"chunkDigest":` + sum + `}`:                           ErrUnsupported,
		`{"name":"f","type":"reg","size":9000000000000,"chunkDigest":` + sum + `}`:                      accel.ErrInvalid,
		`{"name":".prefetch.landmark","type":"reg","size":10,"offset":2000}`:                            accel.ErrInvalid,
		`{"name":"a","type":"dir","size":1.5}`:                                                          accel.ErrInvalid,
		`{"name":"a","type":"dir","size":1e3}`:                                                          accel.ErrInvalid,
		`{"name":"a","type":"dir","size":12345678901234567890}`:                                         accel.ErrInvalid,
		`{"name":"a","type":"dir"},`:                                                                    accel.ErrInvalid,
		`{"name":"a","type":"dir","x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`:     accel.ErrInvalid,
		"{\"name\":\"\xff\",\"type\":\"dir\"}":                                                          accel.ErrInvalid,
	} {
		_, err := Build([]byte(`{"version":1,"entries":[`+entries+`]}`), 1000)
		if !errors.Is(err, want) {
			t.Errorf("%.200s: %v, want %v", entries, err, want)
		}
	}
	for tocOffset, want := range map[int64]error{accel.MaxMemberBytes: nil, accel.MaxMemberBytes + 1: ErrUnsupported} {
		if _, err := Build([]byte(`{"version":1,"entries":[`+file(``)+`]}`), tocOffset); !errors.Is(err, want) {
			t.Errorf("a chunk in %d bytes of the blob: %v, want %v", tocOffset, err, want)
		}
	}
	for _, toc := range []string{``, `[]`, `{`, `{}x`, `{"version":1,"entries":{}}`, `{"version":1,"entries":[],"entries":[]}`, `null1`} {
		if _, err := Build([]byte(toc), 1000); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", toc, err)
		}
	}
	if _, err := Build([]byte(`{"version":2}`), 1000); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// TestTooManyNames: a TOC cannot ask for much more than it is.
func TestTooManyNames(t *testing.T) {
	var b strings.Builder
	for i := range 100 {
		fmt.Fprintf(&b, `%s{"name":"%d/%s","type":"dir"}`, strings.Repeat(",", min(i, 1)), i, strings.Repeat("a/", 2000))
	}
	if _, err := Build([]byte(`{"version":1,"entries":[`+b.String()+`]}`), 1000); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// TestGoodTOCs are odd ones that others read as well.
func TestGoodTOCs(t *testing.T) {
	const sum = `"sha256:0000000000000000000000000000000000000000000000000000000000000000"`
	for _, entries := range []string{
		``, `{"name":"x/y","type":"dir","unknown":{"a":[1,-2.5e3,true,false,null,"\u00e4"]}}`,
		`{"name":"../../a","type":"dir"}`, `{"name":"\ud83d\ude00\ud800\t\/","type":"dir"}`,
		`{"name":"f","type":"reg","size":10,"digest":` + sum + `}`, // one chunk: the file's digest is its
		`{"name":"f","type":"reg","size":10,"digest":` + sum + `,"chunkDigest":` + sum + `,"chunkSize":4},{"type":"chunk","chunkOffset":4,"offset":5,"chunkDigest":` + sum + `}`,
		`{"name":"a","type":"hardlink","linkName":"./b"},{"name":"c","type":"hardlink","linkName":"/a"},{"name":"b","type":"fifo"}`,
		`{"name":".prefetch.landmark","type":"reg","size":1},{"name":"f","type":"reg","size":10,"offset":50,"digest":` + sum + `},{"name":"stargz.index.json","type":"reg","size":7,"offset":999}`,
		`{"name":"a","type":"dir","xattrs":null,"modtime":null,"uid":null}`,
	} {
		if _, err := Build([]byte(` { "version" : 1 , "entries" : [`+entries+"]\n}\n"), 1000); err != nil {
			t.Errorf("%s: %v", entries, err)
		}
	}
}

// TestMemberBounds: a chunk's member ends where the next one begins, whoever owns that.
func TestMemberBounds(t *testing.T) {
	const sum = `"sha256:0000000000000000000000000000000000000000000000000000000000000000"`
	toc := `{"version":1,"entries":[` +
		`{"name":"a","type":"reg","size":10,"offset":100,"digest":` + sum + `},` +
		`{"name":"b","type":"reg","size":10,"offset":100,"innerOffset":512,"digest":` + sum + `},` +
		`{"name":".no.prefetch.landmark","type":"reg","size":1,"offset":300},` +
		`{"name":"c","type":"reg","size":10,"offset":400,"digest":` + sum + `}]}`
	l, err := Build([]byte(toc), 1000)
	must(err)
	want := []accel.Chunk{
		{BlobOffset: 100, BlobBytes: 200, DataOffset: 0, Bytes: 10},
		{BlobOffset: 100, BlobBytes: 200, InnerOffset: 512, DataOffset: 4096, Bytes: 10},
		{BlobOffset: 400, BlobBytes: 600, DataOffset: 8192, Bytes: 10},
	}
	if !slices.Equal(l.chunks, want) {
		t.Errorf("got %+v", l.chunks)
	}
}

// TestBigFile: one that needs several indexes, with holes for content.
func TestBigFile(t *testing.T) {
	needRoot(t)
	const size, chunk = 5<<30 + 5, 16 << 20
	var b bytes.Buffer
	b.WriteString(`{"version":1,"entries":[{"name":"small","type":"reg","size":1,"digest":"sha256:` + strings.Repeat("0", 64) + `"}`)
	for at := int64(0); at < size; at += chunk {
		kind, sizes := "chunk", ""
		if at == 0 {
			kind, sizes = "reg", fmt.Sprintf(`,"size":%d`, int64(size))
		}
		if at+chunk <= size {
			sizes += fmt.Sprintf(`,"chunkSize":%d`, chunk)
		}
		fmt.Fprintf(&b, `,{"name":"big","type":"%s"%s,"offset":%d,"chunkOffset":%d,"chunkDigest":"sha256:%064x"}`, kind, sizes, 1000+at/1000, at, 0)
	}
	b.WriteString(`]}`)
	l, err := Build(b.Bytes(), 6<<20)
	must(err)
	d := t.TempDir()
	f := Files{filepath.Join(d, "meta"), filepath.Join(d, "table"), filepath.Join(d, "data")}
	must(l.Store(f))
	data, err := os.OpenFile(f.Data, os.O_WRONLY, 0)
	must(err)
	_, err = data.WriteAt([]byte("end!!"), BlockBytes+size-5)
	must(err)
	_, err = data.WriteAt([]byte("third"), BlockBytes+2<<30)
	must(err)
	must(data.Close())
	file, err := os.Open(filepath.Join(mountAt(t, f.Meta, "erofs", "device="+f.Data), "big"))
	must(err)
	defer file.Close()
	got := make([]byte, 5)
	for at, want := range map[int64]string{size - 5: "end!!", 2 << 30: "third", 3 << 30: "\x00\x00\x00\x00\x00"} {
		_, err := file.ReadAt(got, at)
		must(err)
		if string(got) != want {
			t.Errorf("at %d: %q", at, got)
		}
	}
}
