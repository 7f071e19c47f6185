package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"accel"
	"accel/cache"
	"accel/internal/debimage"
	"accel/internal/testbed"
	"accel/lazy"
	"accel/node"
	"accel/profile"
	"accel/profile/artifact"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// onDemand keeps the background from bringing everything before the program asks for it.
const onDemand = "  background: 1KB"

// lackingBytes of the blobs may be fetched because reads missed them, where a good profile is fetched ahead: by the first read, which
// may come before the plan is made and then brings what lies near, and some chunks. Without a profile it is more than twice that.
const lackingBytes = 2<<20 + 400_000

// pyContainer is where the tests here start debimage.PyWeb.
const pyContainer = "web"

// admin asks the node by its socket.
func (n *nodeRun) admin() *node.Client {
	c := node.NewClient(n.socket())
	n.t.Cleanup(c.Close)
	return c
}

// recordedStart pulls and starts debimage.PyWeb until it answers, ends it, and gives what was recorded of that.
func (b *lazyBed) recordedStart(ref string) lazy.Start {
	b.t.Helper()
	b.pull(ref)
	b.run("default", ref, pyContainer)
	answers(b.t, pyURL)
	client := b.node.admin()
	must(b.t, client.Answered(b.t.Context(), node.Answered{Container: pyContainer}))
	defer b.end("default", pyContainer)
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		starts, err := client.Starts(b.t.Context())
		must(b.t, err)
		if len(starts) > 0 && starts[0].End != "" {
			if starts[0].Problem != "" {
				b.t.Fatalf("the recording is lost: %s", starts[0].Problem)
			}
			// Every file that the program read was seen, but for those of the mounts that a runtime makes, in whole chunks.
			files, bytes := resident(b.t, b.rootfs("default", pyContainer))
			b.t.Logf("recorded: %d files, %d bytes; the kernel has %d of %d files", starts[0].Files, starts[0].Bytes, bytes, files)
			if starts[0].Complete && (starts[0].Files < files || starts[0].Bytes < bytes) {
				b.t.Errorf("%d bytes of %d files were recorded, the kernel has %d of %d", starts[0].Bytes, starts[0].Files, bytes, files)
			}
			return starts[0]
		}
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("the recording does not end: %+v\n%s", starts, b.node.log)
		}
	}
}

// resident is what the kernel has of the files below a container's root, when nothing had been there before it
// started: all that was read of them, and no more.
func resident(t *testing.T, root string) (files int, bytes int64) {
	t.Helper()
	page := int64(os.Getpagesize())
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil || info.Size() == 0 {
			return err
		}
		mapped, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_NONE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		defer unix.Munmap(mapped)
		pages := make([]byte, (info.Size()+page-1)/page)
		if _, _, no := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), uintptr(len(mapped)), uintptr(unsafe.Pointer(&pages[0]))); no != 0 {
			return no
		}
		var here int64
		for _, p := range pages {
			here += int64(p&1) * page
		}
		if here > 0 {
			files++
			bytes += min(here, info.Size())
		}
		return nil
	}))
	return files, bytes
}

// wipe takes an image from containerd and from the node's cache.
func (b *lazyBed) wipe(ref string) {
	b.t.Helper()
	_, err := b.c.Ctr(b.t.Context(), "images", "rm", "--sync", ref)
	must(b.t, err)
	client := b.node.admin()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) { // containerd collects its snapshots a moment later
		_, err := client.Remove(b.t.Context(), ref)
		if err == nil || errors.Is(err, accel.ErrNotFound) {
			break
		}
		if !errors.Is(err, accel.ErrConflict) || time.Since(begin) > time.Minute {
			b.t.Fatalf("wipe %s: %v", ref, err)
		}
	}
	b.reg.Reset()
}

// pyBed is a bed whose registry has debimage.PyWeb, converted.
func pyBed(t *testing.T, make func(*testing.T, string, ...string) *lazyBed) (b *lazyBed, ref string, img v1.Image) {
	t.Helper()
	needsClients(t)
	img, err := debimage.PyWeb(t.Context(), os.Stderr)
	must(t, err)
	b = make(t, testbed.Containerd2, onDemand)
	ref, _ = pushTo(t, b.reg, "team/pyweb:v1", img)
	b.convert(ref)
	return b, ref, img
}

// manifestOf is the digest of an image's manifest.
func manifestOf(t *testing.T, img v1.Image) digest.Digest {
	t.Helper()
	h, err := img.Digest()
	must(t, err)
	return digest.Digest(h.String())
}

