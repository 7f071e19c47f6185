package lazyfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary is the holder and the daemon that is killed, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "be-holder":
			beHolder(os.Args[2:])
		case "be-daemon":
			beDaemon(os.Args[2:])
		}
	}
	goleak.VerifyTestMain(m)
}

// holderTimes are what tests set of HolderOptions.
type holderTimes struct{ Patience, FillLimit, IdleLimit time.Duration }

func beHolder(args []string) {
	var times holderTimes
	err := json.Unmarshal([]byte(args[2]), &times)
	if err == nil {
		err = RunHolder(context.Background(), HolderOptions{
			Dir: args[0], Version: args[1], Patience: times.Patience, FillLimit: times.FillLimit, IdleLimit: times.IdleLimit,
			Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func holderCommand(dir, version string, times holderTimes) []string {
	b, err := json.Marshal(times)
	if err != nil {
		panic(err)
	}
	return []string{os.Args[0], "be-holder", dir, version, string(b)}
}

func mustBeRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: mounting needs root")
	}
}

// bytesOf is the same for the same seed.
func bytesOf(seed uint64, n int) []byte {
	b := make([]byte, (n+7)/8*8)
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i < len(b); i += 8 {
		v := rng.Uint64()
		for j := range 8 {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b[:n]
}

// sample is a layer's content, the same for the same seed.
type sample struct {
	digest digest.Digest
	files  map[string][]byte
	names  []string // in the layer's order
	chunks [][]byte
	toc    []byte
	size   int64 // of the blob
}

const testChunkBytes = 256 << 10

// newSample has count files of up to mostBytes.
func newSample(seed uint64, count, mostBytes int) *sample {
	rng := rand.New(rand.NewPCG(seed, 2))
	files := map[string][]byte{}
	for i := range count {
		files[fmt.Sprintf("d%02d/f%05d", i%17, i)] = bytesOf(seed*1_000_003+uint64(i), 1+rng.IntN(mostBytes))
	}
	return sampleOf(seed, files)
}

// sampleOf is a layer of these files, in the order of their names.
func sampleOf(seed uint64, files map[string][]byte) *sample {
	type entry struct {
		Name        string `json:"name"`
		Type        string `json:"type"`
		Size        int64  `json:"size,omitempty"`
		Mode        int64  `json:"mode,omitempty"`
		Offset      int64  `json:"offset,omitempty"`
		ChunkOffset int64  `json:"chunkOffset,omitempty"`
		ChunkSize   int64  `json:"chunkSize,omitempty"`
		Digest      string `json:"digest,omitempty"`
		ChunkDigest string `json:"chunkDigest,omitempty"`
	}
	im := &sample{
		digest: digest.FromString(fmt.Sprint("layer ", seed)), files: files, names: slices.Sorted(maps.Keys(files)),
	}
	var entries []entry
	at := int64(1)
	for _, name := range im.names {
		b := files[name]
		for off := 0; off < len(b); off += testChunkBytes {
			c := b[off:min(off+testChunkBytes, len(b))]
			e := entry{
				Name: name, Type: "chunk", Offset: at, ChunkOffset: int64(off), ChunkSize: int64(len(c)),
				ChunkDigest: fmt.Sprintf("sha256:%x", sha256.Sum256(c)),
			}
			if off == 0 {
				e.Type, e.Size, e.Mode = "reg", int64(len(b)), 0o644
				e.Digest = fmt.Sprintf("sha256:%x", sha256.Sum256(b))
			}
			entries = append(entries, e)
			im.chunks = append(im.chunks, c)
			at += int64(len(c)) + 1
		}
	}
	im.size = at
	toc, err := json.Marshal(map[string]any{"version": 1, "entries": entries})
	if err != nil {
		panic(err)
	}
	im.toc = toc
	return im
}

func filesIn(dir string, im *sample) Files {
	base := filepath.Join(dir, im.digest.Encoded()[:8])
	return Files{Meta: base + ".meta", Table: base + ".table", Data: base + ".data"}
}

func (im *sample) store(t testing.TB, dir string) Files {
	t.Helper()
	layout, err := Build(im.toc, im.size)
	if err != nil {
		t.Fatal(err)
	}
	f := filesIn(dir, im)
	if err := layout.Store(f); err != nil {
		t.Fatal(err)
	}
	return f
}

// memory is a Filler that has everything, and faults.
type memory struct {
	mu     sync.Mutex
	images map[digest.Digest]*sample
	fills  atomic.Int64
	before func(ctx context.Context, l *Layer, first, n int) error // may be nil; may be changed under mu
}

func (m *memory) Fill(ctx context.Context, l *Layer, first, n int) error {
	m.fills.Add(1)
	m.mu.Lock()
	im, before := m.images[l.Digest()], m.before
	m.mu.Unlock()
	if before != nil {
		if err := before(ctx, l, first, n); err != nil {
			return err
		}
	}
	for i := first; i < first+n; i++ {
		if l.Has(i) {
			continue
		}
		if err := l.Put(i, im.chunks[i]); err != nil {
			return err
		}
	}
	return nil
}

func (m *memory) fault(before func(ctx context.Context, l *Layer, first, n int) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before = before
}

// fillAll puts all chunks and syncs them.
func fillAll(t testing.TB, l *Layer, im *sample) {
	t.Helper()
	putAll(t, l, im)
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
}

func putAll(t testing.TB, l *Layer, im *sample) {
	t.Helper()
	for i, c := range im.chunks {
		if err := l.Put(i, c); err != nil {
			t.Fatal(err)
		}
	}
}

// bed is a host that runs, with a directory of its own.
type bed struct {
	*Host
	t       testing.TB
	dir     string // Options.Dir
	store   string // the layers' files
	mounts  string
	memory  *memory
	options Options
	died    chan []digest.Digest
	stop    func() // ends Run and closes
}

func newBed(t testing.TB, change func(*Options)) *bed {
	t.Helper()
	mustBeRoot(t)
	dir, err := os.MkdirTemp("/run", "lazyfs-")
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{t: t, dir: dir, store: t.TempDir(), mounts: filepath.Join(dir, "mnt"), memory: &memory{images: map[digest.Digest]*sample{}}, died: make(chan []digest.Digest, 16)}
	b.options = Options{
		Dir: dir, Version: "v1", Holder: holderCommand(dir, "v1", holderTimes{}), Filler: b.memory,
		HolderDied: func(d []digest.Digest) { b.died <- d },
		Log:        slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&b.options)
	}
	t.Cleanup(b.clear)
	return b
}

// testWriter keeps what is logged with the test.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// start makes a host with these layers, whose files exist or are stored now.
func (b *bed) start(images ...*sample) *bed {
	b.t.Helper()
	h, err := NewHost(b.options)
	if err != nil {
		b.t.Fatal(err)
	}
	b.Host = h
	for _, im := range images {
		b.add(im)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	b.stop = func() {
		b.t.Helper()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			b.t.Error("Run:", err)
		}
		if err := h.Close(); err != nil {
			b.t.Error(err)
		}
		b.stop = func() {}
	}
	return b
}

func (b *bed) add(im *sample) *Layer {
	b.t.Helper()
	f := filesIn(b.store, im)
	if _, err := os.Stat(f.Data); err != nil {
		im.store(b.t, b.store)
	}
	b.memory.mu.Lock()
	b.memory.images[im.digest] = im
	b.memory.mu.Unlock()
	l, err := b.Add(im.digest, f, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return l
}

// mount mounts im at a place of that name.
func (b *bed) mount(im *sample, name string) string {
	b.t.Helper()
	target := filepath.Join(b.mounts, name)
	if err := os.MkdirAll(target, 0o700); err != nil {
		b.t.Fatal(err)
	}
	if err := b.Mount(b.t.Context(), im.digest, target); err != nil {
		b.t.Fatal(err)
	}
	return target
}

func (b *bed) mountsNow() []MountInfo {
	b.t.Helper()
	m, err := b.Mounts()
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

// deadOf counts the mounts whose holder is dead.
func (b *bed) deadOf(mounts []MountInfo) (n int) {
	for _, m := range mounts {
		if m.Lazy && !b.alive(m.holder) {
			n++
		}
	}
	return n
}

// opens counts the files that are open in the holders.
func (h *Host) opens() (n int) {
	for _, l := range h.links() {
		for _, opens := range l.layers() {
			n += opens
		}
	}
	return n
}

// holderPIDs are the living holders of this bed, those that are just starting too.
func (b *bed) holderPIDs() []int {
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		b.t.Fatal(err)
	}
	var pids []int
	for _, path := range commands {
		line, err := os.ReadFile(path) // gone: it has ended
		if err != nil || !bytes.Contains(line, []byte("\x00be-holder\x00"+b.dir+"\x00")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil && alivePID(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func alivePID(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// clear ends all that the bed started, as a reboot does.
func (b *bed) clear() {
	if b.stop != nil {
		b.stop()
	}
	for _, pid := range b.holderPIDs() {
		_ = unix.Kill(pid, unix.SIGKILL)
		for alivePID(pid) {
			time.Sleep(time.Millisecond)
		}
		reap(pid)
	}
	mounts, _, err := mountsOf(context.Background(), b.dir)
	if err != nil {
		b.t.Error(err)
	}
	for _, m := range mounts {
		_ = unix.Unmount(m.Target, unix.MNT_DETACH)
	}
	names, _ := readNames(b.dir)
	for _, name := range names {
		if strings.Contains(name, "@") {
			_ = unix.Unmount(filepath.Join(b.dir, name, holderFuse), unix.MNT_DETACH)
		}
	}
	if err := os.RemoveAll(b.dir); err != nil {
		b.t.Error(err)
	}
}

// until waits for what comes soon; a test that hangs is ended by its own limit.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("never came: " + what)
}

// same walks what is mounted at target and compares everything.
func (im *sample) same(target string) error {
	seen := 0
	err := filepath.WalkDir(target, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(target, path)
		if err != nil {
			return err
		}
		seen++
		return im.sameFile(target, name)
	})
	if err == nil && seen != len(im.files) {
		err = fmt.Errorf("%d files, not %d", seen, len(im.files))
	}
	return err
}

func (im *sample) sameFile(target, name string) error {
	b, err := os.ReadFile(filepath.Join(target, name))
	if err != nil {
		return err
	}
	if !bytes.Equal(b, im.files[name]) {
		return fmt.Errorf("WRONG BYTES in %s", name)
	}
	return nil
}

func (b *bed) unmount(target string) {
	b.t.Helper()
	if err := b.Unmount(b.t.Context(), target); err != nil {
		b.t.Fatal(err)
	}
}
