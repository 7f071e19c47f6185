package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/profile"
	"accel/profile/ledger"

	"github.com/opencontainers/go-digest"
)

// withProfiles gives the bed a ledger of profiles that knows two platforms of an image.
func withProfiles(t *testing.T, image digest.Digest) func(*api.Options) {
	l, err := ledger.Open(filepath.Join(t.TempDir(), "profiles.db"), ledger.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	for _, platform := range []string{"linux/arm64", "linux/amd64"} {
		at := ledger.Image{Repository: team, Digest: image, Platform: platform, Target: team}
		must(t, l.Learn(t.Context(), digest.FromString(platform), at, 3, ledger.Given{Predicted: []accel.ProfileItem{{Path: "bin/a", Bytes: 10}}}))
	}
	return func(o *api.Options) { o.Profiles, o.MaxBodyBytes = l, 4<<20 }
}

var amd64 = digest.FromString("linux/amd64")

func startReport(n int, items ...accel.ProfileItem) profile.Report {
	return profile.Report{
		ID: fmt.Sprintf("%032x", n), Manifest: amd64, StartedAt: time.Unix(1_800_000_000, 0).UTC(), Complete: true,
		End: profile.EndAnswered, Took: 2 * time.Second, Items: items,
	}
}

func TestProfilesOverHTTP(t *testing.T) {
	image := digest.FromString("index")
	b := newBed(t, withProfiles(t, image))
	if _, err := b.client.Profile(b.ctx, digest.FromString("other")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("the profile of an unknown image: %v", err)
	}
	p, err := b.client.Profile(b.ctx, amd64)
	must(t, err)
	if p.Origin != accel.ProfilePredicted || len(p.Items) != 1 {
		t.Errorf("%+v", p)
	}
	at := "/v1/profiles/" + amd64.String()
	status, h, body := b.do(http.MethodGet, at, "")
	if status != 200 || h.Get("ETag") != `"`+profile.Version(p).String()+`"` || h.Get("Content-Type") != profile.MediaType || digest.FromString(body) != profile.Version(p) {
		t.Errorf("%d %v %s", status, h, body)
	}
	if status, _, body := b.do(http.MethodGet, at, "", "If-None-Match", `"x", `+h.Get("ETag")); status != http.StatusNotModified || body != "" {
		t.Errorf("not modified: %d %q", status, body)
	}

	receipt, err := b.client.ReportStart(b.ctx, "n1", startReport(1, accel.ProfileItem{Path: "bin/b", Bytes: 20}))
	must(t, err)
	if !receipt.WantMore {
		t.Error("one start is enough")
	}
	recorded, err := b.client.Profile(b.ctx, amd64)
	must(t, err)
	if recorded.Origin != accel.ProfileRecorded || recorded.Items[0].Path != "bin/b" {
		t.Errorf("%+v", recorded)
	}

	// How the image stands tells of all its platforms.
	b.do(http.MethodPost, "/v1/webhooks/distribution", event(host, "team/app", "v1", image), "Authorization", "Bearer "+hookSecret)
	img, err := b.client.Readiness(b.ctx, team+":v1", 0)
	must(t, err)
	if len(img.Profiles) != 2 || img.Profiles[0].Platform != "linux/amd64" || img.Profiles[1].Platform != "linux/arm64" {
		t.Fatalf("%+v", img.Profiles)
	}
	if s := img.Profiles[0]; s.Manifest != amd64.String() || s.Origin != accel.ProfileRecorded || s.Starts != 1 || s.Bytes != 20 || s.Items != 1 || s.Version != profile.Version(recorded) ||
		s.Coverage == nil || s.Coverage.Share != 0 || s.Coverage.VainBytes != 10 || s.Without.Count != 1 || s.Without.MeanSeconds != 2 || s.UpdatedAt.IsZero() {
		t.Errorf("%+v", s)
	}
	for i, err := range b.client.Images(b.ctx, api.ListOptions{}) {
		must(t, err)
		if len(i.Profiles) != 2 {
			t.Errorf("%+v", i)
		}
	}

	imported := accel.Profile{Manifest: digest.FromString("from elsewhere"), Origin: accel.ProfileRecorded, Starts: 3, Items: []accel.ProfileItem{{Path: "bin/c", Bytes: 30}, {Layer: 9, Path: "no", Bytes: 1}}}
	s, err := b.client.ImportProfile(b.ctx, amd64, imported)
	must(t, err)
	if s.Origin != accel.ProfileImported || s.Bytes != 30 || s.Platform != "linux/amd64" {
		t.Errorf("%+v", s)
	}
	if s, err = b.client.RemoveProfile(b.ctx, amd64); err != nil || s.Origin != "" {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := b.client.Profile(b.ctx, amd64); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a removed profile: %v", err)
	}
	if _, err := b.client.ImportProfile(b.ctx, digest.FromString("other"), imported); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("import to an unknown image: %v", err)
	}
}

