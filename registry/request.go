package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"

	"accel"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

const userAgent = "accel"

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
	if r.authorization != "" {
		return c.verbatim(ctx, r, req)
	}
	scopes, reads := req.scopes, req.method == http.MethodGet || req.method == http.MethodHead
	var challenge *transport.Challenge
	for refusals := 0; ; refusals++ {
		s, err := r.auth.current(ctx, r.path, scopes, challenge, reads && refusals == 0)
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
			defer drain(resp)
			return nil, r.meaning(ctx, resp)
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

// verbatim sends req with the Authorization header that r was opened with. Nobody
// here can renew that one.
func (c *Client) verbatim(ctx context.Context, r repo, req request) (*http.Response, error) {
	resp, err := c.send(ctx, r, req, r.authorization)
	if err != nil || slices.Contains(req.ok, resp.StatusCode) {
		return resp, err
	}
	defer drain(resp)
	return nil, r.meaning(ctx, resp)
}

// meaning classifies an unexpected answer. A 404 that bears no mark of a
// registry may come from a proxy whose registry is away for a moment; "not
// found" would have targets removed, so the registry itself is asked for first.
func (h *host) meaning(ctx context.Context, resp *http.Response) error {
	e := statusError(resp)
	if resp.StatusCode == http.StatusUnauthorized && h.same(resp.Request.URL) {
		e.challenge = resp.Header.Values("WWW-Authenticate")
	}
	if resp.StatusCode != http.StatusNotFound || resp.Header.Get("Docker-Distribution-Api-Version") != "" {
		return classify(e)
	}
	if _, err := h.auth.ping(ctx); err != nil {
		return fmt.Errorf("%w; nor does %s answer as a registry: %w", e, h.name, err)
	}
	return classify(e)
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
		return nil, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
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
	if r.same(resp.Request.URL) {
		r.multiplexed.Store(resp.ProtoMajor >= 2)
	}
	resp.Body = &downloadBody{ReadCloser: resp.Body, ctx: ctx, watch: newStallWatch(c.o.StallTimeout, cancel)}
	return resp, nil
}

// drain reads the rest of a small answer, so that its connection is used again.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBytes) // what fails here costs a connection, no more
	resp.Body.Close()
}
