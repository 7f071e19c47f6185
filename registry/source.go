package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"accel"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

// Source is one repository, read with one credential: a client's that is passed on,
// or the Client's own. Errors of its methods wrap the sentinels of package accel; see
// also ChallengeOf and StatusOf.
type Source struct {
	c *Client
	r repo
}

// Source opens repository ("host/path") without asking the registry. authorization is the value of an
// Authorization header, sent as it is to the registry itself and to nothing that it redirects to; empty:
// the Client's own credentials.
func (c *Client) Source(repository, authorization string) (*Source, error) {
	r, err := c.repository(repository)
	if err != nil {
		return nil, err
	}
	r.authorization = authorization
	return &Source{c: c, r: r}, nil
}

// Repository is the canonical "host/path", Host the canonical host alone.
func (s *Source) Repository() string { return s.r.String() }
func (s *Source) Host() string       { return s.r.name }

// Own reports whether the Client's own credentials are used.
func (s *Source) Own() bool { return s.r.authorization == "" }

func (s *Source) check(tagOrDigest string) error {
	_, err := s.c.target(s.r.String(), tagOrDigest)
	return err
}

// Head resolves a tag or digest.
func (s *Source) Head(ctx context.Context, tagOrDigest string) (v1.Descriptor, error) {
	if err := s.check(tagOrDigest); err != nil {
		return v1.Descriptor{}, err
	}
	return s.c.head(ctx, s.r, tagOrDigest)
}

// Manifest fetches a manifest as it is, checked against the digest that it was asked
// by, or else the one that the registry says it has. A malformed one is a permanent error.
func (s *Source) Manifest(ctx context.Context, tagOrDigest string) ([]byte, v1.Descriptor, error) {
	if err := s.check(tagOrDigest); err != nil {
		return nil, v1.Descriptor{}, err
	}
	return s.c.manifest(ctx, s.r, tagOrDigest)
}

// BlobSize asks whether the repository has the blob d, and for its size.
func (s *Source) BlobSize(ctx context.Context, d digest.Digest) (int64, error) {
	b, err := s.blob(d, 0)
	if err != nil {
		return 0, err
	}
	size, err := b.head(ctx)
	if err != nil || size >= 0 {
		return size, err
	}
	// A HEAD without a length: a registry's answer to the first byte has it.
	resp, err := s.c.do(ctx, s.r, request{
		method: http.MethodGet,
		url:    s.r.url("blobs/" + d.String()),
		header: map[string]string{"Range": "bytes=0-0"},
		scopes: s.r.pull(),
		ok:     []int{http.StatusOK, http.StatusPartialContent},
	})
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusPartialContent {
		if _, _, total, ok := contentRange(resp.Header.Get("Content-Range")); ok && total >= 0 {
			return total, nil
		}
	} else if resp.ContentLength >= 0 {
		return resp.ContentLength, nil
	}
	return 0, fmt.Errorf("%s does not tell how large blob %s is", s.r, d)
}

