package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"accel"
	"accel/api"
	"accel/convert"
	"accel/fleet"
	"accel/meter"
	"accel/profile/ledger"
	"accel/registry"
	"accel/webhook"
	"accel/worker"

	"github.com/prometheus/client_golang/prometheus"
)

// defaultData is where a service keeps all that it must not lose.
const defaultData = "accel-data"

// config is the service's configuration. Each key has a flag and an environment
// variable too; `doc` is what docs/configuration.md says of it.
type config struct {
	Listen        string           `yaml:"listen" doc:"address of the API"`
	Data          string           `yaml:"data" doc:"directory of the records and keys"`
	Log           logConfig        `yaml:"log"`
	Tokens        []tokenConfig    `yaml:"tokens" doc:"who may use the API: a list of {name, scope: read, write or node, nodes, sha256 or token_file}; scope node, and no other, speaks for the nodes whose names match one of nodes, such as [worker-*]; an empty list is allowed on loopback only"`
	Registries    []registryConfig `yaml:"registries" doc:"the allowlist: a list of {host, aliases, plain_http, ca_file, username, password_file, token_file}; without static credentials, docker's config.json, credential helpers and the clouds' keychains are asked"`
	Webhooks      []webhookConfig  `yaml:"webhooks" doc:"senders of push events: a list of {name, kind, secret or secret_file, previous_secrets, registry, oidc: {issuer, audience, email}}"`
	Policy        policyConfig     `yaml:"policy"`
	Convert       convertConfig    `yaml:"convert"`
	Target        targetConfig     `yaml:"target"`
	Verify        string           `yaml:"verify" doc:"how a pushed image is checked before it is Ready, beyond reading it back: digest (nothing), sampled (a part of each layer's file tree), full (all of it)"`
	Readiness     readinessConfig  `yaml:"readiness"`
	Reconcile     reconcileConfig  `yaml:"reconcile"`
	SourceDeleted string           `yaml:"source_deleted" doc:"what becomes of a converted image whose source is gone: keep or delete-target"`
	Keys          keysConfig       `yaml:"keys"`
	Warm          []fleet.Rule     `yaml:"warm" doc:"which nodes get which images as soon as those are Ready: a list of {name, repositories: globs, nodes: {label: value}, forms: source and target}; without nodes every node, without forms the source; see docs/warm.md"`
	Fleet         fleetConfig      `yaml:"fleet"`
	Pulls         pullsConfig      `yaml:"pulls"`
	Billing       billingConfig    `yaml:"billing"`
	Profiles      profilesConfig   `yaml:"profiles"`
}

type logConfig struct {
	Level  string `yaml:"level" doc:"debug, info, warn or error"`
	Format string `yaml:"format" doc:"text or json"`
}

type tokenConfig struct {
	Name      string   `yaml:"name"`
	Scope     string   `yaml:"scope"`
	Nodes     []string `yaml:"nodes"`
	SHA256    string   `yaml:"sha256"`
	TokenFile string   `yaml:"token_file"`
}

type registryConfig struct {
	Host         string   `yaml:"host"`
	Aliases      []string `yaml:"aliases"`
	PlainHTTP    bool     `yaml:"plain_http"`
	CAFile       string   `yaml:"ca_file"`
	Username     string   `yaml:"username"`
	PasswordFile string   `yaml:"password_file"`
	TokenFile    string   `yaml:"token_file"`
}

type webhookConfig struct {
	webhook.Config `yaml:",inline"`
	SecretFile     string `yaml:"secret_file"`
}

type policyConfig struct {
	Platforms           []string `yaml:"platforms" doc:"platforms to convert, such as [linux/amd64]; empty: all"`
	MaxUncompressedSize size     `yaml:"max_uncompressed_size" doc:"largest image, uncompressed, for each platform"`
	Allow               []string `yaml:"allow" doc:"globs of repositories (host/path) to convert; a trailing /** means everything below; empty: all"`
	Deny                []string `yaml:"deny" doc:"globs of repositories not to convert; wins over allow"`
}

