package e2e

import (
	"archive/tar"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/internal/debimage"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// capability is security.capability of cap_net_raw=ep (capabilities(7), version 2).
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func TestDebianImageIsTheSameTreeWhenMountedLazily(t *testing.T) {
	needsMounts(t)
	base, err := debimage.Minbase(context.Background(), os.Stderr)
	must(t, err)
	img := withLayers(t, base, "amd64",
		gzipped(t, tarOf(t,
			dir("opt"), dir("opt/app"), file("opt/app/one", noise(1, 3<<20), 0o644), link("opt/app/two", "opt/app/one", tar.TypeLink),
			file("opt/app/suid", "x", 0o4755).owned(0, 5), file("opt/app/capable", "y", 0o755).xattr("security.capability", capability),
			file("opt/app/tagged", "z", 0o600).owned(1000, 1000).xattr("user.note", "binary\x00value"),
			file("opt/app/empty", "", 0o444), special("opt/app/pipe", tar.TypeFifo, 0, 0), special("opt/app/null", tar.TypeChar, 1, 3),
			link("opt/app/dangling", "/no/such", tar.TypeSymlink), file("opt/app/ünïcode name", "u", 0o644),
			dir("opt/"+strings.Repeat("long", 50)), file("opt/"+strings.Repeat("long", 50)+"/"+strings.Repeat("name", 40), "long", 0o644),
		)),
		gzipped(t, tarOf(t,
			dir("etc"), file("etc/.wh.motd", "", 0), file("etc/hostname", "accel\n", 0o644),
			dir("usr"), dir("usr/share"), dir("usr/share/doc"), file("usr/share/doc/.wh..wh..opq", "", 0), file("usr/share/doc/only", "this", 0o644),
		)))

	u := start(t, t.TempDir(), "127.0.0.1:0")
	u.push("debian/minbase:v1", img)
	got := u.ready("debian/minbase:v1")
	if len(got.Target.Tags) != 1 || got.Target.Tags[0] != "v1-esgz" || got.Timings.TotalSeconds <= 0 {
		t.Errorf("answer lacks the target's tag or the timings: %+v", got)
	}
	target := u.reference("debian/minbase:v1-esgz")
	converted, err := remote.Image(target)
	must(t, err)
	want := walk(t, apply(t, img))
	if len(want) < 5000 {
		t.Fatalf("the source tree has %d files only", len(want))
	}
	t.Run("stock stargz mount", func(t *testing.T) { compare(t, want, walk(t, mountStock(t, target, converted))) })
	t.Run("unpacked in full", func(t *testing.T) { compare(t, want, walk(t, applyPlain(t, converted))) })
	u.stop()
}

// applyPlain unpacks a converted image as a client does that knows nothing of
// eStargz, and takes away the two files that the format adds to each layer.
func applyPlain(t *testing.T, img v1.Image) string {
	t.Helper()
	root := apply(t, img)
	for _, extra := range []string{"stargz.index.json", ".no.prefetch.landmark"} {
		must(t, os.Remove(filepath.Join(root, extra)))
	}
	return root
}

func TestIndexOfTwoPlatformsWithAttestation(t *testing.T) {
	amd := image(t, "amd64", gzipped(t, tarOf(t, file("amd", noise(1, 1<<20), 0o644))), zstded(t, tarOf(t, file("zstd", noise(2, 1<<20), 0o644))))
	arm := image(t, "arm64", static.NewLayer(tarOf(t, file("arm", noise(3, 1<<20), 0o644)), types.OCIUncompressedLayer), gzipped(t, tarOf(t)))
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, img := range []v1.Image{amd, arm} {
		cfg, err := img.ConfigFile()
		must(t, err)
		d, err := img.Digest()
		must(t, err)
		// As BuildKit does: an attestation manifest for each platform.
		attestation := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		attestation, err = mutate.AppendLayers(attestation, static.NewLayer([]byte(`{"_type":"https://in-toto.io/Statement/v0.1"}`), "application/vnd.in-toto+json"))
		must(t, err)
		idx = mutate.AppendManifests(idx,
			mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: cfg.Architecture}}},
			mutate.IndexAddendum{Add: attestation, Descriptor: v1.Descriptor{
				Platform:    &v1.Platform{OS: "unknown", Architecture: "unknown"},
				Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": d.String()},
			}})
	}
	path, err := raced()
	must(t, err)
	u := startProgram(t, path, t.TempDir(), "127.0.0.1:0")
	u.push("multi/app:v1", idx)
	got := u.ready("multi/app:v1")
	if !slices.Equal(got.Platforms, []string{"linux/amd64", "linux/arm64"}) {
		t.Errorf("platforms %v", got.Platforms)
	}
	if len(got.Notes) == 0 {
		t.Error("nothing is said of the attestations")
	}
	converted, err := remote.Index(u.reference("multi/app:v1-esgz"))
	must(t, err)
	m, err := converted.IndexManifest()
	must(t, err)
	if len(m.Manifests) != 2 || m.Subject == nil {
		t.Errorf("converted index has %d members and subject %v, want 2 and the source index", len(m.Manifests), m.Subject)
	}
	if os.Geteuid() == 0 {
		for i, img := range []v1.Image{amd, arm} {
			c, err := converted.Image(m.Manifests[i].Digest)
			must(t, err)
			compare(t, walk(t, apply(t, img)), walk(t, applyPlain(t, c)))
		}
	}
	var images []api.Image
	for img, err := range u.client.Images(context.Background(), api.ListOptions{}) {
		must(t, err)
		images = append(images, img)
	}
	if len(images) != 1 {
		t.Errorf("%d images, want the index alone: its children and our own push are not images of their own: %+v", len(images), images)
	}
	u.stop()
}

