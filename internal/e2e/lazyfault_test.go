package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"accel/internal/testbed"
	"accel/lazy"
	"accel/node"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// readerSource reads the files of a directory, whose names are the SHA-256 of their content, in order, with a pause
// between them, and says of each one what is wrong with it.
const readerSource = `package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

func main() {
	pause, err := time.ParseDuration(os.Args[2])
	if err != nil {
		panic(err)
	}
	list, err := os.ReadDir(os.Args[1])
	if err != nil {
		panic(err)
	}
	right := 0
	for i, e := range list {
		b, err := os.ReadFile(filepath.Join(os.Args[1], e.Name()))
		sum := sha256.Sum256(b)
		switch {
		case err != nil:
			fmt.Println("FAILED", e.Name(), err)
		case hex.EncodeToString(sum[:]) != e.Name():
			fmt.Println("WRONG", e.Name())
		default:
			right++
		}
		if i == 0 {
			fmt.Println("reading")
		}
		time.Sleep(pause)
	}
	fmt.Println("right", right)
}
`

// files are how many files of fileBytes an image of readerImage has.
const (
	files     = 400
	fileBytes = 64 << 10
)

// readerProgram is readerSource as a program; built once.
var readerProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp(scratch, "reader-")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(readerSource), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", "reader", "main.go")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "reader"))
})

// readerImages are kept: under the race detector they take some time to make.
var readerImages = map[uint64]v1.Image{}

// readerImage is an image with a program that reads and checks its files.
func readerImage(t *testing.T, seed uint64) v1.Image {
	t.Helper()
	if img := readerImages[seed]; img != nil {
		return img
	}
	program, err := readerProgram()
	must(t, err)
	entries := []entry{dir("data")}
	for i := range files {
		content := noise(seed*files+uint64(i), fileBytes)
		sum := sha256.Sum256([]byte(content))
		entries = append(entries, file("data/"+hex.EncodeToString(sum[:]), content, 0o644))
	}
	readerImages[seed] = image(t, "amd64", gzipped(t, tarOf(t, file("reader", string(program), 0o755))), gzipped(t, tarOf(t, entries...)))
	return readerImages[seed]
}

// lazyReader is a bed with a converted readerImage that was pulled.
func lazyReader(t *testing.T, more ...string) (*lazyBed, string) {
	t.Helper()
	b := newLazyBed(t, testbed.Containerd2, more...)
	ref := b.pushReader(1)
	b.pull(ref)
	return b, ref
}

func (b *lazyBed) pushReader(seed uint64) string {
	b.t.Helper()
	ref, _ := pushTo(b.t, b.reg, fmt.Sprintf("team/reader-%d:v1", seed), readerImage(b.t, seed))
	b.convert(ref)
	return ref
}

// reading is a container that reads.
type reading struct {
	b    *lazyBed
	said *lockedBuffer
	done chan error
}

// read starts a container that reads all files; id names it.
func (b *lazyBed) read(ref, id string, pause time.Duration) *reading {
	b.t.Helper()
	r := &reading{b: b, said: &lockedBuffer{}, done: make(chan error, 1)}
	cmd := b.c.CtrCommand(b.t.Context(), "run", "--rm", "--snapshotter", "accel", ref, id, "/reader", "/data", pause.String())
	cmd.Stdout, cmd.Stderr = r.said, r.said
	must(b.t, cmd.Start())
	go func() { r.done <- cmd.Wait() }()
	b.t.Cleanup(func() { b.end("default", id) })
	return r
}

// begun waits until it has read something.
func (r *reading) begun() {
	r.b.t.Helper()
	for begin := time.Now(); !strings.Contains(r.said.String(), "reading"); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			r.b.t.Fatalf("the container reads nothing: %s\n%s", r.said, r.b.node.log)
		}
	}
}

