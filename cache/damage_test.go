package cache

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

const pageBytes = 4096

func role(name, dir, seed string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+name, dirVariable+"="+dir, seedVariable+"="+seed)
	cmd.Stderr = os.Stderr
	return cmd
}

// beHolder opens the store, says so, and waits.
func beHolder(dir string) {
	if _, err := Open(Options{Dir: dir, Log: quiet()}); err != nil {
		panic(err)
	}
	fmt.Println("open")
	select {}
}

func TestTwoProcesses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	cmd := role("hold", dir, "")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "open\n" {
		t.Fatalf("%q, %v", line, err)
	}
	_, err = Open(Options{Dir: dir, Log: quiet()})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint("process ", cmd.Process.Pid)) {
		t.Errorf("the second process: %v, want ErrLocked and pid %d", err, cmd.Process.Pid)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	open(t, Options{Dir: dir})
	if _, err := Open(Options{Dir: dir, Log: quiet()}); !errors.Is(err, ErrLocked) {
		t.Errorf("twice in one process: %v", err)
	}
}

// filled makes a closed store with content: whole blobs, a part of one, names.
type filled struct {
	dir   string
	whole [][]byte
	part  []byte
	raw   []byte
	layer testLayer // every third chunk of it
}

func fillDir(t testing.TB) filled {
	t.Helper()
	b := start(t, Options{})
	c := filled{dir: b.o.Dir, part: content(70, 20*mib), raw: []byte(`{"schemaVersion":2}`), layer: layerOf(76, 30)}
	kept := mustCreate(t, b.Store, c.layer)
	for i := 0; i < 30; i += 3 {
		if err := c.layer.put(kept, i); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		c.whole = append(c.whole, content(71+i, i*mib+1000))
		mustGet(t, b.Store, c.whole[i], 0, -1, from(c.whole[i]))
	}
	mustGet(t, b.Store, c.part, 3*mib, 2*mib, from(c.part))
	err := errors.Join(
		b.PutManifest(Manifest{Digest: digest.FromBytes(c.raw), MediaType: "application/vnd.oci.image.manifest.v1+json", Raw: c.raw}),
		b.PutTag("registry.example/app", "v1", Tag{Digest: digest.FromBytes(c.raw), CheckedAt: time.Now()}),
		b.Link("registry.example/app", digest.FromBytes(c.raw), digest.FromBytes(c.part)),
		b.Grant("registry.example/app", "client", time.Now()),
		b.Pin("somebody", digest.FromBytes(c.raw), digest.FromBytes(c.whole[0])),
	)
	for i := range 200 { // so that the tables have branches
		err = errors.Join(err, b.Link(fmt.Sprint("registry.example/app", i), digest.FromBytes(c.raw)))
	}
	if err != nil {
		t.Fatal(err)
	}
	b.close()
	return c
}

// use opens the store and takes everything out of it: what it gives has to be right.
func (c filled) use(t *testing.T) (damaged bool) {
	t.Helper()
	b := start(t, Options{Dir: c.dir, VerifyLayer: verifyLayer})
	defer b.end()
	_, err := os.Stat(b.index.asidePath())
	damaged = err == nil
	kept := mustCreate(t, b.Store, c.layer) // as a mount asks for it, also in the middle of the sweep
	c.layer.right(t, kept)
	for _, data := range c.whole {
		mustGet(t, b.Store, data, 0, -1, from(data))
	}
	mustGet(t, b.Store, c.part, 3*mib+5, mib, from(c.part))
	m, err := b.Manifest(digest.FromBytes(c.raw))
	if err == nil && !bytes.Equal(m.Raw, c.raw) {
		t.Errorf("manifest %q", m.Raw)
	}
	tag, err := b.Tag("registry.example/app", "v1")
	if err == nil && tag.Digest != digest.FromBytes(c.raw) {
		t.Errorf("tag %+v", tag)
	}
	if b.Linked("registry.example/app", digest.FromBytes(c.whole[1])) {
		t.Error("linked to what it never held")
	}
	if err := b.PutTag("registry.example/app", "v2", Tag{Digest: digest.FromBytes(c.raw)}); err != nil {
		t.Error(err)
	}
	if err := c.layer.put(kept, 0, 1); err != nil && !errors.Is(err, ErrDamaged) {
		t.Errorf("Commit: %v", err)
	}
	b.end()
	if err := b.Close(); err != nil && !errors.Is(err, ErrDamaged) {
		t.Errorf("Close: %v", err)
	}
	return damaged
}

// copyDir copies a store, holes as holes.
func copyDir(t *testing.T, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	return to
}