// TestProfilesCloseTheLoop: a converted image has a predicted profile before it was ever started; its first start is
// recorded and reported, and the next cold start finds fetched ahead what the first has read.
func TestProfilesCloseTheLoop(t *testing.T) {
	b, ref, img := pyBed(t, newLazyBed)
	manifest := manifestOf(t, img)
	b.awaitProfile(manifest, accel.ProfilePredicted)
	b.awaitArtifact(manifest)
	first := b.recordedStart(ref)
	if !first.Complete || first.End != "answered" || first.Files < 50 || first.Bytes < 5<<20 {
		t.Errorf("the first start is recorded as %+v", first)
	}
	if first.Ahead == nil || first.Ahead.From != "server" || first.Ahead.Origin != accel.ProfilePredicted {
		t.Fatalf("the prediction was not fetched ahead of the first start: %+v\n%s", first, b.node.log)
	}
	b.awaitProfile(manifest, accel.ProfileRecorded)
	b.wipe(ref)
	second := b.recordedStart(ref)
	if second.Ahead == nil || second.Ahead.Origin != accel.ProfileRecorded {
		t.Fatalf("the recording was not fetched ahead of the second start: %+v\n%s", second, b.node.log)
	}
	// A read may still wait for what is on its way.
	if second.DemandedBytes > max(first.DemandedBytes, lackingBytes) {
		t.Errorf("the recording lacked %d bytes, the prediction %d", second.DemandedBytes, first.DemandedBytes)
	}
	t.Logf("demanded %d, then %d", first.DemandedBytes, second.DemandedBytes)
	if a := second.Ahead; a.UsedBytes < 9*second.Bytes/10 || a.VainBytes > a.UsedBytes/2 {
		t.Errorf("of %d bytes that were read, %d had been fetched ahead, and %d in vain", second.Bytes, a.UsedBytes, a.VainBytes)
	}
	// Nothing comes twice: what the registry delivered is less than the plan with the tables and what was missed.
	var packed int64
	for _, n := range b.reg.Delivered().Blobs {
		packed += n
	}
	t.Logf("the registry delivered %d bytes for a plan of %d of content", packed, second.Ahead.PlannedBytes)
	if most := second.Ahead.PlannedBytes + 8<<20; packed > most {
		t.Errorf("the registry delivered %d bytes for a plan of %d bytes of content\n%v\n%s", packed, second.Ahead.PlannedBytes, b.reg.Delivered().Blobs, b.node.metrics())
	}
	if said := b.node.accel("ps"); !strings.Contains(said, "(recorded)") {
		t.Errorf("accel ps does not tell of the profile: %s", said)
	}
}

// awaitProfile waits until the server's profile of an image has an origin.
func (b *lazyBed) awaitProfile(manifest digest.Digest, origin accel.ProfileOrigin) accel.Profile {
	b.t.Helper()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		p, err := b.server.client.Profile(b.t.Context(), manifest)
		if err == nil && p.Origin == origin {
			return p
		}
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("no %s profile of %s: %s, %v\n%s", origin, manifest, p.Origin, err, b.server.log)
		}
	}
}

// TestProfileFromTheRegistryAlone: a node that knows no server finds the profile beside the mapping; and what it records
// itself counts more.
func TestProfileFromTheRegistryAlone(t *testing.T) {
	b, ref, img := pyBed(t, newLonelyBed)
	b.awaitArtifact(manifestOf(t, img))
	first := b.recordedStart(ref)
	if first.Ahead == nil || first.Ahead.From != "registry" || !first.Complete {
		t.Fatalf("the profile in the registry was not fetched ahead: %+v\n%s", first, b.node.log)
	}
	b.wipe(ref)
	second := b.recordedStart(ref)
	if second.Ahead == nil || second.Ahead.From != "node" || second.Ahead.Origin != accel.ProfileRecorded {
		t.Fatalf("the node's own recording was not fetched ahead: %+v\n%s", second, b.node.log)
	}
	if second.DemandedBytes > max(first.DemandedBytes, lackingBytes) {
		t.Errorf("the node's own recording lacked %d bytes, the registry's profile %d", second.DemandedBytes, first.DemandedBytes)
	}
}

// registryClient is a client of the bed's registry that may push.
func (b *lazyBed) registryClient() *registry.Client {
	b.t.Helper()
	c, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: b.reg.Host(), PlainHTTP: true, Username: writer, Password: writerPassword}}})
	must(b.t, err)
	b.t.Cleanup(c.Close)
	return c
}