// result waits for its end and gives what it said.
func (r *reading) result() string {
	r.b.t.Helper()
	select {
	case err := <-r.done:
		if err != nil {
			r.b.t.Errorf("the container ended with %v", err)
		}
	case <-time.After(patience):
		r.b.t.Fatalf("the container does not end: %s\n%s", r.said, r.b.node.log)
	}
	return r.said.String()
}

// requireAll requires that every file was read, and right.
func (r *reading) requireAll() {
	r.b.t.Helper()
	if said := r.result(); !strings.Contains(said, fmt.Sprintf("right %d\n", files)) {
		r.b.t.Errorf("the container says: %s\n%s", said, r.b.node.log)
	}
}

// slowly has nothing brought in the background, so that reads miss.
const slowly = "  background: 1"

func TestReadersSurviveTheDaemon(t *testing.T) { readWhileKilled(t, 10) }
func TestLongReadersSurviveTheDaemon(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("SKIPPED, NOT TESTED: `make test-long` runs it")
	}
	readWhileKilled(t, 50)
}

// readWhileKilled kills the node again and again while a container reads.
func readWhileKilled(t *testing.T, kills int) {
	b, ref := lazyReader(t, slowly)
	r := b.read(ref, "survivor", time.Duration(kills)*300*time.Millisecond/files)
	r.begun()
	for range kills {
		time.Sleep(200 * time.Millisecond)
		b.node.kill()
		b.node.start()
	}
	r.requireAll()
	t.Logf("%d kills", kills)
	if n := len(b.holders()); n != 1 {
		t.Errorf("%d holders run, want the one of before", n)
	}
}

func TestLazyReadsWithARegistryInTrouble(t *testing.T) {
	b, ref := lazyReader(t, slowly)

	// It is away for a while, with every connection cut.
	r := b.read(ref, "away", 5*time.Millisecond)
	r.begun()
	must(t, b.reg.Stop())
	time.Sleep(3 * time.Second)
	must(t, b.reg.Start())
	r.requireAll()

	// Its tokens expire, in the middle, all at once.
	ref = b.pushReader(2)
	b.pull(ref)
	r = b.read(ref, "expired", 5*time.Millisecond)
	r.begun()
	for range 3 {
		b.reg.ExpireTokens()
		time.Sleep(300 * time.Millisecond)
	}
	r.requireAll()
}

// TestLazyReadsOfACorruptBlob: the file that is wrong cannot be read, all others can.
func TestLazyReadsOfACorruptBlob(t *testing.T) {
	b := newLazyBed(t, testbed.Containerd2, slowly)
	ref := b.pushReader(1)
	b.corrupt(ref + "-esgz")
	b.pull(ref)
	said := b.read(ref, "corrupt", 0).result()
	if strings.Contains(said, "WRONG") || strings.Count(said, "FAILED") != 1 || !strings.Contains(said, fmt.Sprintf("right %d\n", files-1)) {
		t.Errorf("the container says: %s", said)
	}
	if metrics := b.node.metrics(); !strings.Contains(metrics, "accel_fill_corrupt_chunks_total") || strings.Contains(metrics, "accel_fill_corrupt_chunks_total 0\n") {
		t.Errorf("no metric counts what was corrupt:\n%s", metrics)
	}
	if !strings.Contains(b.node.log.String(), "corrupt") && !strings.Contains(b.node.log.String(), "does not match its digest") {
		t.Errorf("the log does not tell of what was corrupt:\n%s", b.node.log)
	}
}