func TestHostileProfileRequests(t *testing.T) {
	b := newBed(t, withProfiles(t, digest.FromString("index")))
	at := "/v1/profiles/" + amd64.String()
	good, err := profile.EncodeReport(startReport(1))
	must(t, err)
	for what, c := range map[string]struct {
		method, path, body string
		status             int
	}{
		"no digest":            {http.MethodGet, "/v1/profiles/nonsense", "", 400},
		"no report":            {http.MethodPost, at + "/starts?node=n", "{}", 400},
		"another image's":      {http.MethodPost, "/v1/profiles/" + digest.FromString("linux/arm64").String() + "/starts?node=n", string(good), 400},
		"an unknown image's":   {http.MethodPost, "/v1/profiles/" + digest.FromString("x").String() + "/starts?node=n", strings.ReplaceAll(string(good), amd64.String(), digest.FromString("x").String()), 404},
		"no node":              {http.MethodPost, at + "/starts", string(good), 422},
		"not canonical":        {http.MethodPost, at + "/starts?node=n", string(good) + " ", 400},
		"a huge report":        {http.MethodPost, at + "/starts?node=n", strings.Repeat("x", profile.MaxEncodedBytes+1), 413},
		"a huge profile":       {http.MethodPut, at, strings.Repeat("x", profile.MaxEncodedBytes+1), 413},
		"a profile of nothing": {http.MethodPut, at, `{"v":1}`, 400},
	} {
		if status, _, body := b.do(c.method, c.path, c.body); status != c.status {
			t.Errorf("%s: %d %s, want %d", what, status, body, c.status)
		}
	}
	if p, err := b.client.Profile(b.ctx, amd64); err != nil || p.Origin != accel.ProfilePredicted {
		t.Errorf("%+v, %v", p, err)
	}
}

// lister looks nothing up: it lists what it is given, as files of the first layer.
type lister struct {
	*ledger.Ledger
	err error
}

func (l *lister) ListPaths(ctx context.Context, manifest digest.Digest, paths []string) (unmatched []string, err error) {
	if l.err != nil {
		return nil, l.err
	}
	var items []accel.ProfileItem
	for _, p := range paths {
		if name := strings.TrimPrefix(p, "/"); strings.HasPrefix(name, "no/") {
			unmatched = append(unmatched, p)
		} else {
			items = append(items, accel.ProfileItem{Path: name, Bytes: 5})
		}
	}
	return unmatched, l.List(ctx, manifest, items)
}

// withLister gives the bed a lister beside its profiles.
func withLister(l *lister) func(*api.Options) {
	return func(o *api.Options) { l.Ledger, o.Lister = o.Profiles, l }
}