// awaitArtifact waits until the service has published a profile with its boot bundle, and reads nothing from the registry any more.
func (b *lazyBed) awaitArtifact(manifest digest.Digest) {
	b.t.Helper()
	c := b.registryClient()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		list, err := c.Referrers(b.t.Context(), b.reg.Host()+"/team/pyweb", manifest, accel.MediaTypeProfile)
		must(b.t, err)
		if _, ok := artifact.BundleIn(list, manifest); ok {
			return
		}
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("no profile is published with a boot bundle: %+v\n%s", list, b.server.log)
		}
	}
}

// TestHostileProfiles: whoever may push to the repository can attach a profile. Whatever it says, the container
// starts, and what is fetched because of it is bounded.
func TestHostileProfiles(t *testing.T) {
	b, ref, img := pyBed(t, newLonelyBed)
	manifest := manifestOf(t, img)
	c := b.registryClient()
	repository := b.reg.Host() + "/team/pyweb"
	b.awaitArtifact(manifest)
	subject, err := c.Head(t.Context(), repository, manifest.String())
	must(t, err)
	attach := func(packed string) {
		t.Helper()
		_, err := c.Attach(t.Context(), repository, subject, accel.MediaTypeProfile, map[string]string{accel.AnnotationProfile: packed})
		must(t, err)
	}
	packedOf := func(p accel.Profile) string {
		t.Helper()
		form, err := artifact.FormOf(p)
		must(t, err)
		return form.Annotations[accel.AnnotationProfile]
	}
	whole := []accel.ProfileItem{}
	for layer, files := range regularFiles(t, img) {
		for _, path := range files {
			whole = append(whole, accel.ProfileItem{Layer: layer, Path: path, Bytes: 1 << 30})
		}
	}
	// The later ones count more than those before, and all more than the service's own.
	starts := 0
	claims := func(of digest.Digest, items ...accel.ProfileItem) string {
		starts++
		return packedOf(accel.Profile{Manifest: of, Origin: accel.ProfileRecorded, Starts: starts, RecordedAt: time.Now().UTC().Truncate(time.Second), Items: items})
	}
	hostile := []struct{ name, packed string }{
		{"not base64", "~~~~"},
		{"not gzip", base64.StdEncoding.EncodeToString([]byte("hello"))},
		{"zeros", base64.StdEncoding.EncodeToString(profile.Pack(make([]byte, 16<<20)))},
		{"another image's", claims(digest.FromString("another image"), accel.ProfileItem{Path: "etc/passwd", Bytes: 10})},
		{"out of range", claims(manifest, accel.ProfileItem{Layer: 400, Path: "etc/passwd", Bytes: 10},
			accel.ProfileItem{Path: "etc/passwd", Offset: 1 << 38, Bytes: 1 << 30}, accel.ProfileItem{Path: "no/such/file", Bytes: 1 << 38})},
		{"everything", claims(manifest, whole[:min(len(whole), profile.MaxItems)]...)},
	}
	var content int64
	for _, n := range contentBytes(t, img) {
		content += n
	}
	for _, h := range hostile {
		t.Run(h.name, func(t *testing.T) {
			attach(h.packed)
			b := *b
			b.t = t
			start := b.recordedStart(ref)
			// Half of the data files, where each file begins with a block of its own.
			if start.Ahead != nil && start.Ahead.PlannedBytes > content*6/10 {
				t.Errorf("%d bytes of %d were planned", start.Ahead.PlannedBytes, content)
			}
			if !start.Complete || start.Problem != "" {
				t.Errorf("the start is recorded as %+v", start)
			}
			b.wipe(ref)
			must(t, os.RemoveAll(filepath.Join(b.node.dir, "data", "lazy", "profiles"))) // what it recorded itself would count more
			must(t, os.Mkdir(filepath.Join(b.node.dir, "data", "lazy", "profiles"), 0o700))
		})
	}
}

// regularFiles are those of each layer.
func regularFiles(t *testing.T, img v1.Image) (files [][]string) {
	t.Helper()
	eachLayer(t, img, func(h *tar.Header, layer int) {
		for len(files) <= layer {
			files = append(files, nil)
		}
		if h.Typeflag == tar.TypeReg && h.Size > 0 {
			files[layer] = append(files[layer], path.Clean("/" + h.Name)[1:])
		}
	})
	return files
}

// contentBytes are the sums of the sizes of each layer's files.
func contentBytes(t *testing.T, img v1.Image) map[int]int64 {
	t.Helper()
	sum := map[int]int64{}
	eachLayer(t, img, func(h *tar.Header, layer int) { sum[layer] += h.Size })
	return sum
}