func TestDamagedIndex(t *testing.T) {
	c := fillDir(t)
	index := usedPages(t, filepath.Join(c.dir, "index.db"))
	rng := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, len(index))
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	whole := c.dir
	for name, damaged := range map[string][]byte{
		"empty": {}, "text": []byte("no index\n"), "zeros": make([]byte, len(index)), "noise": noise,
		"half": index[:len(index)/2/pageBytes*pageBytes], "two pages": index[:2*pageBytes], "odd": index[:len(index)/3+7],
		"noise after the first pages": slices.Concat(index[:2*pageBytes], noise[2*pageBytes:]),
	} {
		t.Run(name, func(t *testing.T) {
			c.dir = copyDir(t, whole)
			if err := os.WriteFile(filepath.Join(c.dir, "index.db"), damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			b := start(t, Options{Dir: c.dir, VerifyLayer: verifyLayer})
			for _, data := range c.whole {
				mustGet(t, b.Store, data, 0, -1, nil0(t, b, data)) // from the files alone
			}
			if n := c.layer.right(t, mustCreate(t, b.Store, c.layer)); n != 10 {
				t.Errorf("%d chunks of the layer are there", n)
			}
			b.close()
			if name != "empty" {
				if _, err := os.Stat(b.index.asidePath()); err != nil {
					t.Errorf("it was not set aside: %v", err)
				}
			}
			c.use(t)
			b = start(t, Options{Dir: c.dir})
			rep, err := b.Check(t.Context(), nil)
			if err != nil || rep.CheckedBlobs < len(c.whole) || rep.UncheckedLayers != 1 || len(rep.Damaged) > 0 {
				t.Errorf("%+v, %v", rep, err)
			}
		})
	}
}

