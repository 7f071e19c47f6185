// Package registry talks to the registries that hold source and target images:
// it pulls and pushes manifests and blobs, moves tags, lists what refers to a
// manifest, and reads back what was pushed. Package worker uses it between its
// claim (package readiness) and its conversion (package convert).
//
// It is built on go-containerregistry's types and token exchange, with requests
// of its own, so that credentials are looked up again on 401 and 403, transfers
// that stall are ended, broken downloads are resumed where they broke, and a
// host is spoken to only in the way that it is configured.
package registry

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"accel"
	"accel/internal/keylock"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/authn"
)

// Host is one registry on the allowlist.
type Host struct {
	Name      string   // canonical "host[:port]"
	Aliases   []string // other names for the same registry, e.g. "localhost:5000"
	PlainHTTP bool
	CAFile    string // PEM, added to the system's roots
	// Username/Password or Token: static credentials; empty: the keychain. Token
	// is a bearer token that is sent as it is.
	Username, Password, Token string
}

// Options of a Client.
type Options struct {
	Hosts    []Host
	AllowAny bool // no allowlist (one-shot `accel convert` on a person's machine)
	// Keychain is asked for credentials, again whenever a registry refuses the
	// ones in use; see DefaultKeychain. Nil: no credentials but those of Hosts.
	Keychain     authn.Keychain
	StallTimeout time.Duration // a transfer that moves less than 1 KiB in this time is ended and retried; default 30 s
	// Attempts is how often a request is tried before its error is returned;
	// default 4. The queue above retries at a larger scale.
	Attempts int
	// Backoff is the pause before the second attempt, doubled before each further
	// one up to 10 s, with jitter; default 500 ms.
	Backoff time.Duration
}

const (
	defaultStallTimeout = 30 * time.Second
	defaultAttempts     = 4
	defaultBackoff      = 500 * time.Millisecond
	// parallel bounds the blobs that one call transfers at a time.
	parallel = 4
	// idleConnections to a host are kept: lazy mounts ask for many short ranges at a time, and a new connection
	// costs a round trip or more.
	idleConnections = 32
	// maxOthers bounds the sessions kept for hosts that nobody configured.
	maxOthers = 256
	// maxCABytes bounds a CA file; the system's own bundle has about 200 KiB.
	maxCABytes = 16 << 20
)

// Client reaches the registries of an allowlist. It may be used by several
// goroutines.
type Client struct {
	o        Options
	names    map[string]*host // configured hosts by canonical name and alias
	shared   *http.Transport  // for hosts without a CA of their own
	all      []*http.Transport
	subjects keylock.Mutex // serialises writes to a subject's referrers tag

	mu     sync.Mutex
	others map[string]*host // hosts that nobody configured, met under AllowAny
}

// host is one registry as it is spoken to.
type host struct {
	name      string // canonical, as in repository strings
	wire      string // the host that requests go to
	scheme    string
	transport *http.Transport
	auth      *authority
	// listsReferrers: it has answered as one with the referrers API, last time.
	listsReferrers atomic.Bool
	// multiplexed: it has answered over HTTP/2, last time.
	multiplexed atomic.Bool
}

// dockerHub has three names in use. Repository strings have the first, requests
// and docker's config.json the second.
var dockerHub = []string{"docker.io", "index.docker.io", "registry-1.docker.io"}

