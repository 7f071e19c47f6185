package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/profile"
	"accel/profile/ledger"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
)

func TestProfileCommands(t *testing.T) {
	b := newServiceBed(t, t.TempDir())
	part := func(list ...string) (items []accel.ProfileItem) {
		for _, name := range list {
			items = append(items, accel.ProfileItem{Layer: 1, Path: name, Offset: 4096, Bytes: 1000})
		}
		return items
	}
	learn := func(image, platform string, items []accel.ProfileItem) digest.Digest {
		m := digest.FromString(image + platform)
		at := ledger.Image{Repository: warmHost + "/team/app", Digest: digest.FromString(image), Platform: platform, Target: warmHost + "/team/app"}
		must(t, b.profiles.Learn(b.ctx, m, at, 2, ledger.Given{Predicted: items}))
		return m
	}
	native := "linux/" + runtime.GOARCH
	b.becomes("v1")
	b.becomes("v2")
	learn("v1", native, part("bin/a", "bin/b", "bin/odd\x1b[31m"))
	learn("v1", "linux/zarch", part("bin/zarch"))
	v2 := learn("v2", "linux/other", part("bin/b", "bin/c"))
	image := func(tag string) string { return warmHost + "/team/app:" + tag }
	run := func(want int, args ...string) string {
		t.Helper()
		code, out, said := accelRun(t, append(append([]string{"profile"}, args...), "--server", b.client.Server())...)
		if code != want {
			t.Fatalf("accel profile %v: exit %d, want %d: %s", args, code, want, said)
		}
		return out + said
	}
	has := func(text string, wants ...string) {
		t.Helper()
		for _, want := range wants {
			if !strings.Contains(strings.Join(strings.Fields(text), " "), want) {
				t.Errorf("%q is not in\n%s", want, text)
			}
		}
	}

	shown := run(exitOK, "show", image("v1"), "--platform", native)
	has(shown, "1 1 bin/a 4096-5095 1000", "2 1 bin/b 4096-5095 1000", "total 3 parts, predicted 3000")
	if strings.Contains(shown, "\x1b") {
		t.Errorf("a file's name reaches the terminal: %q", shown)
	}
	var p accel.Profile
	must(t, json.Unmarshal([]byte(run(exitOK, "show", image("v2"), "-o", "json")), &p)) // its only platform
	if p.Manifest != v2 || len(p.Items) != 2 {
		t.Errorf("%+v", p)
	}
	has(run(exitOK, "show", v2.String()), "bin/c")
	has(run(exitUsage, "show", image("v1"), "--platform", "linux/mips"), "choose one of "+native+", linux/zarch")
	run(exitFailed, "show", image("unknown"))

	has(run(exitOK, "diff", image("v1"), image("v2"), "--platform", ""), "- 0 bin/a", "+ 0 bin/c", "only in A 2000", "only in B 1000", "in both 1000")
	file := filepath.Join(t.TempDir(), "v2.json")
	must(t, os.WriteFile(file, []byte(run(exitOK, "export", image("v2"))), 0o600))
	has(run(exitOK, "diff", file, image("v2")), "only in A 0", "in both 2000")
	has(run(exitOK, "import", image("v1"), file, "--platform", "linux/zarch"), "linux/zarch: imported, 2.0 kB in 2 parts")
	must(t, os.WriteFile(file, []byte("nonsense"), 0o600))
	run(exitUsage, "import", image("v1"), file)

	r := profile.Report{
		ID: fmt.Sprintf("%032x", 1), Manifest: v2, StartedAt: time.Unix(1_800_000_000, 0), Complete: true,
		End: profile.EndAnswered, Took: 1500 * time.Millisecond, Profile: digest.FromString("x"), Items: part("bin/b"),
	}
	_, err := b.client.ReportStart(b.ctx, "n1", r)
	must(t, err)
	has(statusOfImage(t, b.client, image("v2")), "linux/other: recorded, 1.0 kB in 1 parts; 1 starts reported, 100 % of what they read was named, 1.0 kB in vain; answered after 1.50s with a profile (1)")
	has(run(exitOK, "rm", image("v2")), "forgotten: "+v2.String())
	has(statusOfImage(t, b.client, image("v2")), "linux/other: none")
	run(exitFailed, "show", image("v2"))
}

