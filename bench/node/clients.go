package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"
)

const (
	layersAtOnce = 3 // as containerd
	readBytes    = 256 << 10
	// checkedPulls: of so many pulls, one checks digests; all check sizes. Hashing for all
	// would make this a measurement of the clients.
	checkedPulls = 10
)

// order is what the clients are to do.
type order struct {
	Host   string
	Pulls  int
	AsUser bool
}

// pullAsClients pulls as many clients at once, and prints an outcome.
func pullAsClients(raw string) error {
	var o order
	if err := json.Unmarshal([]byte(raw), &o); err != nil {
		return err
	}
	begin := time.Now()
	group, ctx := errgroup.WithContext(context.Background())
	given := make([]int64, o.Pulls)
	for i := range o.Pulls {
		group.Go(func() (err error) {
			c := client{order: o, checks: i%checkedPulls == 0, http: &http.Client{Transport: &http.Transport{DisableCompression: true, ReadBufferSize: readBytes}}}
			defer c.http.CloseIdleConnections()
			given[i], err = c.pull(ctx)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	result := outcome{Seconds: time.Since(begin).Seconds()}
	for _, n := range given {
		result.Bytes += n
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

// client is one machine's container runtime: a token, connections of its own.
type client struct {
	order  order
	checks bool
	http   *http.Client
	bearer string
}

func (c *client) pull(ctx context.Context) (int64, error) {
	if err := c.authenticate(ctx); err != nil {
		return 0, err
	}
	body, err := c.get(ctx, "manifests/"+tag)
	if err != nil {
		return 0, err
	}
	raw, err := io.ReadAll(body)
	if err := errors.Join(err, body.Close()); err != nil {
		return 0, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return 0, err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(layersAtOnce)
	total := int64(len(raw))
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		total += d.Size
		group.Go(func() error { return c.blob(ctx, d) })
	}
	return total, group.Wait()
}

func (c *client) blob(ctx context.Context, d v1.Descriptor) error {
	body, err := c.get(ctx, "blobs/"+d.Digest.String())
	if err != nil {
		return err
	}
	defer body.Close()
	sink := &sink{}
	if c.checks {
		sink.hash = sha256.New()
	}
	n, err := io.CopyBuffer(sink, struct{ io.Reader }{body}, make([]byte, readBytes))
	if err != nil {
		return fmt.Errorf("%s: %w", d.Digest, err)
	}
	if n != d.Size {
		return fmt.Errorf("%s: %d bytes, want %d", d.Digest, n, d.Size)
	}
	if c.checks && hex.EncodeToString(sink.hash.Sum(nil)) != d.Digest.Hex {
		return fmt.Errorf("%s: other content", d.Digest)
	}
	return nil
}

// sink hashes or forgets.
type sink struct{ hash hash.Hash }

func (s *sink) Write(p []byte) (int, error) {
	if s.hash != nil {
		return s.hash.Write(p)
	}
	return len(p), nil
}

func (c *client) get(ctx context.Context, what string) (io.ReadCloser, error) {
	res, err := c.ask(ctx, "http://"+c.order.Host+"/v2/"+repository+"/"+what)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("%s: %s", what, res.Status), res.Body.Close())
	}
	return res.Body, nil
}

func (c *client) ask(ctx context.Context, target string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", string(types.OCIManifestSchema1))
	if c.bearer != "" {
		req.Header.Set("Authorization", "Bearer "+c.bearer)
	}
	return c.http.Do(req)
}

var challenge = regexp.MustCompile(`(realm|service|scope)="([^"]*)"`)

// authenticate asks for a token where the registry wants one and there is a user.
func (c *client) authenticate(ctx context.Context) error {
	if !c.order.AsUser {
		return nil
	}
	res, err := c.ask(ctx, "http://"+c.order.Host+"/v2/"+repository+"/manifests/"+tag)
	if err != nil {
		return err
	}
	if err := res.Body.Close(); err != nil || res.StatusCode != http.StatusUnauthorized {
		return errors.Join(err, fmt.Errorf("without a token: %s, want a challenge", res.Status))
	}
	said := map[string]string{}
	for _, m := range challenge.FindAllStringSubmatch(res.Header.Get("WWW-Authenticate"), -1) {
		said[m[1]] = m[2]
	}
	query := url.Values{"service": {said["service"]}, "scope": {said["scope"]}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, said["realm"]+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	req.SetBasicAuth(user, password)
	if res, err = c.http.Do(req); err != nil {
		return err
	}
	defer res.Body.Close()
	var answer struct{ Token string }
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return fmt.Errorf("token: %s: %w", res.Status, err)
	}
	c.bearer = answer.Token
	return nil
}
