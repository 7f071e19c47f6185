package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"accel"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

const (
	// maxPause bounds the pause between two attempts of one call. A registry that
	// asks for a longer one gets it from the queue.
	maxPause = 10 * time.Second
	// maxRedirects is what blob stores behind registries need, with some to spare.
	maxRedirects = 5
	userAgent    = "accel"
)

// request is one HTTP request that can be sent again.
type request struct {
	method string
	url    string
	header map[string]string
	scopes []string // for the token
	ok     []int    // statuses that are no error
	// body is small; source is for what is streamed, and is opened for every
	// sending. At most one of them is set.
	body   []byte
	source *source
}

// source is content to upload.
type source struct {
	open      func() (io.ReadCloser, error)
	sizeBytes int64
}

// do sends req until it succeeds or the attempts are used up. The response's
// body is the caller's to read and close.
func (c *Client) do(ctx context.Context, r repo, req request) (*http.Response, error) {
	b := c.budget()
	for {
		resp, err := c.once(ctx, r, req)
		if err == nil {
			return resp, nil
		}
		if err := b.again(ctx, err); err != nil {
			return nil, err
		}
	}
}

// discard is do for an answer whose body does not matter.
func (c *Client) discard(ctx context.Context, r repo, req request) (http.Header, error) {
	resp, err := c.do(ctx, r, req)
	if err != nil {
		return nil, err
	}
	drain(resp)
	return resp.Header, nil
}

// read is do for an answer of at most limitBytes, which is read whole within
// the attempt. check, if not nil, may find it damaged.
func (c *Client) read(ctx context.Context, r repo, req request, limitBytes int64, check func(http.Header, []byte) error) (http.Header, []byte, error) {
	b := c.budget()
	for {
		header, body, err := c.readOnce(ctx, r, req, limitBytes)
		if err == nil && check != nil {
			err = check(header, body)
		}
		if err == nil {
			return header, body, nil
		}
		if err := b.again(ctx, err); err != nil {
			return nil, nil, err
		}
	}
}

func (c *Client) readOnce(ctx context.Context, r repo, req request, limitBytes int64) (http.Header, []byte, error) {
	resp, err := c.once(ctx, r, req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, limitBytes+1))
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", req.url, err)
	}
	if int64(len(body)) > limitBytes {
		return nil, nil, accel.Permanent(fmt.Errorf("%w: %s is larger than %d bytes", accel.ErrInvalid, req.url, limitBytes))
	}
	return resp.Header, body, nil
}

// once sends req in one attempt, in which credentials that the registry refuses
// are looked up again: a token may end, or be renewed on disk, at any time.
func (c *Client) once(ctx context.Context, r repo, req request) (*http.Response, error) {
	scopes := req.scopes
	var challenge *transport.Challenge
	for refusals := 0; ; refusals++ {
		s, err := r.auth.current(ctx, r.path, scopes, challenge)
		if err != nil {
			return nil, err
		}
		resp, err := c.send(ctx, r, req, s.header)
		if err != nil {
			return nil, err
		}
		if slices.Contains(req.ok, resp.StatusCode) {
			return resp, nil
		}
		// The second 401 may be for a scope that the first one's challenge named.
		again := resp.StatusCode == http.StatusUnauthorized && refusals < 2 || resp.StatusCode == http.StatusForbidden && refusals < 1
		if !again {
			err := statusError(resp)
			drain(resp)
			return nil, err
		}
		challenge = nil
		if resp.StatusCode == http.StatusUnauthorized && r.same(resp.Request.URL) {
			challenge = r.auth.challenge(resp)
		}
		drain(resp)
		r.auth.drop(s)
		scopes = withScope(scopes, challenge)
	}
}

// send makes one round trip, redirects included, under a stall watch.
func (c *Client) send(ctx context.Context, r repo, req request, authorization string) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	// A registry answers a write only when it has stored, and perhaps moved and
	// hashed, what may be gigabytes.
	limit, answerLimit := c.o.StallTimeout, 4*c.o.StallTimeout
	if req.source == nil && req.method != http.MethodGet && req.method != http.MethodHead {
		limit = answerLimit
	}
	watch := newStallWatch(limit, cancel)
	var body io.Reader
	var upload *uploadBody
	switch {
	case req.source != nil:
		content, err := req.source.open()
		if err != nil {
			cancel(context.Canceled)
			return nil, sourceError{err}
		}
		upload = &uploadBody{ReadCloser: content, watch: watch, sizeBytes: req.source.sizeBytes, answerLimit: answerLimit}
		body = upload
	case req.body != nil:
		body = bytes.NewReader(req.body)
	}
	hr, err := http.NewRequestWithContext(ctx, req.method, req.url, body)
	if err != nil {
		if upload != nil {
			upload.ReadCloser.Close()
		}
		cancel(context.Canceled)
		return nil, fmt.Errorf("%w: %v", accel.ErrInvalid, err)
	}
	if req.source != nil {
		hr.ContentLength = req.source.sizeBytes
	}
	hr.Header.Set("User-Agent", userAgent)
	for k, v := range req.header {
		hr.Header.Set(k, v)
	}
	client := r.client()
	client.Transport = authorized{host: r.host, header: authorization}
	client.CheckRedirect = func(next *http.Request, via []*http.Request) error { return c.follow(r.host, next.URL, len(via)) }
	watch.begin()
	resp, err := client.Do(hr)
	watch.end(0)
	watch.stop()
	if err != nil {
		defer cancel(context.Canceled)
		if upload != nil && upload.sourceError() != nil {
			return nil, sourceError{upload.sourceError()}
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s %s: %w", req.method, hr.URL.Redacted(), context.Cause(ctx))
		}
		return nil, err
	}
	resp.Body = &downloadBody{ReadCloser: resp.Body, ctx: ctx, watch: newStallWatch(c.o.StallTimeout, cancel)}
	return resp, nil
}

// drain reads the rest of a small answer, so that its connection is used again.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBytes) // what fails here costs a connection, no more
	resp.Body.Close()
}

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

// budget is what one call may spend on further attempts.
type budget struct {
	attempts int // of the whole
	left     int
	pause    time.Duration
	initial  time.Duration
}

func (c *Client) budget() *budget {
	return &budget{attempts: c.o.Attempts, left: c.o.Attempts - 1, pause: c.o.Backoff, initial: c.o.Backoff}
}

// refill gives all attempts back, after progress.
func (b *budget) refill() { b.left, b.pause = b.attempts-1, b.initial }

// again waits until the next attempt is due and returns nil, or returns the
// error to end with: err itself, marked with the pause that the registry asked for.
func (b *budget) again(ctx context.Context, err error) error {
	var after time.Duration
	if answer := (*responseError)(nil); errors.As(err, &answer) {
		after = answer.after
	}
	switch {
	case ctx.Err() != nil:
		if cause := context.Cause(ctx); !errors.Is(err, cause) {
			return fmt.Errorf("%w, after: %w", cause, err)
		}
		return err
	case !retryable(err):
		return asking(err, after)
	case b.left <= 0 || after > maxPause:
		if b.attempts > 1 && after <= maxPause {
			err = fmt.Errorf("gave up after %d attempts: %w", b.attempts, err)
		}
		return asking(err, after)
	}
	b.left--
	wait := max(after, b.pause/2+rand.N(b.pause/2+1))
	b.pause = min(2*b.pause, maxPause)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w, after: %w", context.Cause(ctx), err)
	}
}

// asking marks err with a pause, where one was asked for.
func asking(err error, after time.Duration) error {
	if after > 0 {
		return accel.WithRetryAfter(err, after)
	}
	return err
}
