package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"accel"
	"accel/api"
	"accel/install"
	"accel/node"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

const (
	// defaultNodeConfig is read where no other file is named and it is there.
	defaultNodeConfig = "/etc/accel/node.yaml"
	defaultMirror     = "127.0.0.1:5555"
	// maxRuntimeBytes leaves room for names of sockets: their paths have 107 bytes at most (unix(7)).
	maxRuntimeBytes = 56
)

// nodeConfig is a node's configuration. Each key has a flag and an environment variable
// too; `doc` is what docs/node.md says of it.
type nodeConfig struct {
	Name            string               `yaml:"name" doc:"the node's name, unique in the fleet; default: the host's name"`
	Labels          map[string]string    `yaml:"labels" doc:"labels that warm rules select by, such as {zone: a, pool: batch}"`
	Listen          string               `yaml:"listen" doc:"address of the mirror; loopback only, because whoever reaches it may pull with this machine's credentials"`
	Data            string               `yaml:"data" doc:"folder of the cache and of pulls that are not reported yet"`
	Socket          string               `yaml:"socket" doc:"unix socket of the node's own API, for its user alone"`
	Log             logConfig            `yaml:"log"`
	Registries      []registryConfig     `yaml:"registries" doc:"the registries that are mirrored: a list of {host, aliases, plain_http, ca_file, username, password_file, token_file}; without static credentials, docker's config.json, credential helpers and the clouds' keychains are asked"`
	DefaultRegistry string               `yaml:"default_registry" doc:"the registry of requests that name none, such as docker.io; empty: they are refused"`
	Server          nodeServerConfig     `yaml:"server"`
	Heartbeat       time.Duration        `yaml:"heartbeat" doc:"how often the server is told of the node"`
	Cache           nodeCacheConfig      `yaml:"cache"`
	Mirror          nodeMirrorConfig     `yaml:"mirror"`
	Pulls           nodePullsConfig      `yaml:"pulls"`
	Warm            nodeWarmConfig       `yaml:"warm"`
	Lazy            string               `yaml:"lazy" doc:"on: images are mounted before their content is here, where containerd asks for that; off: every new pull is an ordinary one, while containers that run from lazy mounts go on"`
	Snapshotter     nodeSnapshotter      `yaml:"snapshotter"`
	Metrics         nodeMetricsConfig    `yaml:"metrics"`
	Containerd      nodeContainerdConfig `yaml:"containerd"`
}

type nodeServerConfig struct {
	URL       string `yaml:"url" doc:"the accel server, such as https://accel.example; empty: none, and pulls are kept until there is one"`
	TokenFile string `yaml:"token_file" doc:"file with a token of scope node that speaks for this node's name"`
	CAFile    string `yaml:"ca_file" doc:"PEM file with the server's CA, beside the system's"`
}

type nodeCacheConfig struct {
	Budget    size `yaml:"budget" doc:"most that the cache may take on disk; 0: only free_floor bounds it"`
	FreeFloor size `yaml:"free_floor" doc:"what is left free of the file system, whoever takes the space"`
}

type nodeMirrorConfig struct {
	TagTTL     time.Duration `yaml:"tag_ttl" doc:"how long a tag, or a list of referrers, is believed before the registry is asked again; 0: asked every time"`
	GrantTTL   time.Duration `yaml:"grant_ttl" doc:"how long a client that the registry let in is let in here without asking; 0: asked every time"`
	GrantGrace time.Duration `yaml:"grant_grace" doc:"how long that counts while the registry cannot be reached; 0: not at all"`
	// Of the registry, not of clients.
	AnswerTimeout time.Duration `yaml:"answer_timeout" doc:"how long a registry may take to answer for a manifest or a question, and to begin with a blob, all attempts together"`
	StallTimeout  time.Duration `yaml:"stall_timeout" doc:"how long a blob that has begun may bring nothing until it is given up; after half of it another connection is tried"`
}

type nodePullsConfig struct {
	Quiet      time.Duration `yaml:"quiet" doc:"a pull has ended when its client was quiet for so long"`
	MaxSpooled int           `yaml:"max_spooled" doc:"pulls that wait for the server at most; the oldest are dropped, and counted"`
}