func TestPathsAreListedOverHTTP(t *testing.T) {
	l := &lister{}
	b := newBed(t, withProfiles(t, digest.FromString("index")), withLister(l))
	paths := []string{"/etc/app", "lib/x.so"}
	for n := range 30 {
		paths = append(paths, fmt.Sprint("no/", n))
	}
	got, err := b.client.ListPaths(b.ctx, amd64, paths)
	must(t, err)
	if got.UnmatchedCount != 30 || len(got.Unmatched) != 20 || got.Items != 3 || got.Platform != "linux/amd64" || got.Origin != accel.ProfilePredicted {
		t.Errorf("%+v", got)
	}
	if got, err = b.client.ListPaths(b.ctx, amd64, nil); err != nil || got.Items != 1 {
		t.Errorf("an empty list leaves %+v, %v", got, err)
	}
	if _, err := b.client.ListPaths(b.ctx, digest.FromString("other"), paths); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("paths of an unknown image: %v", err)
	}
	at := "/v1/profiles/" + amd64.String() + "/paths"
	list := func(paths ...string) string {
		raw, err := json.Marshal(api.PathList{Paths: paths})
		must(t, err)
		return string(raw)
	}
	for what, c := range map[string]struct {
		path, body string
		status     int
	}{
		"no digest":        {"/v1/profiles/nonsense/paths", list("/a"), 400},
		"no list":          {at, `{}`, 422},
		"null":             {at, `{"paths":null}`, 422},
		"text":             {at, `{"paths":"/a"}`, 422},
		"no JSON":          {at, `/a`, 400},
		"a zero byte":      {at, list("/a\x00b"), 400},
		"an empty path":    {at, list("/a", " "), 400},
		"a long path":      {at, list(strings.Repeat("a/", 3000)), 400},
		"too many bytes":   {at, list(long(4000)...), 400},
		"too many paths":   {at, `{"paths":["` + strings.Repeat(`a","`, profile.MaxListed+1) + `a"]}`, 422},
		"a million paths":  {at, `{"paths":["` + strings.Repeat(`a","`, 1_000_000) + `a"]}`, 413},
		"one path of 8 MB": {at, list(strings.Repeat("a", 8<<20)), 413},
	} {
		if status, _, body := b.do(http.MethodPut, c.path, c.body); status != c.status {
			t.Errorf("%s: %d %.200s, want %d", what, status, body, c.status)
		}
	}
	for name, c := range map[string]struct {
		err    error
		status int
	}{
		"too slow":               {fmt.Errorf("read: %w", context.DeadlineExceeded), 503},
		"refused by a registry":  {fmt.Errorf("%w: no credentials", accel.ErrUnauthenticated), 502},
		"nothing of the image":   {fmt.Errorf("%w: none", accel.ErrInvalid), 400},
		"no converted form":      {fmt.Errorf("%w: it is not there", accel.ErrNotFound), 404},
		"whatever else there is": {errors.New("secret words"), 502},
	} {
		l.err = c.err
		if status, _, body := b.do(http.MethodPut, at, list("/a")); status != c.status || strings.Contains(body, "secret") {
			t.Errorf("%s: %d %s, want %d", name, status, body, c.status)
		}
	}
	if _, _, spec := b.do(http.MethodGet, "/openapi.json", ""); !strings.Contains(spec, `"list-profile-paths"`) {
		t.Error("the OpenAPI document does not have it")
	}
}

// long is 300 paths of n bytes each: more than a list may have.
func long(n int) []string {
	paths := make([]string, 300)
	for k := range paths {
		paths[k] = "/" + strings.Repeat("x", n-1)
	}
	return paths
}

func TestWhoMayDoWhatWithProfiles(t *testing.T) {
	token := func(name string, scope api.Scope, nodes ...string) api.Token {
		return api.Token{Name: name, Scope: scope, Nodes: nodes, SHA256: api.HashToken(name)}
	}
	b := newBed(t, withProfiles(t, digest.FromString("index")), withLister(&lister{}), func(o *api.Options) {
		o.Open = false
		o.Tokens = []api.Token{token("writer", api.ScopeWrite), token("reader", api.ScopeRead), token("web", api.ScopeNode, "web-*")}
	})
	kind := func(err error) string {
		switch {
		case err == nil:
			return "yes"
		case errors.Is(err, accel.ErrForbidden):
			return "no"
		case errors.Is(err, accel.ErrUnauthenticated):
			return "who?"
		}
		return err.Error()
	}
	for _, who := range []struct{ name, want string }{
		{"web", "yes yes no no no no"}, {"reader", "yes no no no no no"}, {"stranger", "who? who? who? who? who? who?"}, {"writer", "yes no no yes yes yes"},
	} {
		c, err := api.NewClient(b.url, api.WithToken(who.name), api.WithHTTPClient(b.http))
		must(t, err)
		p, getErr := c.Profile(b.ctx, amd64)
		_, own := c.ReportStart(b.ctx, "web-1", startReport(1))
		_, others := c.ReportStart(b.ctx, "db-1", startReport(2))
		_, put := c.ImportProfile(b.ctx, amd64, p)
		_, listed := c.ListPaths(b.ctx, amd64, []string{"/a"})
		_, removed := c.RemoveProfile(b.ctx, amd64)
		if got := strings.Join([]string{kind(getErr), kind(own), kind(others), kind(put), kind(listed), kind(removed)}, " "); got != who.want {
			t.Errorf("%s: %s, want %s", who.name, got, who.want)
		}
	}
}