func eachLayer(t *testing.T, img v1.Image, do func(h *tar.Header, layer int)) {
	t.Helper()
	layers, err := img.Layers()
	must(t, err)
	for n, l := range layers {
		r, err := l.Uncompressed()
		must(t, err)
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			do(h, n)
		}
		must(t, r.Close())
	}
}

// TestProfileRecord is `accel profile record`: it starts the image by itself, tells how long that took, and leaves
// nothing; a program that does not answer, or only to its own machine, is an error in words.
func TestProfileRecord(t *testing.T) {
	b, ref, img := pyBed(t, newLazyBed)
	record := func(args ...string) (string, error) {
		return accelCommand(append([]string{"profile", "record", "--config", b.node.config, "--containerd-socket", b.c.Socket(), ref}, args...)...)
	}
	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"local", []string{"--", "python3", "-m", "http.server", "9000", "--bind", "127.0.0.1"}, "listens on 127.0.0.1:9000 only"},
		{"silent", []string{"--startup-timeout", "2s", "--", "sleep", "60"}, "nothing listens on port 9000"},
		{"ends", []string{"--", "python3", "-c", "print('went wrong'); raise SystemExit(7)"}, "exit code 7"},
		{"elsewhere", []string{"--port", strings.TrimPrefix(b.reg.Host(), "127.0.0.1:")}, "already"},
	} {
		if said, err := record(c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %s, %v: want an error with %q", c.name, said, err, c.want)
		}
		b.gone()
	}
	if p, err := b.server.client.Profile(t.Context(), manifestOf(t, img)); err == nil && p.Origin == accel.ProfileRecorded {
		t.Errorf("failed starts made a profile")
	}
	b.wipeLayers()
	said, err := record("-o", "json")
	must(t, err)
	var r struct {
		PullSeconds, CreateSeconds, AnswerSeconds float64
		Start                                     lazy.Start
	}
	must(t, json.Unmarshal([]byte(said), &r))
	if r.PullSeconds <= 0 || r.CreateSeconds <= 0 || r.AnswerSeconds <= r.CreateSeconds || !r.Start.Complete || r.Start.End != "answered" || r.Start.Files < 50 {
		t.Errorf("recorded %s", said)
	}
	b.gone()
	b.awaitProfile(manifestOf(t, img), accel.ProfileRecorded)
}

// gone requires that no container, no image and no mount is left of what a verb started.
func (b *lazyBed) gone() {
	b.t.Helper()
	for _, namespace := range []string{"accel-record", "accel-bench"} {
		for _, what := range []string{"containers", "images"} {
			left, err := b.c.CtrCommand(b.t.Context(), "-n", namespace, what, "ls", "-q").Output() // it warns on standard error
			if err != nil || len(bytes.TrimSpace(left)) > 0 {
				b.t.Errorf("%s are left: %q, %v", what, left, err)
			}
		}
	}
	for begin := time.Now(); len(b.lazyMounts()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			b.t.Fatalf("mounts are left: %v", b.lazyMounts())
		}
	}
}

// wipeLayers drops every layer of the node's cache.
func (b *lazyBed) wipeLayers() {
	b.t.Helper()
	client := b.node.admin()
	blobs, err := client.List(b.t.Context())
	must(b.t, err)
	for _, e := range blobs {
		for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			_, err := client.Remove(b.t.Context(), e.Digest.String())
			if err == nil || errors.Is(err, accel.ErrNotFound) {
				break
			}
			if time.Since(begin) > time.Minute {
				b.t.Fatal(err)
			}
		}
	}
}