type nodeWarmConfig struct {
	Concurrency int    `yaml:"concurrency" doc:"images that are brought ahead at a time"`
	Form        string `yaml:"form" doc:"what is brought ahead: lazy: what a start from a lazy mount reads, by the image's profile, and all of it where there is none (blobs where an image cannot be mounted lazily); blobs: an image's blobs, for clients of the mirror; auto: lazy as soon as containerd has asked for snapshots"`
	All         bool   `yaml:"all" doc:"with form lazy: all of an image, not only what its start reads"`
}

// nodeSnapshotter is how containerd's images are mounted.
type nodeSnapshotter struct {
	Socket     string   `yaml:"socket" doc:"unix socket on which containerd asks for snapshots; empty: none"`
	Runtime    string   `yaml:"runtime" doc:"folder on tmpfs for the process that serves lazy mounts; a short path"`
	Keys       string   `yaml:"keys" doc:"PEM file with public keys whose mappings are believed (accel keys export), beside the server's own"`
	Except     []string `yaml:"except" doc:"repositories that are never mounted lazily: globs over HOST/PATH, * within one part of the path, a trailing /** everything below"`
	Stargz     []string `yaml:"stargz" doc:"repositories whose images are mounted as they are where they are eStargz themselves: globs"`
	Background size     `yaml:"background" doc:"bytes a second at which content is brought before it is read; 0: what is left of the network"`
}

type nodeMetricsConfig struct {
	Listen string `yaml:"listen" doc:"address of /metrics and /healthz for Prometheus and probes; empty: on the unix socket only"`
}

type nodeContainerdConfig struct {
	ConfigDir string            `yaml:"config_dir" doc:"containerd's folder of hosts.toml files, for install, uninstall and doctor, and for what bench and profile record pull"`
	All       bool              `yaml:"all" doc:"containerd asks the node for images of all other registries too, by _default; the node refuses those that are not configured, and containerd goes on to the registry"`
	Headers   map[string]string `yaml:"headers" doc:"headers that containerd sends to the node with each request, such as {Accel-Tenant: team-a, Accel-Memory-Bytes: '1073741824'}, by which pulls are accounted"`
	Config    string            `yaml:"config" doc:"containerd's configuration file, for install, uninstall and doctor"`
	Socket    string            `yaml:"socket" doc:"containerd's socket, for install, doctor, bench and profile record"`
}

func defaultNodeSettings() nodeConfig {
	return nodeConfig{
		Listen: defaultMirror, Data: "/var/lib/accel/node", Socket: "/run/accel/node.sock", Log: logConfig{"info", "text"},
		Heartbeat: 30 * time.Second,
		Cache:     nodeCacheConfig{Budget: 50e9, FreeFloor: 5e9},
		Mirror:    nodeMirrorConfig{time.Minute, 5 * time.Minute, 24 * time.Hour, 15 * time.Second, 30 * time.Second},
		Pulls:     nodePullsConfig{5 * time.Second, 100_000},
		Warm:      nodeWarmConfig{1, node.WarmAuto, false},
		Lazy:      "on",
		Snapshotter: nodeSnapshotter{
			Socket: "/run/accel/snapshotter.sock", Runtime: "/run/accel/lazyfs", Stargz: []string{"*/**"},
		},
		Containerd: nodeContainerdConfig{
			ConfigDir: install.DefaultConfigDir, Config: install.DefaultContainerdConfig, Socket: "/run/containerd/containerd.sock",
		},
	}
}

func nodeKeys() []key { return keysOf(reflect.TypeFor[nodeConfig](), "ACCEL_NODE_") }