// New checks o and reads the CA files. It starts nothing. The error wraps
// accel.ErrInvalid where o is contradictory.
func New(o Options) (*Client, error) {
	if o.StallTimeout <= 0 {
		o.StallTimeout = defaultStallTimeout
	}
	if o.Attempts <= 0 {
		o.Attempts = defaultAttempts
	}
	if o.Backoff <= 0 {
		o.Backoff = defaultBackoff
	}
	c := &Client{o: o, names: map[string]*host{}, others: map[string]*host{}}
	c.shared = c.transport(nil)
	for _, conf := range o.Hosts {
		if err := c.addHost(conf); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *Client) addHost(conf Host) error {
	if conf.Token != "" && (conf.Username != "" || conf.Password != "") {
		return fmt.Errorf("%w: registry %q: has a token and a username or password; give one kind", accel.ErrInvalid, conf.Name)
	}
	canonical, err := normalise(conf.Name, conf.PlainHTTP)
	if err != nil {
		return err
	}
	transport := c.shared
	if conf.CAFile != "" {
		if conf.PlainHTTP {
			return fmt.Errorf("%w: registry %q: a CA file has no use over plain HTTP", accel.ErrInvalid, conf.Name)
		}
		roots, err := rootsWith(conf.CAFile)
		if err != nil {
			return fmt.Errorf("registry %q: %w", conf.Name, err)
		}
		transport = c.transport(roots)
	}
	h := c.newHost(canonical, conf.PlainHTTP, transport, c.o.Keychain)
	if conf.Username != "" || conf.Password != "" || conf.Token != "" {
		h.auth.keychain = staticKeychain{authn.AuthConfig{Username: conf.Username, Password: conf.Password, RegistryToken: conf.Token}}
	}
	names := []string{canonical}
	for _, alias := range conf.Aliases {
		a, err := normalise(alias, conf.PlainHTTP)
		if err != nil {
			return err
		}
		names = append(names, a)
	}
	for i, n := range names {
		if other, ok := c.names[n]; ok && (i == 0 || other != h) {
			return fmt.Errorf("%w: registry name %q is used by %q and by %q", accel.ErrInvalid, n, other.name, h.name)
		}
		c.names[n] = h
	}
	return nil
}

func (c *Client) newHost(canonical string, plainHTTP bool, transport *http.Transport, keychain authn.Keychain) *host {
	h := &host{name: canonical, wire: canonical, scheme: "https", transport: transport}
	if canonical == dockerHub[0] {
		h.wire = dockerHub[1]
	}
	if plainHTTP {
		h.scheme = "http"
	}
	h.auth = &authority{host: h, keychain: keychain, timeout: 2 * c.o.StallTimeout, sessions: map[string]*session{}}
	return h
}

// Canonical maps a host or alias to the canonical name; ErrRegistryNotAllowed for others.
func (c *Client) Canonical(name string) (string, error) {
	h, err := c.host(name)
	if err != nil {
		return "", err
	}
	return h.name, nil
}

// Close drops idle connections. The Client stays usable.
func (c *Client) Close() {
	for _, t := range c.all {
		t.CloseIdleConnections()
	}
}

func (c *Client) host(name string) (*host, error) {
	for _, plainHTTP := range []bool{false, true} { // strips ":443" or ":80"
		n, err := normalise(name, plainHTTP)
		if err != nil {
			return nil, err
		}
		if h, ok := c.names[n]; ok && (n == strings.ToLower(name) || (h.scheme == "http") == plainHTTP) {
			return h, nil
		}
	}
	if !c.o.AllowAny {
		return nil, fmt.Errorf("%w: %q; add it to the configured registries", accel.ErrRegistryNotAllowed, name)
	}
	n, err := normalise(name, false)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	h, ok := c.others[n]
	if !ok {
		if len(c.others) >= maxOthers {
			clear(c.others)
		}
		h = c.newHost(n, false, c.shared, c.o.Keychain)
		c.others[n] = h
	}
	return h, nil
}

// normalise brings a host name to the form that names are compared in.
func normalise(name string, plainHTTP bool) (string, error) {
	n := strings.ToLower(name)
	if _, err := reference.WithName(n + "/x"); n == "" || strings.Contains(n, "/") || err != nil {
		return "", fmt.Errorf("%w: registry name %q: want HOST or HOST:PORT, without scheme and path", accel.ErrInvalid, name)
	}
	if plainHTTP {
		n = strings.TrimSuffix(n, ":80")
	} else {
		n = strings.TrimSuffix(n, ":443")
	}
	for _, alias := range dockerHub {
		if n == alias {
			return dockerHub[0], nil
		}
	}
	return n, nil
}

func rootsWith(caFile string) (*x509.CertPool, error) {
	st, err := os.Stat(caFile)
	if err != nil {
		return nil, fmt.Errorf("CA file: %w", err)
	}
	if st.Size() > maxCABytes {
		return nil, fmt.Errorf("%w: CA file %s has %d bytes, more than %d", accel.ErrInvalid, caFile, st.Size(), maxCABytes)
	}
	text, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("CA file: %w", err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool() // no system roots here; the file's own will do
	}
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%w: CA file %s holds no PEM certificate", accel.ErrInvalid, caFile)
	}
	return roots, nil
}

// transport makes the connections; nil roots are the system's.
func (c *Client) transport(roots *x509.CertPool) *http.Transport {
	dialer := &net.Dialer{Timeout: min(c.o.StallTimeout, 10*time.Second), KeepAlive: 30 * time.Second}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           dialer.DialContext,
		TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:   min(c.o.StallTimeout, 10*time.Second),
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   idleConnections,
		IdleConnTimeout:       60 * time.Second,
		ExpectContinueTimeout: time.Second,
		// A gzip layer is the content itself, never an encoding to be undone.
		DisableCompression: true,
		// net/http's own bound is 1 MiB for headers; registries need far less.
		MaxResponseHeaderBytes: 256 << 10,
	}
	c.all = append(c.all, t)
	return t
}
