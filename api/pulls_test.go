package api_test

import (
	"crypto/rand"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/meter"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"
)

const team = host + "/team/app"

// withLedger gives the bed a ledger.
func withLedger(t *testing.T) func(*api.Options) {
	l, err := meter.OpenLedger(filepath.Join(t.TempDir(), "pulls.db"), meter.LedgerOptions{})
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	return func(o *api.Options) { o.Ledger, o.MaxBodyBytes = l, 4<<20 }
}

// measured is a pull of today.
func measured(i int, change ...func(*accel.Pull)) accel.Pull {
	at := time.Now().UTC().Truncate(time.Millisecond).Add(time.Duration(i-10_000) * time.Millisecond)
	p := accel.Pull{
		ID: ulid.MustNew(uint64(at.UnixMilli()), rand.Reader).String(), Image: team + ":v1", Node: "n1", Mode: accel.PullMirror,
		Start: at, Duration: 2 * time.Second, RegistryBytes: 100, Outcome: accel.OutcomeMiss,
	}
	for _, c := range change {
		c(&p)
	}
	return p
}

func (b *bed) pulls(o api.PullOptions) (all []accel.Pull) {
	b.t.Helper()
	for p, err := range b.client.Pulls(b.ctx, o) {
		must(b.t, err)
		all = append(all, p)
	}
	return all
}

func TestPullsOverHTTP(t *testing.T) {
	b := newBed(t, withLedger(t))
	var want []accel.Pull
	for i := range 1100 {
		p := measured(i)
		if i%5 == 0 {
			p.Tenant, p.MemoryBytes, p.Outcome, p.RegistryBytes, p.CacheBytes = "t 1", 512<<20, accel.OutcomeHit, 0, 100
		}
		want = append(want, p)
	}
	slices.Reverse(want)
	must(t, b.client.ReportPulls(b.ctx, want))
	must(t, b.client.ReportPulls(b.ctx, want[:100])) // again
	must(t, b.client.ReportPulls(b.ctx, nil))
	if got := b.pulls(api.PullOptions{}); !reflect.DeepEqual(got, want) {
		t.Errorf("%d pulls came back", len(got))
	}
	if got := b.pulls(api.PullOptions{Tenant: "t 1", Outcome: accel.OutcomeHit, Image: team, Node: "n1", From: want[100].Start, To: want[0].Start.Add(time.Hour)}); len(got) != 20 {
		t.Errorf("%d pulls of the tenant", len(got))
	}
	u, err := b.client.Usage(b.ctx, api.UsageOptions{By: "tenant", MemoryBytes: 2 << 30})
	must(t, err)
	if len(u.Lines) != 2 || u.Lines[0].Key != "" || u.Lines[0].Misses != 880 || u.Lines[1].Key != "t 1" || u.Lines[1].Hits != 220 || u.Total.Pulls != 1100 ||
		u.Total.GBSecondsBilled != 880*2*2 || u.MemoryBytes != 2<<30 || u.To == nil || !u.To.After(time.Now().UTC().Add(-time.Minute)) {
		t.Errorf("%+v", u)
	}
}