func TestConvertCommand(t *testing.T) {
	path, err := binary()
	must(t, err)
	work := t.TempDir()
	img := image(t, "amd64", gzipped(t, tarOf(t, dir("a"), file("a/b", noise(1, 1<<20), 0o644))))
	archive, out := filepath.Join(work, "app.tar"), filepath.Join(work, "out")
	tag, err := name.NewTag("example/app:v1")
	must(t, err)
	must(t, tarball.WriteToFile(archive, tag, img))
	var digests []string
	for _, to := range []string{"oci:" + out, "oci-archive:" + filepath.Join(work, "out.tar")} {
		cmd := exec.Command(path, "convert", "docker-archive:"+archive, to, "-o", "json")
		var said strings.Builder
		cmd.Stderr = &said
		raw, err := cmd.Output()
		if err != nil {
			t.Fatalf("convert to %s: %v\n%s", to, err, said.String())
		}
		var answer struct{ Digest string }
		must(t, json.Unmarshal(raw, &answer))
		digests = append(digests, answer.Digest)
	}
	if digests[0] != digests[1] {
		t.Errorf("the same conversion gave %v", digests)
	}
	index, err := layout.ImageIndexFromPath(out)
	must(t, err)
	h, err := v1.NewHash(digests[0])
	must(t, err)
	if _, err := index.Image(h); err != nil {
		t.Error(err)
	}
	for args, want := range map[string]int{
		"diff docker-archive:" + archive + " oci:" + out:          0,
		"diff oci-archive:" + out + ".tar oci:" + out:             0,
		"convert docker-archive:/no/such oci:" + work + "/x":      1,
		"convert docker-archive:" + archive + " docker-archive:x": 2,
		"convert onlyone": 2,
		"convert 127.0.0.1:9/app:v1 127.0.0.1:9/app:v1": 2,
	} {
		cmd := exec.Command(path, strings.Fields(args)...)
		err := cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != want {
			t.Errorf("accel %s: exit %d (%v), want %d", args, code, err, want)
		}
	}
	blobs, err := filepath.Glob(filepath.Join(out, "blobs", "sha256", "*"))
	must(t, err)
	must(t, os.WriteFile(blobs[0], []byte("other bytes"), 0o600))
	if said, err := exec.Command(path, "convert", "oci:"+out, "oci:"+filepath.Join(work, "again")).CombinedOutput(); err == nil || !strings.Contains(string(said), "damaged") {
		t.Errorf("a damaged layout was converted: %v, %s", err, said)
	}
	other := filepath.Join(work, "other.tar")
	must(t, tarball.WriteToFile(other, tag, image(t, "amd64", gzipped(t, tarOf(t, dir("a"), file("a/b", noise(2, 1<<20), 0o644))))))
	said, err := exec.Command(path, "diff", "docker-archive:"+archive, "docker-archive:"+other).Output()
	if err == nil || !strings.Contains(string(said), "a/b") {
		t.Errorf("diff of different images: %v, %q", err, said)
	}
}