// usedPages is the index without what lies behind its last page in use.
func usedPages(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	used := int64(0)
	err = db.View(func(tx *bbolt.Tx) error { used = tx.Size(); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return b[:used]
}

// TestIndexCutWhileOpen: the index is cut under the running store. Run says so, what is
// there is served until then, and a new start rebuilds it.
func TestIndexCutWhileOpen(t *testing.T) {
	c := fillDir(t)
	s, err := Open(Options{Dir: c.dir, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(c.dir, "index.db"), 2*pageBytes); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Tag("registry.example/app", "v1"); err == nil {
		t.Error("a tag was read from a page that is gone")
	}
	if err := s.PutTag("registry.example/app", "v2", Tag{Digest: digest.FromBytes(c.raw)}); err != nil {
		t.Error(err)
	}
	mustGet(t, s, c.whole[2], 0, -1, nil)
	if err := s.Run(t.Context()); err == nil || !errors.Is(err, ErrDamaged) {
		t.Errorf("Run: %v", err)
	}
	if err := s.Close(); !errors.Is(err, ErrDamaged) {
		t.Errorf("Close: %v", err)
	}
	if !c.use(t) {
		t.Error("it was not set aside")
	}
}

// nil0 is no Fetcher, once the sweep has found the blob.
func nil0(t *testing.T, b *bed, data []byte) Fetcher {
	t.Helper()
	until(t, "the file is taken in", func() bool { return b.has(data) })
	return nil
}

// TestDamagedPages: whatever one page of the index becomes, no wrong byte is served.
func TestDamagedPages(t *testing.T) {
	c := fillDir(t)
	path := filepath.Join(c.dir, "index.db")
	index := usedPages(t, path)
	rng := rand.New(rand.NewPCG(1, 2))
	noticed, tried := 0, 0
	for name, change := range map[string]func(page []byte){
		"zeroed": func(p []byte) { clear(p) },
		"noise": func(p []byte) {
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
		},
		"flipped bit":             func(p []byte) { p[rng.IntN(len(p))] ^= 1 << rng.IntN(8) },
		"flipped bit in its head": func(p []byte) { p[rng.IntN(256)] ^= 1 << rng.IntN(8) },
	} {
		for at := 0; at+pageBytes <= len(index); at += pageBytes {
			b := bytes.Clone(index)
			change(b[at : at+pageBytes])
			for _, old := range []string{path, path + ".damaged", path + ".suspect"} {
				if err := os.Remove(old); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			tried++
			if c.use(t) {
				noticed++
			}
			if t.Failed() {
				t.Fatalf("page %d, %s", at/pageBytes, name)
			}
		}
	}
	t.Logf("%d of %d damaged pages were noticed when the index was opened", noticed, tried)
	if noticed == 0 {
		t.Error("none was")
	}
}

// TestSavedNames: what is readable of a damaged index is kept, but for what it says of blobs.
func TestSavedNames(t *testing.T) {
	c := fillDir(t)
	b, err := Open(Options{Dir: c.dir, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	b.index.giveUp(errors.New("a test's"), false) // as when it is found damaged while in use
	err = b.PutTag("registry.example/app", "v3", Tag{Digest: digest.FromBytes(c.raw)})
	if err := errors.Join(err, b.commit()); err == nil {
		t.Error("written after it was given up")
	}
	_ = b.Close() // says that it could not be written
	s := start(t, Options{Dir: c.dir})
	if m, err := s.Manifest(digest.FromBytes(c.raw)); err != nil || !bytes.Equal(m.Raw, c.raw) {
		t.Errorf("manifest: %v", err)
	}
	if _, err := s.Tag("registry.example/app", "v1"); err != nil {
		t.Error(err)
	}
	if _, ok := s.Granted("registry.example/app", "client"); !ok || !s.Linked("registry.example/app", digest.FromBytes(c.raw)) {
		t.Error("grant or link was lost")
	}
	if len(s.Pins()["somebody"]) != 2 {
		t.Errorf("pins: %v", s.Pins())
	}
	for _, data := range c.whole {
		mustGet(t, s.Store, data, 0, -1, nil0(t, s, data))
	}
}

// TestDiesWhileOpening: an index at which the process dies again and again is set aside unread.
func TestDiesWhileOpening(t *testing.T) {
	c := fillDir(t)
	if err := os.WriteFile(filepath.Join(c.dir, "index.db.opening"), []byte("..."), 0o600); err != nil {
		t.Fatal(err)
	}
	if !c.use(t) {
		t.Error("it was read a fourth time")
	}
}

func TestDamagedFile(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"a flipped bit": flip,
		"cut":           func(path string) error { return os.Truncate(path, 100) },
		"gone":          os.Remove,
		"longer":        func(path string) error { return os.Truncate(path, 40*mib) },
	} {
		t.Run(name, func(t *testing.T) {
			c := fillDir(t)
			data := c.whole[3]
			b := start(t, Options{Dir: c.dir})
			if err := damage(b.path(digest.FromBytes(data))); err != nil {
				t.Fatal(err)
			}
			if name != "a flipped bit" { // which only Check can see
				mustGet(t, b.Store, data, 0, -1, from(data)) // noticed, and fetched again
				mustGet(t, b.Store, data, 0, -1, nil)
				if err := damage(b.path(digest.FromBytes(data))); err != nil {
					t.Fatal(err)
				}
			}
			var told int64
			rep, err := b.Check(t.Context(), func(done, total int64) { told = done })
			if err != nil || !slices.Equal(rep.Damaged, []digest.Digest{digest.FromBytes(data)}) {
				t.Errorf("%+v, %v", rep, err)
			}
			if rep.CheckedBytes == 0 || told != rep.CheckedBytes || rep.PartialBlobs != 1 {
				t.Errorf("%+v, told %d", rep, told)
			}
			mustGet(t, b.Store, data, 0, -1, from(data))
			rep, err = b.Check(t.Context(), nil)
			if err != nil || len(rep.Damaged) > 0 {
				t.Errorf("after it was fetched again: %+v, %v", rep, err)
			}
		})
	}
	// A missing file is noticed when the store starts, too.
	c := fillDir(t)
	s := open(t, Options{Dir: c.dir})
	if err := os.Remove(s.path(digest.FromBytes(c.whole[2]))); err != nil {
		t.Fatal(err)
	}
	if rep, err := s.GC(t.Context()); err != nil || len(rep.Damaged) != 1 || rep.RemovedBlobs < 1 {
		t.Errorf("%+v, %v", rep, err)
	}
}

// TestCutUnderReader: the file is cut while a client reads it: an error, not less content.
func TestCutUnderReader(t *testing.T) {
	c := fillDir(t)
	data := c.whole[4]
	b := start(t, Options{Dir: c.dir})
	for name, read := range map[string]func(r *Reader) error{
		"WriteTo": func(r *Reader) error { _, err := r.WriteTo(onlyWriter{io.Discard}); return err },
		"Read":    func(r *Reader) error { _, err := io.Copy(io.Discard, struct{ io.Reader }{r}); return err },
	} {
		r, err := b.OpenBlob(t.Context(), describe(data), 0, -1, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(b.path(digest.FromBytes(data)), mib); err != nil {
			t.Fatal(err)
		}
		if err := read(r); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
		r.Close()
		mustGet(t, b.Store, data, 0, -1, from(data))
	}
}

func flip(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], 4321); err != nil {
		return err
	}
	b[0] ^= 4
	_, err = f.WriteAt(b[:], 4321)
	return err
}

// TestStrangeFiles: what lies in the blobs' folder and is none is removed; what is a blob, taken in.
func TestStrangeFiles(t *testing.T) {
	s := open(t, Options{})
	good, wrong := content(80, 3*mib), content(81, 2*mib)
	put := func(path string, b []byte) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	put(s.path(digest.FromBytes(good)), good)
	put(s.path(digest.FromString("x")), wrong)
	put(filepath.Join(s.o.Dir, "blobs", "sha256", "ab", "readme"), wrong)
	put(filepath.Join(s.o.Dir, "blobs", "core"), wrong)
	outside := filepath.Join(t.TempDir(), "outside")
	put(outside, good)
	if err := os.Symlink(outside, filepath.Join(s.o.Dir, "blobs", "link")); err != nil {
		t.Fatal(err)
	}
	rep, err := s.GC(t.Context())
	if err != nil || rep.AdoptedBlobs != 1 || rep.RemovedFiles != 4 {
		t.Errorf("%+v, %v", rep, err)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}
	if e, err := s.Stat(digest.FromBytes(good)); err != nil || !e.Complete {
		t.Errorf("%+v, %v", e, err)
	}
	mustGet(t, s, good, 0, -1, nil)
	if _, err := s.Stat(digest.FromString("x")); !errors.Is(err, accel.ErrNotFound) {
		t.Error(err)
	}
}
