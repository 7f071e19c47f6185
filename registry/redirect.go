package registry

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// maxRedirects is what blob stores behind registries need, with some to spare.
const maxRedirects = 5

func (h *host) client() *http.Client {
	return &http.Client{Transport: h.transport, CheckRedirect: func(next *http.Request, via []*http.Request) error {
		if next.URL.Scheme != h.scheme || len(via) >= maxRedirects {
			return &refusedError{fmt.Sprintf("%s redirects to %s, which is not followed", h.name, next.URL.Redacted())}
		}
		return nil
	}}
}

// same reports whether u is at the registry itself.
func (h *host) same(u *url.URL) bool {
	n, err := normalise(u.Host, u.Scheme == "http")
	if err != nil || u.Scheme != h.scheme {
		return false
	}
	return n == h.name || n == h.wire
}

// authorized adds the Authorization header to what goes to the registry
// itself, and to nothing that it redirects to.
type authorized struct {
	host   *host
	header string
}

func (a authorized) RoundTrip(req *http.Request) (*http.Response, error) {
	if a.header != "" && a.host.same(req.URL) {
		req = req.Clone(req.Context())
		req.Header.Set("Authorization", a.header)
	}
	return a.host.transport.RoundTrip(req)
}

// follow says whether a redirect of the registry h, or the place that it names
// for an upload, may be gone to. Blob stores are hosts of their own, so the
// allowlist does not hold here; but a registry cannot send us to a plain-HTTP
// place from HTTPS, nor to an address inside the network that it is not in.
func (c *Client) follow(h *host, u *url.URL, redirects int) error {
	refuse := func(why string) error {
		return &refusedError{fmt.Sprintf("%s redirects to %s: %s", h.name, u.Redacted(), why)}
	}
	if redirects >= maxRedirects {
		return refuse(fmt.Sprintf("more than %d redirects", maxRedirects))
	}
	if u.Host == "" {
		return refuse("it names no host")
	}
	if u.Scheme != "https" && (u.Scheme != "http" || h.scheme != "http") {
		return refuse("only https is followed")
	}
	if h.same(u) {
		return nil
	}
	if n, err := normalise(u.Host, u.Scheme == "http"); err == nil && c.names[n] != nil {
		return nil
	}
	switch reach := reachOf(u.Hostname()); {
	case reach == reachNever:
		return refuse("link-local and multicast addresses are not followed")
	case reach == reachInside && reachOf((&url.URL{Host: h.wire}).Hostname()) != reachInside:
		return refuse("a private address; add it to the configured registries if it is meant")
	}
	return nil
}

// reach is how far away a host name is by its looks. Names are not resolved: a
// blob store's name may stand for any address.
type reach int

const (
	reachAny    reach = iota
	reachInside       // loopback and private addresses
	reachNever        // link-local (cloud metadata services), multicast, unspecified
)

func reachOf(name string) reach {
	if strings.EqualFold(name, "localhost") || strings.HasSuffix(strings.ToLower(name), ".localhost") {
		return reachInside
	}
	ip := net.ParseIP(name)
	switch {
	case ip == nil:
		return reachAny
	case ip.IsLinkLocalUnicast(), ip.IsMulticast(), ip.IsUnspecified():
		return reachNever
	case ip.IsLoopback(), ip.IsPrivate():
		return reachInside
	default:
		return reachAny
	}
}
