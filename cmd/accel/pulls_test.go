package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/api"

	"github.com/oklog/ulid/v2"
)

// pullsOfToday are five, of two images and two nodes: three misses of 2, 4 and 6 s, a hit of 1 s, an error.
func pullsOfToday() []accel.Pull {
	now := time.Now().UTC().Truncate(time.Millisecond).Add(-time.Minute)
	var pulls []accel.Pull
	for i, c := range []struct {
		image, node, tenant string
		outcome             accel.Outcome
		registry, cache     int64
		took                time.Duration
	}{
		{"web:v1", "n1", "", accel.OutcomeMiss, 100e6, 0, 2 * time.Second},
		{"web:v1", "n2", "", accel.OutcomeMiss, 100e6, 0, 4 * time.Second},
		{"web:v1", "n2", "t1", accel.OutcomeMiss, 100e6, 0, 6 * time.Second},
		{"web:v1", "n1", "t1", accel.OutcomeHit, 0, 100e6, time.Second},
		{"db:v1", "n1", "t1", accel.OutcomeError, 5e6, 0, time.Second},
	} {
		at := now.Add(time.Duration(i) * time.Second)
		pulls = append(pulls, accel.Pull{
			ID: ulid.MustNew(uint64(at.UnixMilli()), ulid.DefaultEntropy()).String(), Image: warmHost + "/team/" + c.image, Node: c.node, Tenant: c.tenant, Mode: accel.PullMirror,
			Start: at, Duration: c.took, RegistryBytes: c.registry, CacheBytes: c.cache, Outcome: c.outcome,
		})
	}
	pulls[4].Reason = "the registry reset the connection, twice"
	return pulls
}

func TestPullsAndUsageCommands(t *testing.T) {
	b := newServiceBed(t, t.TempDir())
	must(t, b.client.ReportPulls(b.ctx, pullsOfToday()))
	ask := func(args ...string) string {
		t.Helper()
		code, out, said := accelRun(t, append(args, "--server", b.client.Server())...)
		if code != exitOK {
			t.Fatalf("accel %v: exit %d, %s", args, code, said)
		}
		return out
	}
	rows := func(args ...string) [][]string {
		t.Helper()
		all, err := csv.NewReader(strings.NewReader(ask(args...))).ReadAll()
		must(t, err)
		return all
	}

	if out := ask("pulls"); strings.Count(out, "\n") != 6 || !strings.Contains(out, "reset the connection") || !strings.Contains(out, "100.0 MB") ||
		!regexp.MustCompile(`(?m)^STARTED +TOOK +MODE +OUTCOME `).MatchString(out) || !strings.Contains(out, " mirror ") {
		t.Errorf("%s", out)
	}
	if all := rows("pulls", "--tenant", "t1", "-o", "csv"); len(all) != 4 || all[0][1] != "image" || all[1][13] != "the registry reset the connection, twice" {
		t.Errorf("%q", all)
	}
	var pulls []accel.Pull
	must(t, json.Unmarshal([]byte(ask("pulls", "--outcome", "miss", "--node", "n2", "--limit", "1", "-o", "json")), &pulls))
	if len(pulls) != 1 || pulls[0].Duration != 6*time.Second {
		t.Errorf("%+v", pulls)
	}

	// 12 s of misses and 1 s of an error, with 2 GiB: 26 GB-seconds. The hit saved the median miss: 4 s x 2 GiB.
	out := ask("usage", "--memory", "2GiB")
	if lines := strings.Split(out, "\n"); !strings.HasPrefix(lines[0], "IMAGE ") || !strings.HasPrefix(lines[1], warmHost+"/team/web:v1 ") || !strings.HasPrefix(lines[3], "total ") ||
		!strings.Contains(lines[3], " 26.0 ") || !strings.Contains(lines[1], " 25.0 % ") {
		t.Errorf("%s", out)
	}
	var u api.UsageReport
	must(t, json.Unmarshal([]byte(ask("usage", "--by", "tenant", "--memory", "2GiB", "-o", "json")), &u))
	if len(u.Lines) != 2 || u.Lines[0].Key != "t1" || u.Lines[0].GBSecondsBilled != 14 || fmt.Sprintf("%.1f", u.Lines[0].GBSecondsSaved) < "7.9" {
		t.Errorf("%+v", u)
	}
	if all := rows("usage", "--by", "node", "-o", "csv"); len(all) != 3 || all[0][0] != "node" || all[1][0] != "n1" || all[1][1] != "3" {
		t.Errorf("%q", all)
	}
	if out := ask("usage", "--by", "day", "--to", "2001-01-01"); !strings.Contains(out, "total  0 ") {
		t.Errorf("%s", out)
	}
	if code, _, said := accelRun(t, "usage", "--from", "2026-01-02", "--to", "2026-01-01", "--server", b.client.Server()); code == exitOK || !strings.Contains(said, "to is not after from") {
		t.Errorf("exit %d: %s", code, said)
	}
}

func TestPullsAndUsageArguments(t *testing.T) {
	for _, args := range [][]string{
		{"pulls", "x"}, {"pulls", "--outcome", "free"}, {"pulls", "--from", "yesterday"}, {"pulls", "-o", "xml"}, {"images", "-o", "csv"},
		{"usage", "--by", "colour"}, {"usage", "--memory", "much"}, {"usage", "--memory", "0"}, {"usage", "--to", "x"},
	} {
		if code, _, said := accelRun(t, args...); code != exitUsage || said == "" {
			t.Errorf("accel %v: exit %d, %q; want 2 with words", args, code, said)
		}
	}
	for text, says := range map[string]string{
		"pulls: {keep: 0s}": "pulls.keep", "pulls: {keep_detail: 0s}": "pulls.keep_detail", "pulls: {keep_sums: 1h}": "pulls.keep_sums", "pulls: {max_kept: 0}": "pulls.max_kept", "pulls: {max_daily_sums: -1}": "pulls.max_daily_sums",
		"billing: {free: [love]}": "love", "billing: {round_up: -1s}": "billing", "billing: {free: [], minimum: 100ms, round_up: 1ms}": "",
	} {
		code, _, said := accelRun(t, "serve", "--check-config", "--config", configFile(t, "registries: [{host: r.test}]\n"+text+"\n"))
		if (code == exitOK) != (says == "") || !strings.Contains(said, says) {
			t.Errorf("%s: exit %d, %q", text, code, said)
		}
	}
}
