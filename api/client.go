package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

const (
	// maxAnswerBytes bounds what a client reads of one answer: a page of 500
	// images has well below 2 MiB.
	maxAnswerBytes = 16 << 20
	// pollTime is one long poll; under the minute after which many proxies cut.
	pollTime = 50 * time.Second
	// Pause before a request that failed is sent again, doubled up to the second.
	minPause, maxPause = 200 * time.Millisecond, 5 * time.Second
)

// Client asks a server for all that the API offers. The sentinel errors of
// package accel come over the wire as they are: use errors.Is.
type Client struct {
	base  *url.URL
	token string
	http  *http.Client
}

// ClientOption changes a Client.
type ClientOption func(*Client)

// WithToken sends a bearer token along.
func WithToken(token string) ClientOption { return func(c *Client) { c.token = token } }

// WithHTTPClient replaces http.DefaultClient.
func WithHTTPClient(h *http.Client) ClientOption { return func(c *Client) { c.http = h } }

// NewClient returns a client of the server at an URL like
// "http://127.0.0.1:8080".
func NewClient(server string, opts ...ClientOption) (*Client, error) {
	u, err := url.Parse(server)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, fmt.Errorf("%w: server %q: want http://HOST:PORT or https://HOST", accel.ErrInvalid, server)
	}
	c := &Client{base: u, http: http.DefaultClient}
	for _, o := range opts {
		o(c)
	}
	return c, nil
}

// unreachableError says that no answer came, so that asking again may help.
type unreachableError struct{ error }

func (e unreachableError) Unwrap() error { return e.error }

// answerError is an answer that was no good, with what tells who gave it.
type answerError struct {
	error
	status int
	kind   string // the problem's type; empty where it is no problem document
}

func (e answerError) Unwrap() error { return e.error }

// rawBody is a request's body that is not JSON of a Go value.
type rawBody struct {
	contentType string
	content     []byte
}

func (c *Client) request(ctx context.Context, method, path string, query url.Values, body any) (*http.Request, error) {
	u := c.base.JoinPath(path)
	u.RawQuery = query.Encode()
	var content io.Reader
	raw, isRaw := body.(rawBody)
	if body != nil && !isRaw {
		encoded, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		raw = rawBody{"application/json", encoded}
	}
	if body != nil {
		content = bytes.NewReader(raw.content)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), content)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", raw.contentType)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	return req, nil
}

// do sends a request and decodes a good answer into out.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, body, out any) error {
	req, err := c.request(ctx, method, path, query, body)
	if err != nil {
		return err
	}
	return c.send(req, out)
}

func (c *Client) send(req *http.Request, out any) error {
	res, err := c.http.Do(req)
	if err != nil {
		return unreachableError{fmt.Errorf("ask %s: %w", c.base, err)}
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxAnswerBytes))
	if err != nil {
		return unreachableError{fmt.Errorf("read the answer of %s: %w", c.base, err)}
	}
	if res.StatusCode >= http.StatusBadRequest {
		err := error(answerError{ProblemError(res.StatusCode, raw), res.StatusCode, problemKind(res.Header, raw)})
		if res.StatusCode >= http.StatusInternalServerError {
			return unreachableError{err}
		}
		return err
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return fmt.Errorf("the answer of %s is not what this client understands: %w", c.base, err)
	}
	return nil
}

// Readiness asks how an image stands; with wait it asks the server to hold the
// answer until the state is final, but no longer. accel.ErrNotFound for an
// unknown image.
func (c *Client) Readiness(ctx context.Context, image string, wait time.Duration) (img Image, err error) {
	q := url.Values{"image": {image}}
	if wait > 0 {
		q.Set("wait", wait.String())
	}
	return img, c.do(ctx, http.MethodGet, "/v1/readiness", q, nil, &img)
}

