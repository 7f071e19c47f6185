package lazy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/profile"
	"accel/profile/artifact"
	"accel/registry"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/opencontainers/go-digest"
)

// reportOn is what a start read: some files, whole.
func reportOn(manifest digest.Digest, id int, files ...string) profile.Report {
	r := profile.Report{
		ID: fmt.Sprintf("%032x", id), Node: "n1", Manifest: manifest, StartedAt: time.Unix(1_700_000_000+int64(id), 0).UTC(), Complete: true, End: profile.EndAnswered,
	}
	for _, f := range files {
		r.Items = append(r.Items, accel.ProfileItem{Path: f, Bytes: 4096})
	}
	return r
}

// recorder is a Lazy that keeps and reports starts, and looks for profiles, and nothing else.
func recorder(t *testing.T, server string) *Lazy {
	t.Helper()
	dir := t.TempDir()
	l := &Lazy{starts: startsOf(t)}
	l.o.Log, l.o.Node = slog.New(slog.DiscardHandler), "n1"
	l.profiles.dir, l.reports = filepath.Join(dir, "profiles"), reports{dir: filepath.Join(dir, "starts"), wake: make(chan struct{}, 1)}
	for _, d := range []string{l.profiles.dir, l.reports.dir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if server != "" {
		transport := &http.Transport{DisableKeepAlives: true}
		client, err := api.NewClient(server, api.WithHTTPClient(&http.Client{Transport: transport}))
		if err != nil {
			t.Fatal(err)
		}
		l.o.Server = client
	}
	return l
}

func paths(p accel.Profile) (names []string) {
	for _, i := range p.Items {
		names = append(names, i.Path)
	}
	return names
}

// refuse answers as the server does.
func refuse(w http.ResponseWriter, code int) {
	said := map[int]error{http.StatusNotFound: accel.ErrNotFound, http.StatusBadRequest: accel.ErrInvalid, http.StatusForbidden: accel.ErrForbidden, http.StatusUnauthorized: accel.ErrUnauthenticated}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(code)
	if err := said[code]; err != nil {
		_ = json.NewEncoder(w).Encode(api.Problem(err)) // the client's matter
	}
}

func TestOwnProfiles(t *testing.T) {
	l := recorder(t, "")
	app := named("app")
	if _, err := l.profiles.get(app); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a profile of what was never started: %v", err)
	}
	for i := range 3 {
		if n, err := l.profiles.add(reportOn(app, i, "bin/app", "lib/a", "lib/b")); err != nil || n != i+1 {
			t.Fatalf("%d reports, %v", n, err)
		}
	}
	p, err := l.profiles.get(app)
	if err != nil || p.Origin != accel.ProfileRecorded || p.Starts != 3 || strings.Join(paths(p), " ") != "bin/app lib/a lib/b" {
		t.Errorf("profile %+v, %v", p, err)
	}

	// The image is used in another way from now on: what it read before counts no more.
	if n, err := l.profiles.add(reportOn(app, 9, "bin/app", "share/x", "share/y", "share/z")); err != nil || n != 1 {
		t.Errorf("%d reports after another use, %v", n, err)
	}
	if p, err := l.profiles.get(app); err != nil || strings.Join(paths(p), " ") != "bin/app share/x share/y share/z" {
		t.Errorf("profile after another use: %v, %v", paths(p), err)
	}

	if err := os.WriteFile(l.profiles.path(app), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.profiles.get(app); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a damaged profile: %v", err)
	}
	if n, err := l.profiles.add(reportOn(app, 10, "bin/app")); err != nil || n != 1 {
		t.Errorf("%d reports in a damaged file's place, %v", n, err)
	}
	if err := l.profiles.remove(app); err != nil {
		t.Fatal(err)
	}
	if err := l.profiles.remove(app); err != nil {
		t.Error("removed twice:", err)
	}
}