func TestUsageAsCSV(t *testing.T) {
	b := newBed(t, withLedger(t))
	must(t, b.client.ReportPulls(b.ctx, []accel.Pull{measured(0, func(p *accel.Pull) { p.Tenant = `a "b", c` }), measured(1)}))
	want := [][]string{
		{"tenant", "pulls", "hits", "partial", "misses", "errors", "lazy", "hitRatio", "hitRatioBytes", "registryBytes", "peerBytes", "cacheBytes", "seconds", "p50Seconds", "p90Seconds", "p99Seconds", "gbSecondsBilled", "gbSecondsSaved", "noBaseline"},
		{"", "1", "0", "0", "1", "0", "0", "0", "0", "100", "0", "0", "2"}, {`a "b", c`, "1", "0", "0", "1", "0", "0", "0", "0", "100", "0", "0", "2"},
	}
	for what, ask := range map[string][]string{"format": {"&format=csv", "*/*"}, "accept": {"", "text/html;q=0.5, text/csv"}} {
		status, h, body := b.do(http.MethodGet, "/v1/usage?by=tenant"+ask[0], "", "Accept", ask[1])
		if status != 200 || !strings.HasPrefix(h.Get("Content-Type"), "text/csv") || h.Get("Vary") != "Accept" {
			t.Fatalf("by %s: %d %s %s", what, status, h.Get("Content-Type"), body)
		}
		rows, err := csv.NewReader(strings.NewReader(body)).ReadAll()
		must(t, err)
		for i := range want {
			if len(rows) != 3 || !reflect.DeepEqual(rows[i][:len(want[i])], want[i]) {
				t.Errorf("by %s: %v, want %v", what, rows, want)
			}
		}
	}
	for _, ask := range []string{"", "?format=json"} {
		if _, h, _ := b.do(http.MethodGet, "/v1/usage"+ask, "", "Accept", "application/json"); h.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %v", ask, h)
		}
	}
	if _, _, body := b.do(http.MethodGet, "/v1/usage?by=image&from=2001-01-01&to=2001-01-02", ""); !strings.Contains(body, `"lines":[]`) {
		t.Errorf("%s", body)
	}
}

// TestReportsToAWrongServer: what is no server of accel's, or does not name a pull, can refuse none.
func TestReportsToAWrongServer(t *testing.T) {
	pulls := []accel.Pull{measured(1), measured(2), measured(3)}
	const problem = "application/problem+json"
	named := `"invalid input: pull \"` + pulls[1].ID + `\": start"`
	var refusal *meter.Refusal
	for what, c := range map[string]struct {
		status     int
		kind, body string
		refused    bool
	}{
		"ours":                  {400, problem + "; charset=utf-8", `{"type":"urn:accel:problem:invalid","title":"Bad Request","detail":` + named + `}`, true},
		"a page":                {400, "text/html", "<html>400 Bad Request</html>", false},
		"a page, unprocessable": {422, "text/html", "<html>" + pulls[1].ID + "</html>", false},
		"another's problem":     {422, problem, `{"title":"Unprocessable Entity","detail":` + named + `}`, false},
		"another's kind":        {400, "application/json", `{"type":"urn:accel:problem:invalid","title":"Bad Request","detail":` + named + `}`, false},
		"no JSON":               {400, problem, `<html>`, false},
		"ours, of nothing":      {400, problem, `{"type":"urn:accel:problem:invalid","title":"Bad Request","detail":"invalid input"}`, false},
		"ours, of another":      {400, problem, `{"type":"urn:accel:problem:invalid","title":"Bad Request","detail":"invalid input: pull \"` + measured(9).ID + `\""}`, false},
		"ours, forbidden":       {403, problem, `{"type":"urn:accel:problem:forbidden","title":"Forbidden","detail":` + named + `}`, false},
		"too large":             {413, "text/html", "<html>413</html>", false},
		"a good page":           {200, "text/html", "<html>welcome</html>", false},
		"good JSON":             {200, "application/json", `{}`, false},
		"null":                  {200, "application/json", `null`, false},
		"fewer":                 {200, "application/json", `{"accepted":2}`, false},
	} {
		server := roundTripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: c.status, Body: io.NopCloser(strings.NewReader(c.body)), Header: http.Header{"Content-Type": {c.kind}}}, nil
		})
		client, err := api.NewClient("http://x.test", api.WithHTTPClient(&http.Client{Transport: server}))
		must(t, err)
		err = client.ReportPulls(t.Context(), pulls)
		if err == nil || errors.As(err, &refusal) != c.refused || errors.Is(err, meter.ErrTooLarge) != (c.status == 413) {
			t.Errorf("%s: %v", what, err)
		}
		if c.refused && (refusal.ID != pulls[1].ID || !errors.Is(err, accel.ErrInvalid)) {
			t.Errorf("%s: %s is refused", what, refusal.ID)
		}
	}
	b := newBed(t, withLedger(t)) // and a real one
	pulls[2].Node = ""
	if err := b.client.ReportPulls(b.ctx, pulls); !errors.As(err, &refusal) || refusal.ID != pulls[2].ID {
		t.Errorf("%v", err)
	}
}