// bindNode adds flags for the named keys, for all of them without any. File and
// environment count for every key in any case.
func bindNode(fs *pflag.FlagSet, only ...string) *configFlags[nodeConfig] {
	file := os.Getenv("ACCEL_NODE_CONFIG")
	if _, err := os.Stat(defaultNodeConfig); file == "" && err == nil {
		file = defaultNodeConfig
	}
	shown := nodeKeys()
	if len(only) > 0 {
		shown = nil
		for _, k := range nodeKeys() {
			if slices.Contains(only, k.path) {
				shown = append(shown, k)
			}
		}
	}
	flags := bind(fs, shown, defaultNodeSettings, file, "ACCEL_NODE_CONFIG")
	flags.keys = nodeKeys()
	return flags
}

// loadNode makes the configuration from all that says something of it, the flags that
// every verb has included.
func (g *globals) loadNode(cmd *cobra.Command, flags *configFlags[nodeConfig]) (nodeConfig, error) {
	conf, err := flags.load()
	if err != nil {
		return conf, err
	}
	if cmd.Flags().Changed("server") {
		conf.Server.URL = g.server
	}
	if cmd.Flags().Changed("token-file") {
		conf.Server.TokenFile = g.tokenFile
	}
	if cmd.Flags().Changed("token") {
		return conf, errors.New("--token: a daemon's command line can be read by everybody; name a file with --server-token-file")
	}
	return conf, conf.finish()
}

// finish fills in what follows from the machine and checks what can be checked without a
// network. Each error names the key and says what to do.
func (c *nodeConfig) finish() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	if c.Name == "" {
		name, err := os.Hostname()
		check(err == nil && name != "", "name: this host has none; say how the node is called")
		c.Name = name
	}
	for key, path := range map[string]*string{"data": &c.Data, "socket": &c.Socket} {
		absolute, err := filepath.Abs(*path)
		check(err == nil && *path != "", "%s %q: want a path", key, *path)
		*path = absolute
	}
	host, _, err := net.SplitHostPort(c.Listen)
	check(err == nil, "listen %q: want HOST:PORT", c.Listen)
	check(err != nil || isLoopback(host), "listen %q: can be reached from elsewhere, but whoever reaches the mirror may pull with this machine's credentials; want a loopback address", c.Listen)
	if c.Metrics.Listen != "" {
		_, _, err := net.SplitHostPort(c.Metrics.Listen)
		check(err == nil, "metrics.listen %q: want HOST:PORT", c.Metrics.Listen)
	}
	check(c.Log.Format == "text" || c.Log.Format == "json", "log.format %q: want text or json", c.Log.Format)
	check(new(slog.LevelVar).UnmarshalText([]byte(c.Log.Level)) == nil, "log.level %q: want debug, info, warn or error", c.Log.Level)
	check(c.Heartbeat > 0, "heartbeat %s: must be positive", c.Heartbeat)
	check(c.Pulls.Quiet > 0, "pulls.quiet %s: must be positive", c.Pulls.Quiet)
	check(c.Pulls.MaxSpooled > 0, "pulls.max_spooled %d: must be positive", c.Pulls.MaxSpooled)
	check(c.Warm.Concurrency > 0, "warm.concurrency %d: want at least 1", c.Warm.Concurrency)
	check(slices.Contains([]string{node.WarmAuto, node.WarmLazy, node.WarmBlobs}, c.Warm.Form), "warm.form %q: want auto, lazy or blobs", c.Warm.Form)
	check(c.Lazy == "on" || c.Lazy == "off", "lazy %q: want on or off", c.Lazy)
	for key, globs := range map[string][]string{"snapshotter.except": c.Snapshotter.Except, "snapshotter.stargz": c.Snapshotter.Stargz} {
		for _, g := range globs {
			err := accel.CheckRepositoryGlob(g)
			check(err == nil, "%s: %v", key, err)
		}
	}
	check(c.Snapshotter.Socket == "" || filepath.IsAbs(c.Snapshotter.Socket), "snapshotter.socket %q: want an absolute path", c.Snapshotter.Socket)
	check(c.Snapshotter.Socket == "" || filepath.IsAbs(c.Snapshotter.Runtime), "snapshotter.runtime %q: want an absolute path", c.Snapshotter.Runtime)
	check(len(c.Snapshotter.Runtime) <= maxRuntimeBytes, "snapshotter.runtime %q: longer than %d bytes, too long for the sockets in it", c.Snapshotter.Runtime, maxRuntimeBytes)
	for key, d := range map[string]time.Duration{"mirror.tag_ttl": c.Mirror.TagTTL, "mirror.grant_ttl": c.Mirror.GrantTTL, "mirror.grant_grace": c.Mirror.GrantGrace} {
		check(d >= 0, "%s %s: must not be negative", key, d)
	}
	for key, d := range map[string]time.Duration{"mirror.answer_timeout": c.Mirror.AnswerTimeout, "mirror.stall_timeout": c.Mirror.StallTimeout} {
		check(d > 0, "%s %s: must be positive", key, d)
	}
	check(filepath.IsAbs(c.Containerd.ConfigDir), "containerd.config_dir %q: want an absolute path", c.Containerd.ConfigDir)
	_, err = registryHosts(c.Registries)
	errs = append(errs, err)
	_, err = c.client()
	errs = append(errs, err)
	return errors.Join(errs...)
}