func TestOneProcessPerDataDirectory(t *testing.T) {
	data := t.TempDir()
	u := start(t, data, "127.0.0.1:0")
	path, err := binary()
	must(t, err)
	out, err := exec.Command(path, "up", "--data", data, "--listen", "127.0.0.1:0", "--registry-listen", "127.0.0.1:0").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "in use") {
		t.Errorf("a second process on the same data: %v\n%s", err, out)
	}
	u.stop()
}

func TestWaitExitCodes(t *testing.T) {
	u := start(t, t.TempDir(), "127.0.0.1:0", "--policy-max-uncompressed-size", "1MB")
	u.push("ok:v1", image(t, "amd64", gzipped(t, tarOf(t, file("f", "small", 0o644)))))
	u.push("big:v1", image(t, "amd64", gzipped(t, tarOf(t, file("f", noise(1, 2<<20), 0o644)))))
	path, err := binary()
	must(t, err)
	for _, c := range []struct {
		image, timeout string
		code           int
		says           string
	}{
		{"ok:v1", "1m", 0, "v1-esgz@sha256:"},
		{"big:v1", "1m", 1, "policy.max_uncompressed_size"},
		{"never:v1", "300ms", 3, "not known"},
		{"Not A Name", "1s", 2, "Not A Name"},
	} {
		cmd := exec.Command(path, "wait", u.registry+"/"+c.image, "--timeout", c.timeout, "--server", u.client.Server())
		out, err := cmd.CombinedOutput()
		code := cmd.ProcessState.ExitCode()
		if code != c.code || !strings.Contains(string(out), c.says) {
			t.Errorf("wait %s: exit %d (%v), want %d; it says %q, want %q in it", c.image, code, err, c.code, out, c.says)
		}
	}
	if img, err := u.client.Readiness(context.Background(), u.registry+"/big:v1", 0); err != nil || img.State != accel.Rejected {
		t.Errorf("big:v1 is %s, %v", img.State, err)
	}
	u.stop()
}

func TestConvertAllListsNewestFirstAndSubmits(t *testing.T) {
	// No reconcile within the test's time: what is submitted comes from convert-all.
	u := start(t, t.TempDir(), "127.0.0.1:0", "--reconcile-interval", "1h")
	for i, name := range []string{"old", "new", "middle"} {
		img := image(t, "amd64", gzipped(t, tarOf(t, file("f", noise(uint64(i), 1<<10), 0o644))))
		cfg, err := img.ConfigFile()
		must(t, err)
		cfg = cfg.DeepCopy()
		cfg.Created = v1.Time{Time: stamp.Add(map[string]time.Duration{"old": 0, "middle": time.Hour, "new": 2 * time.Hour}[name])}
		img, err = mutate.ConfigFile(img, cfg)
		must(t, err)
		u.push("team/app:"+name, img)
		u.ready("team/app:" + name)
	}
	path, err := binary()
	must(t, err)
	for _, args := range [][]string{{"--dry-run"}, {"--rate", "100"}} {
		out, err := exec.Command(path, append([]string{"convert-all", u.registry + "/team/app", "-o", "json", "--server", u.client.Server()}, args...)...).Output()
		must(t, err)
		var found []struct{ Image, State string }
		must(t, json.Unmarshal(out, &found))
		var tags []string
		for _, f := range found {
			tags = append(tags, strings.TrimPrefix(f.Image, u.registry+"/team/app:"))
			if submitted := f.State != ""; submitted == (args[0] == "--dry-run") {
				t.Errorf("%v: %s has state %q", args, f.Image, f.State)
			}
		}
		if !slices.Equal(tags, []string{"new", "middle", "old"}) {
			t.Errorf("%v lists %v, want the newest first and none of our own output", args, tags)
		}
	}
	u.stop()
}