// TestReportsToAFullDisk are answered 507, by which no pull is refused, and taken when there is room again.
func TestReportsToAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED here: a small file system can only be mounted by root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("SKIPPED here: a small file system cannot be mounted: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	l, err := meter.OpenLedger(filepath.Join(dir, "pulls.db"), meter.LedgerOptions{})
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	b := newBed(t, func(o *api.Options) { o.Ledger, o.MaxBodyBytes = l, 4<<20 })
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 4<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	pulls := make([]accel.Pull, 1000)
	for i := range pulls {
		pulls[i] = measured(i)
	}
	raw, err := json.Marshal(api.PullReport{Pulls: pulls})
	must(t, err)
	if status, h, body := b.do(http.MethodPost, "/v1/pulls", string(raw)); status != 507 || h.Get("Content-Type") != "application/problem+json" {
		t.Errorf("%d %v %s", status, h, body)
	}
	var refusal *meter.Refusal
	if err := b.client.ReportPulls(b.ctx, pulls); err == nil || errors.As(err, &refusal) {
		t.Errorf("%v", err)
	}
	must(t, os.Remove(filler))
	must(t, b.client.ReportPulls(b.ctx, pulls))
	if got := b.pulls(api.PullOptions{}); len(got) != 1000 {
		t.Errorf("%d pulls are counted", len(got))
	}
}

func TestPullAnswers(t *testing.T) {
	b := newBed(t, withLedger(t))
	report := func(pulls ...accel.Pull) string {
		raw, err := json.Marshal(api.PullReport{Pulls: pulls})
		must(t, err)
		return string(raw)
	}
	many := make([]accel.Pull, 1001)
	for i := range many {
		many[i] = measured(i)
	}
	one := measured(0)
	for name, c := range map[string]struct {
		method, path, body string
		status             int
		says               string
	}{
		"accepted":     {"POST", "/v1/pulls", report(one), 200, `"accepted":1`},
		"nothing":      {"POST", "/v1/pulls", `{"pulls":[]}`, 200, `"accepted":0`},
		"newer node":   {"POST", "/v1/pulls", strings.Replace(report(measured(3)), `"id"`, `"sparkles":[1],"id"`, 1), 200, `"accepted":1`},
		"too many":     {"POST", "/v1/pulls", report(many...), 400, "up to 1000"},
		"bad one":      {"POST", "/v1/pulls", report(measured(1), measured(2, func(p *accel.Pull) { p.Node = "" })), 400, "urn:accel:problem:invalid"},
		"not JSON":     {"POST", "/v1/pulls", `{"pulls":`, 422, ""},
		"wrong type":   {"POST", "/v1/pulls", `{"pulls":[{"memoryBytes":"much"}]}`, 422, ""},
		"huge number":  {"POST", "/v1/pulls", `{"pulls":[{"memoryBytes":99999999999999999999999}]}`, 422, ""},
		"too large":    {"POST", "/v1/pulls", `{"pulls":"` + strings.Repeat("x", 5<<20) + `"}`, 413, ""},
		"outcome":      {"GET", "/v1/pulls?outcome=free", "", 422, "outcome"},
		"limit":        {"GET", "/v1/pulls?limit=1001", "", 422, "limit"},
		"cursor":       {"GET", "/v1/pulls?cursor=../..", "", 400, "cursor"},
		"from":         {"GET", "/v1/pulls?from=yesterday", "", 400, "from"},
		"by":           {"GET", "/v1/usage?by=colour", "", 422, "by"},
		"memory":       {"GET", "/v1/usage?memory=lots", "", 400, "512MiB"},
		"no memory":    {"GET", "/v1/usage?memory=0", "", 400, "memory"},
		"NaN":          {"GET", "/v1/usage?memory=NaN", "", 400, "NaN"},
		"back in time": {"GET", "/v1/usage?from=2026-01-02&to=2026-01-01", "", 400, "to is not after from"},
		"csv problem":  {"GET", "/v1/usage?memory=lots&format=csv", "", 400, "urn:accel:problem:invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			b.t = t
			status, h, body := b.do(c.method, c.path, c.body, "Content-Type", "application/json", "Accept", "text/csv, application/json")
			if status != c.status || !strings.Contains(body, c.says) {
				t.Errorf("%d %.300s, want %d with %q", status, body, c.status, c.says)
			}
			if status >= 400 && h.Get("Content-Type") != "application/problem+json" {
				t.Errorf("error comes as %q", h.Get("Content-Type"))
			}
		})
	}
	err := b.client.ReportPulls(b.ctx, []accel.Pull{measured(0, func(p *accel.Pull) { p.Mode = "x" })})
	if !errors.Is(err, accel.ErrInvalid) || !strings.Contains(err.Error(), "mode") {
		t.Errorf("%v", err)
	}
	if got := b.pulls(api.PullOptions{}); len(got) != 2 {
		t.Errorf("%d pulls", len(got))
	}
}

