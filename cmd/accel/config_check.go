package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"accel/api"
	"accel/registry"
	"accel/webhook"
	"accel/worker"
)

// settings is a configuration that was found good, in the forms that the
// packages take, with the secrets read from their files.
type settings struct {
	*Config
	tokens   []api.Token
	hosts    []registry.Host
	webhooks []*webhook.Source
}

// checker collects what is wrong with a configuration.
type checker struct {
	c       *Config
	origins map[string]string
	errs    []error
}

// bad notes that the value of key is wrong and says what to do.
func (k *checker) bad(key, format string, args ...any) {
	at := k.origins[key]
	for parent := key; at == ""; { // an absent key of an item: say where the item is
		cut := strings.LastIndexAny(parent, ".[")
		if cut < 0 {
			break
		}
		parent = parent[:cut]
		at = k.origins[parent]
	}
	if at != "" {
		at += ": "
	}
	k.errs = append(k.errs, fmt.Errorf("%s%s: %s", at, key, fmt.Sprintf(format, args...)))
}

// needRegistries of check: whether an empty allowlist is a mistake.
type needRegistries bool

// check validates c and reads the files that it names. It starts nothing and
// reaches no network.
func (c *Config) check(origins map[string]string, need needRegistries) (*settings, error) {
	k := &checker{c: c, origins: origins}
	s := &settings{Config: c}
	k.basics()
	s.tokens = k.tokens()
	s.hosts = k.registries(bool(need))
	s.webhooks = k.webhooks()
	k.policy()
	k.numbers()
	k.target()
	k.reconcile()
	if err := errors.Join(k.errs...); err != nil {
		return nil, withCode(exitUsage, err)
	}
	return s, nil
}

func (k *checker) oneOf(key, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		k.bad(key, "%q: want %s", value, strings.Join(allowed, ", "))
	}
}

func (k *checker) basics() {
	c := k.c
	if err := checkListen(c.Listen); err != nil {
		k.bad("listen", "%q: %v", c.Listen, err)
	} else if len(c.Tokens) == 0 && !onLoopback(c.Listen) {
		k.bad("listen", "%q: anybody who can reach this address could use the API; add tokens, or listen on 127.0.0.1", c.Listen)
	}
	if c.Data == "" {
		k.bad("data", "is empty; name a directory")
	}
	k.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	k.oneOf("log.format", c.Log.Format, "text", "json")
	k.oneOf("verify", c.Verify, string(worker.VerifyDigest), string(worker.VerifySampled), string(worker.VerifyFull))
	k.oneOf("source_deleted", c.SourceDeleted, sourceKeep, sourceDeleteTarget)
}

func checkListen(address string) error {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("want HOST:PORT, such as 127.0.0.1:8080")
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return fmt.Errorf("port %q: want 0 to 65535", port)
	}
	return nil
}

// onLoopback reports whether only this machine can reach a listening address.
func onLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (k *checker) tokens() []api.Token {
	var out []api.Token
	names := map[string]bool{}
	for i, t := range k.c.Tokens {
		key := fmt.Sprintf("tokens[%d]", i)
		if t.Name == "" {
			k.bad(key+".name", "is missing; it tells tokens apart in the log")
		} else if names[t.Name] {
			k.bad(key+".name", "%q is used twice", t.Name)
		}
		names[t.Name] = true
		k.oneOf(key+".scope", t.Scope, string(api.ScopeRead), string(api.ScopeWrite))
		hash := strings.ToLower(t.SHA256)
		switch raw, err := hex.DecodeString(hash); {
		case (t.SHA256 == "") == (t.TokenFile == ""):
			k.bad(key, "give one of sha256 and token_file")
		case t.TokenFile != "":
			if text, ok := k.secret(key+".token_file", t.TokenFile); ok {
				hash = api.HashToken(text)
			}
		case err != nil || len(raw) != 32:
			k.bad(key+".sha256", "want the 64 hex digits of the token's SHA-256, as from: printf %%s \"$TOKEN\" | sha256sum")
		}
		out = append(out, api.Token{Name: t.Name, Scope: api.Scope(t.Scope), SHA256: hash})
	}
	return out
}

func (k *checker) secret(key, file string) (text string, ok bool) {
	text, err := readSecret(file)
	if err != nil {
		k.bad(key, "%v", err)
	}
	return text, err == nil
}

func (k *checker) registries(need bool) []registry.Host {
	if need && len(k.c.Registries) == 0 {
		k.bad("registries", "is empty, so that no image could be pulled; add the registries' hosts, such as registries: [{host: registry.example}]")
	}
	var hosts []registry.Host
	for i, r := range k.c.Registries {
		key := fmt.Sprintf("registries[%d]", i)
		h := registry.Host{Name: r.Host, Aliases: r.Aliases, PlainHTTP: r.PlainHTTP, CAFile: r.CAFile, Username: r.Username}
		if r.Host == "" {
			k.bad(key+".host", "is missing; want HOST or HOST:PORT")
			continue
		}
		if (r.Username == "") != (r.PasswordFile == "") {
			k.bad(key, "username and password_file go together")
		}
		if r.TokenFile != "" && r.Username != "" {
			k.bad(key+".token_file", "give either this or username with password_file")
		}
		if r.PasswordFile != "" {
			h.Password, _ = k.secret(key+".password_file", r.PasswordFile)
		}
		if r.TokenFile != "" && r.Username == "" {
			h.Token, _ = k.secret(key+".token_file", r.TokenFile)
		}
		hosts = append(hosts, h)
		// One after the other, so that the message is about this one.
		client, err := registry.New(registry.Options{Hosts: hosts})
		if err != nil {
			k.bad(key, "%v", err)
			hosts = hosts[:len(hosts)-1]
			continue
		}
		client.Close()
	}
	return hosts
}

