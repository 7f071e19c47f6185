package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"accel/api"
	"accel/cache"
	"accel/lazy"
)

// Client asks a live node by its unix socket. It offers what Contents does.
type Client struct {
	socket string
	http   *http.Client
}

// ErrNotRunning: nobody answers on the socket.
var ErrNotRunning = errors.New("the node does not run")

// NewClient returns a client of the node that listens on socket. Close it.
func NewClient(socket string) *Client {
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// maxAnswerBytes bounds an answer: the list of a million blobs has some 400 MB.
const maxAnswerBytes = 512 << 20

// Status asks how the node does. ErrNotRunning where there is none.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.do(ctx, http.MethodGet, "/v1/node", nil, &s)
}

// List returns all blobs, those used last first.
func (c *Client) List(ctx context.Context) (blobs []Blob, err error) {
	return blobs, c.do(ctx, http.MethodGet, "/v1/cache/blobs", nil, &blobs)
}

// Mounted lists the images that are lazily mounted.
func (c *Client) Mounted(ctx context.Context) (images []MountedImage, err error) {
	return images, c.do(ctx, http.MethodGet, "/v1/mounts", nil, &images)
}

// Usage says how full the store is.
func (c *Client) Usage(ctx context.Context) (u Usage, err error) {
	return u, c.do(ctx, http.MethodGet, "/v1/cache", nil, &u)
}

// Stat says what there is of an image or a digest.
func (c *Client) Stat(ctx context.Context, what string) (content Content, err error) {
	return content, c.do(ctx, http.MethodGet, "/v1/cache/content?what="+url.QueryEscape(what), nil, &content)
}

// GC evicts down to the budget and removes what is of no use.
func (c *Client) GC(ctx context.Context) (r cache.Report, err error) {
	return r, c.do(ctx, http.MethodPost, "/v1/cache/gc", nil, &r)
}

// Pin keeps an image, or one digest, from being evicted. What is missing of an image is
// fetched first.
func (c *Client) Pin(ctx context.Context, what string) (content Content, err error) {
	return content, c.do(ctx, http.MethodPost, "/v1/cache/pin", What{what}, &content)
}

// Unpin releases what Pin of the same name held.
func (c *Client) Unpin(ctx context.Context, what string) error {
	return c.do(ctx, http.MethodPost, "/v1/cache/unpin", What{what}, &struct{}{})
}

// Remove drops what there is of an image or a digest; accel.ErrConflict where it is pinned, and nothing is
// dropped, or where some of it is in use, and the rest is dropped.
func (c *Client) Remove(ctx context.Context, what string) (r cache.Report, err error) {
	return r, c.do(ctx, http.MethodPost, "/v1/cache/remove", What{what}, &r)
}

// Starts are those that were recorded, or are being, the newest first.
func (c *Client) Starts(ctx context.Context) (starts []lazy.Start, err error) {
	return starts, c.do(ctx, http.MethodGet, "/v1/starts", nil, &starts)
}

// Answered tells that the program in a container answers, so that the recording of its start ends; or that it failed, so that
// nothing is kept of it. accel.ErrNotFound where it is not being recorded.
func (c *Client) Answered(ctx context.Context, a Answered) error {
	return c.do(ctx, http.MethodPost, "/v1/starts/answered", a, &struct{}{})
}

// RecordNext has the next start of an image recorded, by a pull within lazy.WantedTime, also where there are recordings enough.
// accel.ErrConflict where it cannot be mounted lazily.
func (c *Client) RecordNext(ctx context.Context, r RecordNext) error {
	return c.do(ctx, http.MethodPost, "/v1/starts/wanted", r, &struct{}{})
}

// FetchAhead says whether anything is fetched ahead of an image's starts, by pulls within lazy.PlainTime, for comparisons.
func (c *Client) FetchAhead(ctx context.Context, f FetchAhead) error {
	return c.do(ctx, http.MethodPost, "/v1/starts/ahead", f, &struct{}{})
}

// Check reads every complete blob again and drops what is damaged.
func (c *Client) Check(ctx context.Context, progress func(done, total int64)) (cache.Report, error) {
	res, err := c.send(ctx, http.MethodPost, "/v1/cache/check", nil)
	if err != nil {
		return cache.Report{}, err
	}
	defer res.Body.Close()
	for dec := json.NewDecoder(res.Body); ; {
		var p CheckProgress
		if err := dec.Decode(&p); err != nil {
			return cache.Report{}, fmt.Errorf("the node stopped in the middle of the check: %w", err)
		}
		if p.Report != nil {
			if p.Error != "" {
				return *p.Report, errors.New(p.Error)
			}
			return *p.Report, nil
		}
		if progress != nil {
			progress(p.DoneBytes, p.TotalBytes)
		}
	}
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	res, err := c.send(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(io.LimitReader(res.Body, maxAnswerBytes)).Decode(out); err != nil {
		return fmt.Errorf("read the node's answer: %w", err)
	}
	return nil
}

// send returns a good answer; its error is the node's own where that said no.
func (c *Client) send(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var content io.Reader = http.NoBody
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, content)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(req)
	if err != nil {
		if refused(err) {
			return nil, fmt.Errorf("%w: nobody answers on %s", ErrNotRunning, c.socket)
		}
		return nil, fmt.Errorf("ask the node on %s: %w", c.socket, err)
	}
	if res.StatusCode < http.StatusBadRequest {
		return res, nil
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read the node's answer: %w", err)
	}
	return nil, api.ProblemError(res.StatusCode, raw)
}