// Wait waits until an image's state is final, for as long as timeout (zero: as
// ctx lasts). A server that restarts is asked again. When the time is up, the
// error is context.DeadlineExceeded and the image as it was last seen.
func (c *Client) Wait(ctx context.Context, image string, timeout time.Duration) (Image, error) {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	var last Image
	var lastErr error
	pause := minPause
	for ctx.Err() == nil {
		poll := pollTime
		if deadline, ok := ctx.Deadline(); ok {
			poll = max(time.Millisecond, min(poll, time.Until(deadline)))
		}
		img, err := c.Readiness(ctx, image, poll.Round(time.Millisecond))
		var away unreachableError
		switch {
		case err == nil && img.Final:
			return img, nil
		case err == nil:
			last, lastErr, pause = img, nil, minPause
			continue
		case errors.Is(err, accel.ErrNotFound):
			lastErr = err
		case errors.As(err, &away):
			if ctx.Err() == nil {
				lastErr = err
			}
		default:
			return last, err
		}
		sleep(ctx, pause)
		pause = min(2*pause, maxPause)
	}
	return last, errors.Join(ctx.Err(), lastErr)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// ListOptions select images; zero fields select all.
type ListOptions struct {
	State      accel.State
	Repository string
}

// Images iterates over images, newest first, page by page. It ends at the first
// error.
func (c *Client) Images(ctx context.Context, o ListOptions) iter.Seq2[Image, error] {
	return func(yield func(Image, error) bool) {
		q := url.Values{"limit": {"200"}}
		if o.State != "" {
			q.Set("state", string(o.State))
		}
		if o.Repository != "" {
			q.Set("repository", o.Repository)
		}
		for {
			var page ImagePage
			if err := c.do(ctx, http.MethodGet, "/v1/images", q, nil, &page); err != nil {
				yield(Image{}, err)
				return
			}
			for _, img := range page.Images {
				if !yield(img, nil) {
					return
				}
			}
			if page.Next == "" {
				return
			}
			q.Set("cursor", page.Next)
		}
	}
}

// Image gets an image by id.
func (c *Client) Image(ctx context.Context, id string) (img Image, err error) {
	return img, c.do(ctx, http.MethodGet, "/v1/images/"+url.PathEscape(id), nil, nil, &img)
}

// Submit asks for an image to be converted.
func (c *Client) Submit(ctx context.Context, image string) (a Accepted, err error) {
	return a, c.do(ctx, http.MethodPost, "/v1/images", nil, Submission{Image: image}, &a)
}

// Retry tries an image again now; accel.ErrConflict for one that is Ready or in work.
func (c *Client) Retry(ctx context.Context, id string) (img Image, err error) {
	return img, c.do(ctx, http.MethodPost, "/v1/images/"+url.PathEscape(id)+"/retry", nil, nil, &img)
}

// Delete forgets an image, and removes its converted form where target says so.
func (c *Client) Delete(ctx context.Context, id string, target bool) (img Image, err error) {
	q := url.Values{"target": {strconv.FormatBool(target)}}
	return img, c.do(ctx, http.MethodDelete, "/v1/images/"+url.PathEscape(id), q, nil, &img)
}

// GC lists targets whose source is gone, and removes them unless dryRun.
func (c *Client) GC(ctx context.Context, dryRun bool) ([]Orphan, error) {
	var a GCAnswer
	err := c.do(ctx, http.MethodPost, "/v1/gc", nil, GCRequest{DryRun: dryRun}, &a)
	return a.Orphans, err
}

// Keys gets the public keys that mappings are signed with.
func (c *Client) Keys(ctx context.Context) (k KeySet, err error) {
	return k, c.do(ctx, http.MethodGet, "/v1/keys", nil, nil, &k)
}

// Mapping gets the signed mapping of a source platform manifest, as package trust verifies it;
// repository may be empty. accel.ErrNotFound where there is none.
func (c *Client) Mapping(ctx context.Context, repository string, d digest.Digest) (envelope []byte, err error) {
	q := url.Values{}
	if repository != "" {
		q.Set("repository", repository)
	}
	return envelope, c.do(ctx, http.MethodGet, "/v1/mappings/"+url.PathEscape(d.String()), q, nil, (*json.RawMessage)(&envelope))
}

// Server is the URL that the client asks.
func (c *Client) Server() string { return strings.TrimSuffix(c.base.String(), "/") }