func TestHolderKilled(t *testing.T) {
	b, ref := lazyReader(t, slowly)
	r := b.read(ref, "victim", 20*time.Millisecond)
	r.begun()
	for _, pid := range b.holders() {
		must(t, unix.Kill(pid, unix.SIGKILL))
	}
	if said := r.result(); strings.Contains(said, "WRONG") || !strings.Contains(said, "FAILED") || !strings.Contains(said, "input/output error") {
		t.Errorf("the container says: %s", said)
	}
	b.read(ref, "successor", 0).requireAll()
	if metrics := b.node.metrics(); !strings.Contains(metrics, "accel_lazy_holder_deaths_total 1\n") {
		t.Errorf("the holder's death is not counted:\n%s", metrics)
	}
	if !strings.Contains(b.node.log.String(), "has died") {
		t.Errorf("the log does not tell of the holder's death:\n%s", b.node.log)
	}
	// Of a test's machine doctor finds other things amiss too.
	if said, _ := accelCommand("doctor", "--config", b.node.config); !strings.Contains(said, "serves lazy mounts died at") {
		t.Errorf("accel doctor does not tell of the holder's death: %s", said)
	}
}

// TestReboot: all processes and mounts go, the disk stays; what was complete starts without a registry.
func TestReboot(t *testing.T) {
	b, ref := lazyReader(t)
	b.read(ref, "before", 0).requireAll()
	b.complete(ref)
	must(t, b.c.Crash())
	b.clear()
	must(t, os.RemoveAll(filepath.Join(b.node.dir, "run")))
	must(t, b.reg.Stop())
	must(t, b.reg.StopTokens())
	if at := b.lazyMounts(); len(at) > 0 {
		t.Fatalf("there are mounts still: %v", at[0])
	}
	b.node.start()
	must(t, b.c.Start(t.Context()))
	b.read(ref, "after", 0).requireAll()
}

// TestEvictionUnderLazyMounts: a small budget is filled by other content while a container reads.
func TestEvictionUnderLazyMounts(t *testing.T) {
	b := newLazyBed(t, testbed.Containerd2, slowly)
	ref := b.pushReader(1)
	b.node.stop()
	conf, err := os.ReadFile(b.node.config)
	must(t, err)
	must(t, os.WriteFile(b.node.config, []byte(strings.Replace(string(conf), "budget: 2GB", "budget: 60MB", 1)), 0o600))
	b.node.start()
	b.pull(ref)
	r := b.read(ref, "pinned", 5*time.Millisecond)
	r.begun()
	for seed := range uint64(6) {
		p := pushForNode(t, b.reg, fmt.Sprintf("team/other-%d:v1", seed), 100+seed)
		_ = pullWhole(b.node.mirror + strings.TrimPrefix(p.ref, b.reg.Host())) // where there is no room, it is passed through
	}
	r.requireAll()
}

// TestLazyMountsOnAFullDisk: what finds no room cannot be read, and is never wrong; with room again it can.
func TestLazyMountsOnAFullDisk(t *testing.T) {
	b := newLazyBed(t, testbed.Containerd2, slowly)
	ref := b.pushReader(1)
	must(t, b.c.Close())
	b.node.stop()
	b.clear()
	data := filepath.Join(b.node.dir, "data")
	must(t, os.RemoveAll(data))
	must(t, os.Mkdir(data, 0o700))
	mountSmall(t, data, 48<<20)
	ballast := filepath.Join(data, "ballast")
	must(t, os.WriteFile(ballast, []byte(noise(99, 20<<20)), 0o600))
	b.node.start()
	b.startContainerd(testbed.Containerd2)
	b.pull(ref)
	if said := b.read(ref, "full", 0).result(); strings.Contains(said, "WRONG") || !strings.Contains(said, "FAILED") {
		t.Errorf("the container says: %s", said)
	}
	must(t, os.Remove(ballast))
	b.read(ref, "roomy", 0).requireAll()
	must(t, b.c.Close())
	b.node.stop()
	b.clear()
}