func TestFilesAreBounded(t *testing.T) {
	dir := t.TempDir()
	for i := range 10 {
		name := filepath.Join(dir, fmt.Sprint(i, reportSuffix))
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := time.Now().Add(time.Duration(i-100) * time.Minute)
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
	}
	old, young := filepath.Join(dir, ".left"), filepath.Join(dir, ".making")
	for _, name := range []string{old, young} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(old, time.Now().Add(-time.Hour), time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := keepNewest(dir, reportSuffix, 3); err != nil {
		t.Fatal(err)
	}
	left, err := filesIn(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range left {
		names = append(names, f.Name())
	}
	if got := strings.Join(names, " "); got != "7.report 8.report 9.report .making" {
		t.Errorf("left: %s", got)
	}
}

// A server that is away hears of starts later; what it refuses is dropped, and it says whether it wants more.
func TestReportsOfStarts(t *testing.T) {
	var status atomic.Int64
	var got atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if code := int(status.Load()); code != http.StatusOK {
			refuse(w, code)
			return
		}
		got.Add(1)
		fmt.Fprint(w, `{"wantMore": false}`)
	}))
	defer server.Close()
	l := recorder(t, server.URL)
	app := named("app")
	waiting := func() int {
		t.Helper()
		files, err := filesIn(l.reports.dir)
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	for i := range 3 {
		if err := l.keepStart(reportOn(app, i, "bin/app")); err != nil {
			t.Fatal(err)
		}
	}
	for _, away := range []int{http.StatusServiceUnavailable, http.StatusUnauthorized, http.StatusForbidden} {
		status.Store(int64(away))
		if err := l.reportAll(t.Context()); err == nil || waiting() != 3 {
			t.Errorf("%d: %v, %d wait", away, err, waiting())
		}
	}
	status.Store(http.StatusOK)
	if err := l.reportAll(t.Context()); err != nil || waiting() != 0 || got.Load() != 3 {
		t.Errorf("%v, %d wait, %d came", err, waiting(), got.Load())
	}
	l.starts.mu.Lock()
	if l.starts.wants(app) {
		t.Error("the node goes on to record what the server has enough of")
	}
	l.starts.mu.Unlock()

	for _, refused := range []int{http.StatusNotFound, http.StatusBadRequest} {
		if err := l.keepStart(reportOn(app, refused, "bin/app")); err != nil {
			t.Fatal(err)
		}
		status.Store(int64(refused))
		if err := l.reportAll(t.Context()); err != nil || waiting() != 0 {
			t.Errorf("%d: %v, %d wait", refused, err, waiting())
		}
	}
	if err := os.WriteFile(filepath.Join(l.reports.dir, "x"+reportSuffix), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.reportAll(t.Context()); err != nil || waiting() != 0 {
		t.Errorf("a damaged report: %v, %d wait", err, waiting())
	}
}

// TestWhichProfile: the server's, but what was seen on this node before what was foretold; the registry's where there is
// no other.
func TestWhichProfile(t *testing.T) {
	upstream := httptest.NewServer(ggcr.New(ggcr.WithReferrersSupport(true), ggcr.Logger(log.New(io.Discard, "", 0))))
	defer upstream.Close()
	host := strings.TrimPrefix(upstream.URL, "http://")
	client, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: host, PlainHTTP: true}}, Attempts: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.PushImage(t.Context(), host+"/app", empty.Image); err != nil {
		t.Fatal(err)
	}
	h, err := empty.Image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	manifest := digest.Digest(h.String())
	subject, err := client.Head(t.Context(), host+"/app", manifest.String())
	if err != nil {
		t.Fatal(err)
	}
	profileOf := func(origin accel.ProfileOrigin, path string) accel.Profile {
		p := accel.Profile{Manifest: manifest, Origin: origin, Items: []accel.ProfileItem{{Path: path, Bytes: 1}}}
		if origin == accel.ProfileRecorded {
			p.Starts, p.RecordedAt = 1, time.Unix(1_700_000_000, 0).UTC()
		}
		return p
	}
	form, err := artifact.FormOf(profileOf(accel.ProfilePredicted, "of/registry"))
	if err != nil {
		t.Fatal(err)
	}
	attach := func() {
		if _, err := client.Attach(t.Context(), host+"/app", subject, accel.MediaTypeProfile, form.Annotations, form.Blobs...); err != nil {
			t.Fatal(err)
		}
	}
	var served atomic.Pointer[accel.Profile]
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := served.Load()
		if p == nil {
			refuse(w, http.StatusNotFound)
			return
		}
		b, err := profile.Encode(*p)
		if err != nil {
			t.Error(err)
		}
		w.Write(b)
	}))
	defer server.Close()
	l := recorder(t, server.URL)
	find := func(want, path string) {
		t.Helper()
		source, err := client.Source(host+"/app", "")
		if err != nil {
			t.Fatal(err)
		}
		f := <-l.lookForProfile(t.Context(), l.attachedTo(t.Context(), source, manifest))
		l.work.Wait()
		if f.from != want || len(f.Items) > 0 && f.Items[0].Path != path {
			t.Errorf("found %+v, want %s from %q", f, path, want)
		}
	}
	find("", "")
	attach()
	find(fromRegistry, "of/registry")
	predicted, recorded := profileOf(accel.ProfilePredicted, "predicted"), profileOf(accel.ProfileRecorded, "recorded")
	served.Store(&predicted)
	find(fromServer, "predicted")
	if _, err := l.profiles.add(reportOn(manifest, 1, "own")); err != nil {
		t.Fatal(err)
	}
	find(fromNode, "own")
	served.Store(&recorded)
	find(fromServer, "recorded")

	// One that the server does not know yet is kept; one that it knew and does not know any more is dropped.
	served.Store(nil)
	find(fromNode, "own")
	if err := l.profiles.tell(manifest); err != nil {
		t.Fatal(err)
	}
	l.starts.more(manifest, false)
	served.Store(&recorded)
	find(fromServer, "recorded")
	if _, err := l.profiles.add(reportOn(manifest, 2, "own")); err != nil || !l.profiles.told(manifest) {
		t.Fatal("with one more start, it is not known that the server knows it:", err)
	}
	served.Store(nil)
	find(fromRegistry, "of/registry")
	if _, err := l.profiles.get(manifest); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a profile that was removed at the server: %v", err)
	}
	l.starts.mu.Lock()
	if !l.starts.wants(manifest) {
		t.Error("the next start is not recorded")
	}
	l.starts.mu.Unlock()

	if _, err := l.profiles.add(reportOn(manifest, 3, "own")); err != nil {
		t.Fatal(err)
	}
	if err := l.profiles.tell(manifest); err != nil {
		t.Fatal(err)
	}
	server.Close() // which is no reason to drop it
	find(fromNode, "own")
}
