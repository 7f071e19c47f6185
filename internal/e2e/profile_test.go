package e2e

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/cache"
	"accel/lazy"
	"accel/node"
)

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
	// Once more, with all that it read in the cache.
	said, err = record("-o", "json")
	must(t, err)
	must(t, json.Unmarshal([]byte(said), &r))
	if r.Start.End != "answered" || r.Start.Files < 50 {
		t.Errorf("recorded again %s", said)
	}
	b.gone()
	// What it was mounted from is found by its name when another daemon looked at it, and not only its blobs.
	b.node.stop()
	b.node.start()
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) { // containerd removes snapshots a moment after their image
		said, err = accelCommand("cache", "rm", "--config", b.node.config, ref)
		if err == nil || time.Since(begin) > time.Minute {
			break
		}
	}
	must(t, err)
	blobs, err := b.node.admin().List(t.Context())
	must(t, err)
	for _, e := range blobs {
		if e.Form == cache.FormLayer {
			t.Errorf("layer %s stays in the cache: %s", e.Digest, said)
		}
	}
}

// TestRecordAfterAKilledOne: what a record that was killed left in containerd is removed by the next, which says so; of one that
// lives, nothing is.
func TestRecordAfterAKilledOne(t *testing.T) {
	b, ref, _ := pyBed(t, newLazyBed)
	path, err := binary()
	must(t, err)
	args := []string{"profile", "record", "--config", b.node.config, "--containerd-socket", b.c.Socket(), ref}
	killed := exec.Command(path, append(args, "--port", "9001", "--", "sleep", "600")...) //nolint:noctx // killed below
	must(t, killed.Start())
	running := func() int {
		out, err := b.c.CtrCommand(t.Context(), "-n", "accel-record", "tasks", "ls", "-q").Output()
		must(t, err)
		return len(strings.Fields(string(out)))
	}
	for began := time.Now(); running() == 0; time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > time.Minute {
			t.Fatal("the first record starts nothing")
		}
	}
	taken := strings.TrimPrefix(b.reg.Host(), "127.0.0.1:") // so that it ends before it pulls the same image
	if said, err := accelCommand(append(args, "--port", taken)...); err == nil || !strings.Contains(err.Error(), "already") || running() != 1 {
		t.Errorf("a record beside another: %s, %v; %d containers run", said, err, running())
	}
	must(t, killed.Process.Kill())
	_ = killed.Wait() // it was killed
	if running() != 1 {
		t.Fatal("the container of a killed record is gone by itself")
	}
	next := exec.CommandContext(t.Context(), path, args...)
	out, err := next.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "removed container record-") || !strings.Contains(string(out), "removed image "+ref) {
		t.Errorf("after a killed record: %v\n%s", err, out)
	}
	b.gone()
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