// TestKillSwitch: turned off, new pulls are ordinary, and containers on lazy mounts go on.
func TestKillSwitch(t *testing.T) {
	b, ref := lazyReader(t, slowly)
	r := b.read(ref, "running", 20*time.Millisecond)
	r.begun()
	b.node.stop()
	conf, err := os.ReadFile(b.node.config)
	must(t, err)
	must(t, os.WriteFile(b.node.config, append(conf, "lazy: off\n"...), 0o600))
	b.node.start()
	before := len(b.lazyMounts())
	second := b.pushReader(2)
	b.pull(second)
	if n := len(b.lazyMounts()); n != before {
		t.Errorf("%d EROFS mounts after a pull with lazy mounts turned off, want the %d of before", n, before)
	}
	b.read(second, "ordinary", 0).requireAll()
	r.requireAll()
	b.read(ref, "again", 0).requireAll()

	b.node.stop()
	must(t, os.WriteFile(b.node.config, []byte(strings.Replace(string(conf), slowly, "  except: ["+b.reg.Host()+"/team/reader-3]", 1)), 0o600))
	b.node.start()
	third, fourth := b.pushReader(3), b.pushReader(4)
	b.pull(third)
	if n := len(b.lazyMounts()); n != before {
		t.Errorf("%d EROFS mounts after a pull from a repository that is excepted, want %d", n, before)
	}
	b.pull(fourth)
	if n := len(b.lazyMounts()); n <= before {
		t.Error("another repository is not mounted lazily")
	}
}

// TestImagesLeaveNothing: with the images, mounts, snapshots and pins go.
func TestImagesLeaveNothing(t *testing.T) {
	b, ref := lazyReader(t)
	b.read(ref, "once", 0).requireAll()
	must(t, b.c.RemoveCtr(t.Context(), ref))
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		left, err := os.ReadDir(filepath.Join(b.node.dir, "data", "snapshots", "snapshots"))
		must(t, err)
		if len(b.lazyMounts()) == 0 && len(left) == 0 {
			break
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("%d mounts and %d snapshots are left", len(b.lazyMounts()), len(left))
		}
	}
	if out := b.node.accel("cache", "stat", "-o", "json"); strings.Contains(out, "snapshot/") {
		t.Errorf("pins are left: %s", out)
	}
	at, err := mountinfo.GetMounts(mountinfo.PrefixFilter(filepath.Join(b.node.dir, "data")))
	must(t, err)
	if len(at) > 0 {
		t.Errorf("%s is mounted still", at[0].Mountpoint)
	}
}

// corrupt changes a byte of the last layer of an image in the registry's own storage.
func (b *lazyBed) corrupt(ref string) {
	b.t.Helper()
	parsed, err := name.ParseReference(ref, name.Insecure)
	must(b.t, err)
	img, err := remote.Image(parsed, remote.WithAuth(&authn.Basic{Username: reader, Password: readerPassword}))
	must(b.t, err)
	layers, err := img.Layers()
	must(b.t, err)
	h, err := layers[len(layers)-1].Digest()
	must(b.t, err)
	size, err := layers[len(layers)-1].Size()
	must(b.t, err)
	path := filepath.Join(b.regDir, "registry", "docker", "registry", "v2", "blobs", h.Algorithm, h.Hex[:2], h.Hex, "data")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(b.t, err)
	defer f.Close()
	one := make([]byte, 1)
	_, err = f.ReadAt(one, size/2)
	must(b.t, err)
	one[0] ^= 0x10
	_, err = f.WriteAt(one, size/2)
	must(b.t, err)
	b.reg.Reset()
}

// complete waits until all of an image is on the node.
func (b *lazyBed) complete(ref string) {
	b.t.Helper()
	client := node.NewClient(b.node.socket())
	defer client.Close()
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		images, err := client.Mounted(b.t.Context())
		must(b.t, err)
		i := slices.IndexFunc(images, func(m node.MountedImage) bool { return m.Image == ref })
		if i >= 0 && images[i].LocalPercent == 100 && !slices.ContainsFunc(images[i].Layers, func(l lazy.LayerState) bool { return l.Lazy }) {
			return
		}
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("%s is not complete: %+v\n%s", ref, images, b.node.log)
		}
	}
}