type convertConfig struct {
	ChunkSize   size   `yaml:"chunk_size" doc:"uncompressed bytes that are fetched at a time when a lazy start misses"`
	Level       int    `yaml:"level" doc:"gzip level, 1 to 9, for what is compressed anew"`
	Concurrency int    `yaml:"concurrency" doc:"images converted at a time"`
	Workers     int    `yaml:"workers" doc:"compressing threads; 0: one for each core"`
	TempDir     string `yaml:"temp_dir" doc:"where converted layers wait for their upload; default: below data"`
}

type targetConfig struct {
	Repository string `yaml:"repository" doc:"where converted images go: {repository}, {registry} and {path} stand for the source's"`
	Tag        string `yaml:"tag" doc:"target tag; {tag} stands for the source's"`
}

type readinessConfig struct {
	Lease         time.Duration `yaml:"lease" doc:"how long a worker that died keeps its image"`
	ChildHold     time.Duration `yaml:"child_hold" doc:"how long a manifest pushed without a tag waits for an index that names it"`
	CheckInterval time.Duration `yaml:"check_interval" doc:"how often a Ready target is looked at"`
	MaxAttempts   int           `yaml:"max_attempts" doc:"conversions begun before an image has Failed for good"`
	BackoffMin    time.Duration `yaml:"backoff_min" doc:"shortest pause before the next try"`
	BackoffMax    time.Duration `yaml:"backoff_max" doc:"longest pause before the next try"`
}

type reconcileConfig struct {
	Repositories []string      `yaml:"repositories" doc:"repositories (host/path, or globs over the catalog) that are searched for pushes whose webhook was lost"`
	Interval     time.Duration `yaml:"interval" doc:"time between two searches"`
}

type keysConfig struct {
	Dir string `yaml:"dir" doc:"directory of the signing keys; default: below data"`
}

type fleetConfig struct {
	SilentAfter  time.Duration `yaml:"silent_after" doc:"a node that said nothing for so long counts as silent and is brought nothing"`
	ForgetAfter  time.Duration `yaml:"forget_after" doc:"how long a silent node is kept, with what it was to have"`
	CatchUp      time.Duration `yaml:"catch_up" doc:"a new node is brought what became Ready within this time"`
	KeepFinished time.Duration `yaml:"keep_finished" doc:"how long it is shown what was brought; at least catch_up"`
	StallAfter   time.Duration `yaml:"stall_after" doc:"an image that a node took up and did not report for so long is given to it again"`
	MaxNodes     int           `yaml:"max_nodes" doc:"most nodes; a new one takes the place of the longest silent one"`
	MaxWarms     int           `yaml:"max_warms" doc:"most images that nodes have or wait for, each node's counted; a new one takes the place of the longest finished one"`
	MaxPending   int           `yaml:"max_pending" doc:"most images that one node has waiting; the oldest gives way"`
}

type pullsConfig struct {
	Keep         time.Duration `yaml:"keep" doc:"how long single pulls are kept; what nodes report later than that is not counted"`
	KeepDetail   time.Duration `yaml:"keep_detail" doc:"how long usage can be asked for by image, tenant and node together; older days are folded into sums by one of them (see docs/usage.md)"`
	KeepSums     time.Duration `yaml:"keep_sums" doc:"how long the sums of days, of which usage is made, are kept, in whole months; at least keep"`
	MaxKept      int           `yaml:"max_kept" doc:"most single pulls, about 120 bytes each; the oldest make room, and their sums stay"`
	MaxDailySums int           `yaml:"max_daily_sums" doc:"most sums of one day (one for each image, tenant and node); what comes above is counted as other images"`
}

type billingConfig struct {
	Free    []string      `yaml:"free" doc:"outcomes of pulls that cost nothing: a list of hit, partial, miss, error; this and the next two hold for pulls that come after a change"`
	RoundUp time.Duration `yaml:"round_up" doc:"step to which billed durations are rounded up; 0s: not at all"`
	Minimum time.Duration `yaml:"minimum" doc:"shortest billed duration of a pull that is not free"`
}