func (s *Source) blob(d digest.Digest, sizeBytes int64) (blob, error) {
	if err := validDigest(d); err != nil {
		return blob{}, err
	}
	h, err := v1.NewHash(d.String())
	if err != nil {
		return blob{}, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	return blob{c: s.c, r: s.r, desc: v1.Descriptor{Digest: h, Size: sizeBytes}}, nil
}

// Range is bytes of a blob, over several connections where one breaks. They are
// not checked against the blob's digest.
type Range struct {
	io.ReadCloser
	From     int64 // place of the first byte
	Unranged bool  // the registry knows no ranges: it sends the whole, whatever was asked for
}

// Range starts the download of bytes [offset, offset+lengthBytes) of the blob d, which has
// sizeBytes. Where the registry knows no ranges it is the whole blob. A registry that
// says another size is an error.
func (s *Source) Range(ctx context.Context, d digest.Digest, sizeBytes, offset, lengthBytes int64) (Range, error) {
	b, err := s.blob(d, sizeBytes)
	if err != nil {
		return Range{}, err
	}
	if offset < 0 || lengthBytes < 0 || offset > sizeBytes {
		return Range{}, fmt.Errorf("%w: bytes from %d, %d of them, of a blob of %d", accel.ErrInvalid, offset, lengthBytes, sizeBytes)
	}
	br, err := b.openRange(ctx, offset, lengthBytes)
	if err != nil {
		return Range{}, err
	}
	return Range{ReadCloser: br, From: br.from, Unranged: br.unranged}, nil
}

// Tags is one page of the repository's tags. query has the client's n and last; next has
// those of the next page, nil on the last one.
func (s *Source) Tags(ctx context.Context, query url.Values) (tags []string, next url.Values, err error) {
	at := s.r.url("tags/list")
	if len(query) > 0 {
		at += "?" + query.Encode()
	}
	header, raw, err := s.c.read(ctx, s.r, request{method: http.MethodGet, url: at, scopes: s.r.pull(), ok: []int{http.StatusOK}}, maxPageBytes, nil)
	if err != nil {
		return nil, nil, err
	}
	var body struct {
		Tags []string `json:"tags"`
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		return nil, nil, accel.Permanent(fmt.Errorf("%w: %s: %w", accel.ErrInvalid, at, err))
	}
	there, err := nextPage(s.r, at, header)
	if err != nil || there == "" {
		return body.Tags, nil, err
	}
	u, err := url.Parse(there)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	return body.Tags, u.Query(), nil
}

// Referrers is Client.Referrers with this credential.
func (s *Source) Referrers(ctx context.Context, subject digest.Digest, artifactTypes ...string) ([]v1.Descriptor, error) {
	if err := validDigest(subject); err != nil {
		return nil, err
	}
	return s.c.referrers(ctx, s.r, subject, artifactTypes...)
}

// Challenge asks how the registry wants to be authenticated to (WWW-Authenticate, as it
// comes; none where it asks for nothing).
func (c *Client) Challenge(ctx context.Context, hostName string) ([]string, error) {
	h, err := c.host(hostName)
	if err != nil {
		return nil, err
	}
	resp, err := h.auth.bare(ctx)
	if err != nil {
		return nil, err
	}
	defer drain(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		return nil, nil
	case http.StatusUnauthorized:
		return resp.Header.Values("WWW-Authenticate"), nil
	default:
		return nil, refusal(statusError(resp))
	}
}

// Ping asks whether the registry lets a client with this Authorization header
// in. An empty one: the Client's own credentials.
func (c *Client) Ping(ctx context.Context, hostName, authorization string) error {
	h, err := c.host(hostName)
	if err != nil {
		return err
	}
	r := repo{host: h, authorization: authorization}
	_, err = c.discard(ctx, r, request{method: http.MethodGet, url: h.scheme + "://" + h.wire + "/v2/", ok: []int{http.StatusOK}})
	return err
}

// Credentials are the Client's own for a host, looked up anew; empty where it has none.
func (c *Client) Credentials(ctx context.Context, hostName string) (authn.AuthConfig, error) {
	h, err := c.host(hostName)
	if err != nil {
		return authn.AuthConfig{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, h.auth.timeout)
	defer cancel()
	config, err := lookUp(ctx, h.auth.keychain, resource{h.wire, ""})
	if err != nil {
		return authn.AuthConfig{}, err
	}
	return *config, nil
}

// HasCredentials reports whether the Client has credentials of its own for a host.
func (c *Client) HasCredentials(ctx context.Context, hostName string) (bool, error) {
	config, err := c.Credentials(ctx, hostName)
	return config.RegistryToken != "" || config.IdentityToken != "" || basic(&config) != "", err
}

// Unreachable reports whether err says nothing about what was asked for: the registry was not
// reached, or it answered that it cannot answer now.
func Unreachable(err error) bool {
	switch {
	case err == nil, accel.IsPermanent(err), errors.Is(err, accel.ErrRegistryNotAllowed), errors.Is(err, accel.ErrInvalid),
		errors.Is(err, accel.ErrUnauthenticated), errors.Is(err, accel.ErrForbidden), errors.Is(err, accel.ErrNotFound):
		return false
	}
	status := StatusOf(err)
	return status == 0 || status >= 500 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout
}
