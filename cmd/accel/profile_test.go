package main

import (
	"encoding/json"
	"fmt"
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

func statusOfImage(t *testing.T, c *api.Client, image string) string {
	t.Helper()
	code, out, said := accelRun(t, "status", image, "--server", c.Server())
	if code != exitOK {
		t.Fatalf("accel status: exit %d, %s", code, said)
	}
	return out
}