// TestBench is `accel bench`: each way is measured from a machine without the image, nothing is left behind, and what other
// namespaces use is refused.
func TestBench(t *testing.T) {
	b, ref, img := pyBed(t, newLazyBed)
	file := filepath.Join(t.TempDir(), "plot.svg")
	args := []string{"bench", "--config", b.node.config, "--containerd-socket", b.c.Socket(), "--runs", "2", "--plot", file, "-o", "json", ref}
	said, err := accelCommand(args...)
	must(t, err)
	var rows []struct {
		Image, Way   string
		TotalSeconds float64
		FetchedBytes int64
		Misses       int64
		Runs         []struct{ PullSeconds, StartSeconds float64 }
	}
	must(t, json.Unmarshal([]byte(said), &rows))
	came, misses := map[string]int64{}, map[string]int64{}
	for _, r := range rows {
		if r.Image != ref || len(r.Runs) != 2 || r.TotalSeconds <= 0 {
			t.Errorf("row %+v", r)
		}
		came[r.Way], misses[r.Way] = r.FetchedBytes, r.Misses
	}
	var whole int64
	for _, n := range layerSizes(t, img) {
		whole += n
	}
	if came["full"] != whole || came["lazy"] <= 0 || came["lazy"] > whole/2 || came["profile"] <= 0 || came["profile"] > whole/2 || came["warm"] > came["profile"]/10 {
		t.Errorf("of %d bytes came %v", whole, came)
	}
	if misses["lazy"] == 0 || misses["profile"] > misses["lazy"]/2 || misses["warm"] > 2 {
		t.Errorf("reads that waited: %v", misses)
	}
	drawn, err := os.ReadFile(file)
	must(t, err)
	for dec := xml.NewDecoder(bytes.NewReader(drawn)); ; {
		if _, err := dec.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v\n%s", err, drawn)
		}
	}
	if out := os.Getenv("ACCEL_TEST_OUT"); out != "" {
		must(t, os.WriteFile(filepath.Join(out, "bench.svg"), drawn, 0o600))
	}
	b.gone()

	b.pull(ref) // into another namespace
	if said, err := accelCommand(args...); err == nil || !strings.Contains(err.Error(), `namespace "default"`) {
		t.Errorf("an image that another namespace has is measured: %s, %v", said, err)
	}
}

// TestWarmBringsTheHotSet: a warm of an image that is mounted lazily brings what its start reads, and no blob of the
// source; without a profile it brings all.
func TestWarmBringsTheHotSet(t *testing.T) {
	b, ref, img := pyBed(t, func(t *testing.T, version string, more ...string) *lazyBed {
		return newLazyBed(t, version, append(more, "warm: {form: lazy}")...)
	})
	manifest := manifestOf(t, img)
	b.awaitProfile(manifest, accel.ProfilePredicted)
	warm := func() {
		t.Helper()
		warms, err := b.server.client.Warm(t.Context(), ref)
		must(t, err)
		warms, err = b.server.client.WaitWarms(t.Context(), ref, warms, time.Minute)
		must(t, err)
		for _, w := range warms {
			if w.State != accel.WarmDone || w.FetchedBytes == 0 || w.TotalBytes < w.FetchedBytes {
				t.Fatalf("warm %+v\n%s", w, b.node.log)
			}
		}
	}
	warm()
	delivered := b.reg.Delivered()
	for d := range layerSizes(t, img) {
		if n := delivered.Blobs[d]; n > 0 {
			t.Errorf("the registry delivered %d bytes of layer %s for a warm of its converted form", n, d)
		}
	}
	b.reg.Reset()
	start := b.recordedStart(ref)
	// What the prediction has not foretold; nothing is on its way any more.
	if start.Misses > 8 || start.MissBytes > 500_000 {
		t.Errorf("after a warm, %d reads waited for %d bytes", start.Misses, start.MissBytes)
	}
	b.wipe(ref)
	_, err := b.server.client.RemoveProfile(t.Context(), manifest)
	must(t, err)
	client := b.node.admin()
	must(t, client.FetchAhead(t.Context(), node.FetchAhead{Manifest: manifest, On: false}))
	warm()
	blobs, err := client.List(t.Context())
	must(t, err)
	layers := 0
	for _, e := range blobs {
		if e.Form == cache.FormLayer {
			layers++
			if !e.Complete {
				t.Errorf("layer %s is not complete: %d of %d chunks", e.Digest, e.PresentChunks, e.Chunks)
			}
		}
	}
	if layers != len(layerSizes(t, img)) {
		t.Errorf("%d layers of %d", layers, len(layerSizes(t, img)))
	}
}

// TestRecordingsSurviveTheServersAbsence: what cannot be reported is, when the server is back, also by the next daemon.
func TestRecordingsSurviveTheServersAbsence(t *testing.T) {
	b, ref, img := pyBed(t, newLazyBed)
	b.awaitProfile(manifestOf(t, img), accel.ProfilePredicted)
	b.pull(ref) // the node has the server's keys from now on
	b.server.kill()
	if start := b.recordedStart(ref); !start.Complete {
		t.Fatalf("recorded %+v", start)
	}
	b.node.stop()
	was := b.server.client.Server()
	b.server = b.serve()
	conf, err := os.ReadFile(b.node.config)
	must(t, err)
	must(t, os.WriteFile(b.node.config, bytes.Replace(conf, []byte(was), []byte(b.server.client.Server()), 1), 0o600))
	b.node.start()
	b.awaitProfile(manifestOf(t, img), accel.ProfileRecorded)
}