type profilesConfig struct {
	Predict   bool `yaml:"predict" doc:"whether what a start of an image reads is predicted from its files when it is converted"`
	Publish   bool `yaml:"publish" doc:"whether profiles are attached to their images in the registry too, where nodes find them without this service"`
	Bundle    size `yaml:"bundle" doc:"most bytes of the boot bundle that is published with a profile: what a start reads, in one blob; 0: none is"`
	MaxImages int  `yaml:"max_images" doc:"most platforms of images whose profiles are kept; those that were used the longest time ago make room"`
	MaxSize   size `yaml:"max_size" doc:"most bytes that are kept of all of them: some 40 kB for an image, and 100 kB more when starts were recorded"`
}

func defaultConfig() config {
	p := convert.DefaultParams()
	return config{
		Listen: "127.0.0.1:8080", Data: defaultData, Log: logConfig{"info", "text"},
		Policy:        policyConfig{MaxUncompressedSize: convert.DefaultMaxUncompressedBytes},
		Convert:       convertConfig{ChunkSize: size(p.ChunkBytes), Level: p.Level, Concurrency: 2},
		Target:        targetConfig{"{repository}", "{tag}-esgz"},
		Verify:        string(worker.VerifySampled),
		Readiness:     readinessConfig{30 * time.Second, 10 * time.Second, time.Hour, 8, 2 * time.Second, 10 * time.Minute},
		Reconcile:     reconcileConfig{Interval: 5 * time.Minute},
		SourceDeleted: "keep",
		Fleet:         fleetConfig{2 * time.Minute, 24 * time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, 15 * time.Minute, 10_000, 200_000, 500},
		Pulls:         pullsConfig{30 * 24 * time.Hour, 7 * 24 * time.Hour, 400 * 24 * time.Hour, 2_000_000, 100_000},
		Billing:       billingConfig{Free: []string{string(accel.OutcomeHit)}},
		Profiles:      profilesConfig{Predict: true, Publish: true, Bundle: 128 << 20, MaxImages: 100_000, MaxSize: 2 << 30},
	}
}

