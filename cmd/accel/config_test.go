package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// accelRun runs the program with args, in process.
func accelRun(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(context.Background(), args, strings.NewReader(""), &out, &err)
	return code, out.String(), err.String()
}

func configFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "accel.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigurationDocumentIsUpToDate(t *testing.T) {
	have, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != configDocs() {
		t.Error("docs/configuration.md is out of date: go run ./cmd/accel serve --print-config-docs > docs/configuration.md")
	}
	for _, k := range keys() {
		if k.doc == "" || strings.HasSuffix(k.path, ".") {
			t.Errorf("key %q has no doc", k.path)
		}
	}
}

func TestCheckConfig(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		says string // empty: good
	}{
		"good":            {"registries: [{host: 'r.test:5000', plain_http: true}]\nwebhooks: [{kind: harbor, secret: s}]\npolicy: {max_uncompressed_size: 5GiB, platforms: [linux/amd64]}\n", ""},
		"unknown key":     {"registries: [{host: r.test}]\nlissten: x\n", "line 2"},
		"nested unknown":  {"registries: [{host: r.test}]\npolicy:\n  alow: [x]\n", "unknown key alow"},
		"wrong type":      {"registries: [{host: r.test}]\nconvert: {level: many}\n", "line 2"},
		"bad size":        {"registries: [{host: r.test}]\npolicy: {max_uncompressed_size: big}\n", "10GB"},
		"bad duration":    {"registries: [{host: r.test}]\nreadiness: {lease: soon}\n", "soon"},
		"no registry":     {"log: {level: debug}\n", "registries"},
		"open to all":     {"listen: 0.0.0.0:80\nregistries: [{host: r.test}]\n", "token"},
		"node's token":    {"tokens: [{name: x, scope: node, sha256: '" + strings.Repeat("a", 64) + "'}]\nregistries: [{host: r.test}]\n", "scope node needs nodes"},
		"bad token":       {"tokens: [{name: x, scope: admin, sha256: aa}]\nregistries: [{host: r.test}]\n", "tokens[0]"},
		"no secret":       {"registries: [{host: r.test}]\nwebhooks: [{kind: harbor}]\n", "webhooks[0]"},
		"same name":       {"registries: [{host: r.test}]\nwebhooks: [{kind: harbor, secret: a}, {kind: harbor, secret: b}]\n", "used twice"},
		"missing file":    {"registries: [{host: r.test, password_file: /no/such}]\n", "registries[0].password_file"},
		"level":           {"registries: [{host: r.test}]\nconvert: {level: 12}\n", "convert.level 12"},
		"verify":          {"registries: [{host: r.test}]\nverify: sometimes\n", "sometimes"},
		"fixed tag":       {"registries: [{host: r.test}]\ntarget: {tag: fixed}\n", "target.tag"},
		"no attempts":     {"registries: [{host: r.test}]\nreadiness: {max_attempts: 0}\n", "max_attempts"},
		"bad glob":        {"registries: [{host: r.test}]\npolicy: {allow: ['[x']}\n", "policy.allow"},
		"foreign host":    {"registries: [{host: r.test}]\nreconcile: {repositories: [other.test/a]}\n", "reconcile.repositories"},
		"source deleted":  {"registries: [{host: r.test}]\nsource_deleted: burn\n", "source_deleted"},
		"several things":  {"registries: [{host: r.test}]\nlog: {level: loud, format: xml}\n", "log.format"},
		"twice the file":  {"a: 1\n---\nb: 2\n", "unknown key a"},
		"empty is no way": {"", "registries"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, said := accelRun(t, "serve", "--check-config", "--config", configFile(t, c.text))
			if c.says == "" {
				if code != exitOK || !strings.Contains(out, "good") {
					t.Errorf("exit %d: %s%s", code, out, said)
				}
				return
			}
			if code != exitUsage || !strings.Contains(said, c.says) {
				t.Errorf("exit %d, says %q, want 2 and %q", code, said, c.says)
			}
		})
	}
}

func TestFlagBeatsEnvironmentBeatsFileBeatsDefault(t *testing.T) {
	load := func(args ...string) config {
		t.Helper()
		fs := pflag.NewFlagSet("x", pflag.ContinueOnError)
		flags := bindConfig(fs)
		if err := fs.Parse(args); err != nil {
			t.Fatal(err)
		}
		conf, err := flags.load()
		if err != nil {
			t.Fatal(err)
		}
		return conf
	}
	if got := load().Readiness.Lease; got != 30*time.Second {
		t.Errorf("default: %s", got)
	}
	file := configFile(t, "readiness: {lease: 40s}\npolicy: {allow: [a/b]}\n")
	if got := load("--config", file).Readiness.Lease; got != 40*time.Second {
		t.Errorf("file: %s", got)
	}
	t.Setenv("ACCEL_READINESS_LEASE", "50s")
	t.Setenv("ACCEL_POLICY_ALLOW", "[c/d, e/f]")
	conf := load("--config", file)
	if conf.Readiness.Lease != 50*time.Second || len(conf.Policy.Allow) != 2 {
		t.Errorf("environment: %s %v", conf.Readiness.Lease, conf.Policy.Allow)
	}
	conf = load("--config", file, "--readiness-lease", "1m", "--registries", "[{host: r.test, aliases: [x.test]}]", "--policy-max-uncompressed-size", "1.5GB")
	if conf.Readiness.Lease != time.Minute || conf.Registries[0].Aliases[0] != "x.test" || conf.Policy.MaxUncompressedSize != 1_500_000_000 {
		t.Errorf("flags: %+v", conf)
	}
	t.Setenv("ACCEL_READINESS_LEASE", "never")
	if code, _, said := accelRun(t, "serve", "--check-config"); code != exitUsage || !strings.Contains(said, "ACCEL_READINESS_LEASE") {
		t.Errorf("bad environment: exit %d, %q", code, said)
	}
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{"wait"}, {"wait", "a", "b"}, {"nonsense"}, {"status", "x:y", "--output", "xml"}, {"images", "--state", "Happy"},
		{"up", "--readiness-lease", "x"}, {"convert-all"}, {"up", "extra"}, {"--server", "nohost", "images"},
	} {
		if code, _, said := accelRun(t, args...); code != exitUsage || said == "" {
			t.Errorf("accel %v: exit %d, %q; want 2 with words", args, code, said)
		}
	}
	if code, out, _ := accelRun(t, "wait", "--help"); code != exitOK || !strings.Contains(out, "Exit codes") {
		t.Errorf("help: exit %d", code)
	}
}

func TestKeysCommand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	if code, _, said := accelRun(t, "keys", "list", "--dir", dir); code != exitFailed || said == "" {
		t.Errorf("no keys yet: exit %d, %q", code, said)
	}
	for range 2 {
		if code, _, said := accelRun(t, "keys", "new", "--dir", dir); code != exitOK {
			t.Fatal(said)
		}
	}
	_, out, _ := accelRun(t, "keys", "list", "--dir", dir)
	if strings.Count(out, "true") != 1 {
		t.Errorf("one key should be active: %s", out)
	}
	if _, out, _ := accelRun(t, "keys", "export", "--dir", dir); strings.Count(out, "BEGIN PUBLIC KEY") < 2 {
		t.Errorf("export: %s", out)
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]size{"10GB": 10e9, "512MiB": 512 << 20, "7": 7, "1.5 kB": 1500, "3B": 3} {
		var s size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%q is %d, %v; want %d", text, s, err, want)
		}
	}
	for _, bad := range []string{"", "GB", "-1GB", "1e30GB", "ten"} {
		var s size
		if err := s.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was taken as %d", bad, s)
		}
	}
}