// TestListPathsOfAConvertedImage is the whole way of a list: command, API, the image's tables of contents, its profile.
func TestListPathsOfAConvertedImage(t *testing.T) {
	registry := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(registry.Close)
	host := strings.TrimPrefix(registry.URL, "http://")
	b := newServiceBedAt(t, t.TempDir(), host)
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan error, 1)
	go func() { done <- b.worker.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
	})
	var files bytes.Buffer
	tw := tar.NewWriter(&files)
	for _, name := range []string{"app/run", "app/data/one", "app/data/two", "app/[id]/page", "etc/passwd"} {
		must(t, tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: 4}))
		_, err := tw.Write([]byte("text"))
		must(t, err)
	}
	must(t, tw.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil })
	must(t, err)
	img, err := mutate.AppendLayers(empty.Image, layer)
	must(t, err)
	img, err = mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs(t, layer)}})
	must(t, err)
	image := host + "/team/app:v1"
	ref, err := name.ParseReference(image, name.Insecure)
	must(t, err)
	must(t, remote.Write(ref, img))
	_, err = b.client.Submit(b.ctx, image)
	must(t, err)
	if got, err := b.client.Wait(b.ctx, image, patience); err != nil || got.State != accel.Ready {
		t.Fatalf("%+v, %v", got, err)
	}
	run := func(want int, stdin string, args ...string) string {
		t.Helper()
		var out, said bytes.Buffer
		if code := run(b.ctx, append(append([]string{"profile"}, args...), "--server", b.client.Server()), strings.NewReader(stdin), &out, &said); code != want {
			t.Fatalf("accel profile %v: exit %d, want %d: %s", args, code, want, said.String())
		}
		return strings.Join(strings.Fields(out.String()+said.String()), " ")
	}
	got := run(exitOK, "# hot files\r\n\n/app/data\r\n../../app/[id]/page\nno/such\n", "import", image, "--paths", "-")
	if want := "listed, 0.0 kB in 3 parts 1 of 3 lines mean no file with content in the image: no/such"; !strings.Contains(got, want) {
		t.Errorf("%s, want %s", got, want)
	}
	if got := run(exitOK, "", "show", image); !strings.Contains(got, "1 0 app/data/one 0-3 4 2 0 app/data/two 0-3 4 3 0 app/[id]/page 0-3 4") {
		t.Error(got)
	}
	file := filepath.Join(t.TempDir(), "paths.txt")
	for what, c := range map[string]struct {
		text string
		code int
	}{
		"nothing of the image": {"/no/such\n", exitUsage}, "a million lines": {strings.Repeat("/\n", 1_000_000), exitUsage}, "too many lines": {strings.Repeat("/\n", profile.MaxListed+1), exitUsage},
		"a zero byte": {"/app\x00\n", exitUsage}, "a long name": {strings.Repeat("a/", 3000), exitUsage},
	} {
		must(t, os.WriteFile(file, []byte(c.text), 0o600))
		if said := run(c.code, "", "import", image, "--paths", file); said == "" {
			t.Errorf("%s: nothing is said", what)
		}
	}
	run(exitUsage, "", "import", image, file, "--paths", file)
	run(exitUsage, "", "import", image)
	if got := run(exitOK, "", "import", image, "--paths", "-"); !strings.Contains(got, ": none") {
		t.Errorf("an empty list leaves %s", got)
	}
	if got := run(exitOK, "", "import", "--help"); !strings.Contains(got, "--paths hot-files.txt") {
		t.Error(got)
	}
}

func diffIDs(t *testing.T, l v1.Layer) []v1.Hash {
	t.Helper()
	d, err := l.DiffID()
	must(t, err)
	return []v1.Hash{d}
}

func statusOfImage(t *testing.T, c *api.Client, image string) string {
	t.Helper()
	code, out, said := accelRun(t, "status", image, "--server", c.Server())
	if code != exitOK {
		t.Fatalf("accel status: exit %d, %s", code, said)
	}
	return out
}