// finish fills in what follows from other keys and checks what can be checked
// without a network. Each error names the key and says what to do.
func (c *config) finish() error {
	if c.Convert.TempDir == "" {
		c.Convert.TempDir = filepath.Join(c.Data, "tmp")
	}
	if c.Keys.Dir == "" {
		c.Keys.Dir = filepath.Join(c.Data, "keys")
	}
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	host, _, err := net.SplitHostPort(c.Listen)
	check(err == nil, "listen %q: want HOST:PORT", c.Listen)
	check(err != nil || len(c.Tokens) > 0 || isLoopback(host), "tokens: listen %q can be reached from elsewhere, so at least one token is needed", c.Listen)
	check(c.SourceDeleted == "keep" || c.SourceDeleted == "delete-target", "source_deleted %q: want keep or delete-target", c.SourceDeleted)
	check(c.Log.Format == "text" || c.Log.Format == "json", "log.format %q: want text or json", c.Log.Format)
	check(new(slog.LevelVar).UnmarshalText([]byte(c.Log.Level)) == nil, "log.level %q: want debug, info, warn or error", c.Log.Level)
	check(c.Convert.Level >= 1 && c.Convert.Level <= 9, "convert.level %d: want 1 to 9", c.Convert.Level)
	check(c.Convert.ChunkSize >= 16<<10 && c.Convert.ChunkSize <= 16<<20, "convert.chunk_size %d: want 16KiB to 16MiB", c.Convert.ChunkSize)
	check(c.Convert.Concurrency >= 1, "convert.concurrency %d: want at least 1", c.Convert.Concurrency)
	check(c.Policy.MaxUncompressedSize > 0, "policy.max_uncompressed_size %d: must be positive", c.Policy.MaxUncompressedSize)
	for name, d := range map[string]time.Duration{
		"readiness.lease": c.Readiness.Lease, "readiness.child_hold": c.Readiness.ChildHold, "readiness.check_interval": c.Readiness.CheckInterval,
		"readiness.backoff_min": c.Readiness.BackoffMin, "readiness.backoff_max": c.Readiness.BackoffMax, "reconcile.interval": c.Reconcile.Interval,
		"fleet.silent_after": c.Fleet.SilentAfter, "fleet.forget_after": c.Fleet.ForgetAfter, "fleet.catch_up": c.Fleet.CatchUp, "fleet.stall_after": c.Fleet.StallAfter,
	} {
		check(d > 0, "%s %s: must be positive", name, d)
	}
	check(c.Readiness.BackoffMin <= c.Readiness.BackoffMax, "readiness.backoff_min %s is longer than readiness.backoff_max %s", c.Readiness.BackoffMin, c.Readiness.BackoffMax)
	check(c.Readiness.MaxAttempts >= 1, "readiness.max_attempts %d: want at least 1", c.Readiness.MaxAttempts)
	check(c.Fleet.KeepFinished >= c.Fleet.CatchUp, "fleet.keep_finished %s is shorter than fleet.catch_up %s: what was brought would be brought again", c.Fleet.KeepFinished, c.Fleet.CatchUp)
	for name, n := range map[string]int{"fleet.max_nodes": c.Fleet.MaxNodes, "fleet.max_warms": c.Fleet.MaxWarms, "fleet.max_pending": c.Fleet.MaxPending} {
		check(n >= 1, "%s %d: want at least 1", name, n)
	}
	errs = append(errs, fleet.CheckRules(c.Warm))
	check(c.Pulls.Keep > 0, "pulls.keep %s: must be positive", c.Pulls.Keep)
	check(c.Pulls.KeepDetail > 0, "pulls.keep_detail %s: must be positive", c.Pulls.KeepDetail)
	check(c.Pulls.KeepSums >= c.Pulls.Keep, "pulls.keep_sums %s is shorter than pulls.keep %s", c.Pulls.KeepSums, c.Pulls.Keep)
	check(c.Pulls.MaxKept >= 1, "pulls.max_kept %d: want at least 1", c.Pulls.MaxKept)
	check(c.Pulls.MaxDailySums >= 1, "pulls.max_daily_sums %d: want at least 1", c.Pulls.MaxDailySums)
	check(c.Profiles.Bundle >= 0 && c.Profiles.Bundle <= 1<<30, "profiles.bundle %d: want 0 to 1GiB", c.Profiles.Bundle)
	check(c.Profiles.MaxImages >= 1, "profiles.max_images %d: want at least 1", c.Profiles.MaxImages)
	check(c.Profiles.MaxSize >= 1<<20, "profiles.max_size %d: want at least 1MiB", c.Profiles.MaxSize)
	if err := c.billing().Validate(); err != nil {
		errs = append(errs, fmt.Errorf("billing: %w", err))
	}
	_, err = worker.New(worker.Options{ // it starts nothing, and knows these best
		Target:       worker.Target{Repository: c.Target.Repository, Tag: c.Target.Tag},
		Repositories: worker.RepositoryPolicy{Allow: c.Policy.Allow, Deny: c.Policy.Deny},
		Verify:       worker.VerifyMode(c.Verify),
	})
	errs = append(errs, err)
	_, err = c.apiTokens()
	errs = append(errs, err)
	hosts, err := c.hosts()
	if err == nil {
		err = c.checkReconcile(hosts)
	}
	errs = append(errs, err)
	_, err = c.sources()
	errs = append(errs, err)
	return errors.Join(errs...)
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

func (c *config) billing() meter.Billing {
	b := meter.Billing{Free: []accel.Outcome{}, RoundUp: c.Billing.RoundUp, Minimum: c.Billing.Minimum}
	for _, o := range c.Billing.Free {
		b.Free = append(b.Free, accel.Outcome(o))
	}
	return b
}

func (c *config) ledgerOptions(metrics prometheus.Registerer, log *slog.Logger) meter.LedgerOptions {
	return meter.LedgerOptions{
		KeepPulls: c.Pulls.Keep, KeepDetail: c.Pulls.KeepDetail, KeepRollups: c.Pulls.KeepSums, MaxPulls: c.Pulls.MaxKept, MaxDayRows: c.Pulls.MaxDailySums,
		Billing: c.billing(), Registerer: metrics, Log: log,
	}
}

func (c *config) fleetOptions(metrics prometheus.Registerer, log *slog.Logger) fleet.Options {
	f := c.Fleet
	return fleet.Options{
		Rules: c.Warm, SilentAfter: f.SilentAfter, ForgetAfter: f.ForgetAfter, CatchUp: f.CatchUp, KeepFinished: f.KeepFinished, StallAfter: f.StallAfter,
		MaxNodes: f.MaxNodes, MaxWarms: f.MaxWarms, MaxPending: f.MaxPending, Registerer: metrics, Log: log,
	}
}

func (c *config) profilesOptions(metrics prometheus.Registerer, log *slog.Logger) ledger.Options {
	return ledger.Options{MaxImages: c.Profiles.MaxImages, MaxBytes: int64(c.Profiles.MaxSize), Unpublished: !c.Profiles.Publish, Registerer: metrics, Log: log}
}

func (c *config) apiTokens() ([]api.Token, error) {
	var tokens []api.Token
	for i, t := range c.Tokens {
		hash := t.SHA256
		if t.TokenFile != "" {
			text, err := readSecret(t.TokenFile)
			if err != nil {
				return nil, fmt.Errorf("tokens[%d].token_file: %w", i, err)
			}
			hash = api.HashToken(text)
		}
		tokens = append(tokens, api.Token{Name: t.Name, Scope: api.Scope(t.Scope), Nodes: t.Nodes, SHA256: hash})
		if err := tokens[i].Validate(); err != nil {
			return nil, fmt.Errorf("tokens[%d]: %w", i, err)
		}
	}
	return tokens, nil
}

func (c *config) hosts() ([]registry.Host, error) { return registryHosts(c.Registries) }

// registryHosts reads the secrets of registries, and checks that they fit together.
func registryHosts(registries []registryConfig) ([]registry.Host, error) {
	var hosts []registry.Host
	for i, r := range registries {
		h := registry.Host{Name: r.Host, Aliases: r.Aliases, PlainHTTP: r.PlainHTTP, CAFile: r.CAFile, Username: r.Username}
		for key, f := range map[string]struct {
			path string
			into *string
		}{"password_file": {r.PasswordFile, &h.Password}, "token_file": {r.TokenFile, &h.Token}} {
			if f.path == "" {
				continue
			}
			text, err := readSecret(f.path)
			if err != nil {
				return nil, fmt.Errorf("registries[%d].%s: %w", i, key, err)
			}
			*f.into = text
		}
		hosts = append(hosts, h)
	}
	client, err := registry.New(registry.Options{Hosts: hosts})
	if err != nil {
		return nil, fmt.Errorf("registries: %w", err)
	}
	client.Close()
	return hosts, nil
}

// checkReconcile requires that what is searched may be contacted.
func (c *config) checkReconcile(hosts []registry.Host) error {
	client, err := registry.New(registry.Options{Hosts: hosts})
	if err != nil {
		return err
	}
	defer client.Close()
	for _, pattern := range c.Reconcile.Repositories {
		host, _, _ := strings.Cut(pattern, "/")
		if _, err := client.Canonical(host); err != nil {
			return fmt.Errorf("reconcile.repositories %q: %w", pattern, err)
		}
	}
	return nil
}

func (c *config) sources() ([]*webhook.Source, error) {
	var sources []*webhook.Source
	names := map[string]bool{}
	for i, w := range c.Webhooks {
		conf := w.Config
		if w.SecretFile != "" {
			text, err := readSecret(w.SecretFile)
			if err != nil {
				return nil, fmt.Errorf("webhooks[%d].secret_file: %w", i, err)
			}
			conf.Secret = text
		}
		s, err := webhook.New(conf)
		if err != nil {
			return nil, fmt.Errorf("webhooks[%d]: %w", i, err)
		}
		if names[s.Name()] {
			return nil, fmt.Errorf("webhooks[%d].name %q is used twice; give each source of one kind its own name", i, s.Name())
		}
		names[s.Name()] = true
		sources = append(sources, s)
	}
	return sources, nil
}

// size is a number of bytes, written as 10GB, 512MiB or plain.
type size int64

// UnmarshalText reads "10GB".
func (s *size) UnmarshalText(text []byte) error {
	n, err := accel.ParseBytes(string(text))
	*s = size(n)
	return err
}

func (s size) String() string {
	for _, u := range []struct {
		suffix string
		bytes  size
	}{{"GB", 1e9}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if s >= u.bytes && s%u.bytes == 0 {
			return strconv.FormatInt(int64(s/u.bytes), 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(s), 10)
}