func TestPullScopes(t *testing.T) {
	b := newBed(t, withLedger(t), func(o *api.Options) {
		o.Open = false
		o.Tokens = []api.Token{{Name: "r", Scope: api.ScopeRead, SHA256: api.HashToken("r")}, {Name: "w", Scope: api.ScopeWrite, SHA256: api.HashToken("w")},
			{Name: "n", Scope: api.ScopeNode, Nodes: []string{"n1"}, SHA256: api.HashToken("n")}}
	})
	for what, status := range map[string]int{"POST  ": 401, "POST r": 403, "POST w": 403, "POST n": 200, "GET  ": 401, "GET r": 200, "GET n": 403} {
		method, token, _ := strings.Cut(what, " ")
		if got, _, body := b.do(method, "/v1/pulls", `{"pulls":[]}`, "Content-Type", "application/json", "Authorization", "Bearer "+token); got != status {
			t.Errorf("%q: %d %s, want %d", what, got, body, status)
		}
	}
	if got, _, _ := b.do("GET", "/v1/usage", ""); got != 401 {
		t.Errorf("usage without a token: %d", got)
	}
}

func TestNoLedgerNoRoutes(t *testing.T) {
	b := newBed(t)
	if status, _, _ := b.do("GET", "/v1/usage", ""); status != 404 {
		t.Errorf("%d", status)
	}
	with := newBed(t, withLedger(t))
	_, _, spec := with.do("GET", "/openapi.json", "")
	for _, says := range []string{`"/v1/usage"`, `"/v1/pulls"`, `"text/csv"`, `"UsageReport"`, "median duration"} {
		if !strings.Contains(spec, says) {
			t.Errorf("the API's document lacks %s", says)
		}
	}
}

// FuzzReport sends any body: it is taken or refused, and never the server's fault.
func FuzzReport(f *testing.F) {
	l, err := meter.OpenLedger(filepath.Join(f.TempDir(), "pulls.db"), meter.LedgerOptions{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	raw, err := json.Marshal(api.PullReport{Pulls: []accel.Pull{measured(0)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(raw), "by=day&memory=1GiB&from=2026-01-01")
	f.Add(`{"pulls":[{"id":null}]}`, "limit=0&cursor=x&to=9999-99-99")
	f.Fuzz(func(t *testing.T, body, query string) {
		b := newBed(t, func(o *api.Options) { o.Ledger = l })
		for _, ask := range [][3]string{{"POST", "/v1/pulls", body}, {"GET", "/v1/usage?" + query, ""}, {"GET", "/v1/pulls?" + query, ""}} {
			req, err := http.NewRequestWithContext(b.ctx, ask[0], b.url+ask[1], strings.NewReader(ask[2]))
			if err != nil {
				return // no URL
			}
			req.Header.Set("Content-Type", "application/json")
			res, err := b.http.Do(req)
			if err != nil {
				return // the client refuses to send it
			}
			res.Body.Close()
			if res.StatusCode >= 500 {
				t.Error(fmt.Sprint(res.StatusCode), ask)
			}
		}
	})
}