// client asks the server; nil where none is configured.
func (c *nodeConfig) client() (*api.Client, error) {
	if c.Server.URL == "" {
		if c.Server.TokenFile != "" || c.Server.CAFile != "" {
			return nil, errors.New("server.url: say which server the token or CA is for")
		}
		return nil, nil
	}
	var opts []api.ClientOption
	if c.Server.TokenFile != "" {
		token, err := readSecret(c.Server.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("server.token_file: %w", err)
		}
		opts = append(opts, api.WithToken(token))
	}
	if c.Server.CAFile != "" {
		h, err := httpClientWith(c.Server.CAFile)
		if err != nil {
			return nil, fmt.Errorf("server.ca_file: %w", err)
		}
		opts = append(opts, api.WithHTTPClient(h))
	}
	client, err := api.NewClient(c.Server.URL, opts...)
	if err != nil {
		return nil, fmt.Errorf("server.url: %w", err)
	}
	return client, nil
}

// httpClientWith trusts a CA beside the system's.
func httpClientWith(caFile string) (*http.Client, error) {
	text, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool() // no system roots here; the file's own will do
	}
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s holds no PEM certificate", caFile)
	}
	return &http.Client{Transport: &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2: true, IdleConnTimeout: time.Minute,
	}}, nil
}

// snapshotter is how images are mounted; nil where no socket is configured.
func (c *nodeConfig) snapshotter() (*node.Snapshotter, error) {
	if c.Snapshotter.Socket == "" {
		return nil, nil
	}
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program, to run the holder with: %w", err)
	}
	s := c.Snapshotter
	return &node.Snapshotter{
		Socket: s.Socket, RunDir: s.Runtime, Holder: []string{program, "node", "holder", "--dir", s.Runtime},
		KeysFile: s.Keys, Off: c.Lazy == "off", Except: s.Except, Stargz: s.Stargz, BackgroundBytesPerSecond: int64(s.Background),
	}, nil
}

// installation is what containerd's folder is to look like.
func (c *nodeConfig) installation(root string) install.Options {
	o := install.Options{Root: root, ConfigDir: c.Containerd.ConfigDir, Mirror: c.mirrorURL(), Everything: c.Containerd.All, Headers: c.Containerd.Headers}
	for _, r := range c.Registries {
		o.Registries = append(o.Registries, install.Registry{Name: r.Host, Aliases: r.Aliases, PlainHTTP: r.PlainHTTP, CAFile: r.CAFile})
	}
	return o
}

// nodeConfigDocs is the table of docs/node.md; a test keeps the file equal to it.
func nodeConfigDocs() string {
	return configTable(nodeKeys(), defaultNodeSettings())
}

// orNever is a configured time as the mirror takes it: there, 0 means its default.
func orNever(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// runtimeDir is the folder of the socket where systemd can make it: directly below /run.
func (c *nodeConfig) runtimeDir() string {
	dir, ok := strings.CutPrefix(filepath.Dir(c.Socket), "/run/")
	if !ok || strings.Contains(dir, "/") {
		return ""
	}
	return dir
}