func (k *checker) webhooks() []*webhook.Source {
	var out []*webhook.Source
	names := map[string]int{}
	for i, w := range k.c.Webhooks {
		key := fmt.Sprintf("webhooks[%d]", i)
		conf := webhook.Config{
			Name: w.Name, Kind: webhook.Kind(w.Kind), Secret: w.Secret, PreviousSecrets: slices.Clone(w.PreviousSecrets),
			Registry: w.Registry, OIDC: webhook.OIDC(w.OIDC),
		}
		whole := true
		if w.SecretFile != "" {
			if w.Secret != "" {
				k.bad(key+".secret_file", "give either this or secret")
				whole = false
			}
			text, ok := k.secret(key+".secret_file", w.SecretFile)
			conf.Secret, whole = text, whole && ok
		}
		for j, f := range w.PreviousSecretFiles {
			text, ok := k.secret(fmt.Sprintf("%s.previous_secret_files[%d]", key, j), f)
			conf.PreviousSecrets, whole = append(conf.PreviousSecrets, text), whole && ok
		}
		if !whole {
			continue
		}
		source, err := webhook.New(conf)
		if err != nil {
			k.bad(key, "%v", err)
			continue
		}
		if other, ok := names[source.Name()]; ok {
			k.bad(key+".name", "%q is the name of webhooks[%d] too; give them different ones", source.Name(), other)
		}
		names[source.Name()] = i
		out = append(out, source)
	}
	return out
}

func (k *checker) policy() {
	p := k.c.Policy
	for i, name := range p.Platforms {
		parts := strings.Split(name, "/")
		if len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") {
			k.bad(fmt.Sprintf("policy.platforms[%d]", i), "%q: want os/arch or os/arch/variant, such as linux/amd64", name)
		}
	}
	if p.MaxUncompressedBytes <= 0 {
		k.bad("policy.max_uncompressed_size", "%s: want more than nothing, such as 10GB", p.MaxUncompressedBytes)
	}
	k.globs("policy.allow", p.Allow)
	k.globs("policy.deny", p.Deny)
}

func (k *checker) globs(key string, globs []string) {
	for i, g := range globs {
		if _, err := path.Match(strings.TrimSuffix(g, "/**"), ""); err != nil || !strings.Contains(g, "/") {
			k.bad(fmt.Sprintf("%s[%d]", key, i), "%q: want HOST/PATH with * for one element, or HOST/PATH/** for all below", g)
		}
	}
}

func (k *checker) numbers() {
	c, r := k.c.Convert, k.c.Readiness
	if c.ChunkBytes < 16<<10 || c.ChunkBytes > 16<<20 {
		k.bad("convert.chunk_size", "%s: want 16KiB to 16MiB", c.ChunkBytes)
	}
	if c.Level < 1 || c.Level > 9 {
		k.bad("convert.level", "%d: want 1 (fast) to 9 (small)", c.Level)
	}
	if c.Concurrency < 1 || c.Concurrency > 1000 {
		k.bad("convert.concurrency", "%d: want 1 to 1000", c.Concurrency)
	}
	if c.Workers < 0 || c.Workers > 1000 {
		k.bad("convert.workers", "%d: want 1 to 1000, or 0 for one for each core", c.Workers)
	}
	if c.TempDir != "" {
		if st, err := os.Stat(c.TempDir); err != nil {
			k.bad("convert.temp_dir", "%v; make the directory first", err)
		} else if !st.IsDir() {
			k.bad("convert.temp_dir", "%q is no directory", c.TempDir)
		}
	}
	atLeast := func(key string, v, least time.Duration) {
		if v < least {
			k.bad(key, "%s: want %s or more", v, least)
		}
	}
	atLeast("readiness.lease", r.Lease, time.Second)
	atLeast("readiness.child_hold", r.ChildHold, time.Millisecond)
	atLeast("readiness.check_interval", r.CheckInterval, time.Second)
	atLeast("readiness.backoff_min", r.BackoffMin, time.Millisecond)
	atLeast("reconcile.interval", k.c.Reconcile.Interval, time.Second)
	if r.BackoffMax < r.BackoffMin {
		k.bad("readiness.backoff_max", "%s: is less than readiness.backoff_min, %s", r.BackoffMax, r.BackoffMin)
	}
	if r.MaxAttempts < 1 {
		k.bad("readiness.max_attempts", "%d: want 1 or more", r.MaxAttempts)
	}
}

func (k *checker) target() {
	// A worker that is never run: New has the rules about templates.
	_, err := worker.New(worker.Options{Target: worker.Target{Repository: k.c.Target.Repository, Tag: k.c.Target.Tag}})
	if err != nil {
		k.bad("target", "%v", err)
	}
}

func (k *checker) reconcile() {
	k.globs("reconcile.repositories", k.c.Reconcile.Repositories)
	for i, r := range k.c.Reconcile.Repositories {
		host, _, _ := strings.Cut(r, "/")
		if strings.ContainsAny(host, "*?") {
			k.bad(fmt.Sprintf("reconcile.repositories[%d]", i), "%q: the host cannot be a pattern; name each", r)
		}
	}
}
