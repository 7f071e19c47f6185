package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"accel"
)

const (
	// pageSize is what Amazon ECR allows at most.
	pageSize = 1000
	// maxPageBytes, maxPages and maxListingBytes bound a listing: a registry that pages without
	// end must not fill the memory. A million names have some 60 MB.
	maxPageBytes    = 16 << 20
	maxPages        = 1000
	maxListingBytes = 128 << 20
)

// Tags lists the tags of a repository. ErrNotFound where the registry does not
// know the repository.
func (c *Client) Tags(ctx context.Context, repository string) ([]string, error) {
	r, err := c.repository(repository)
	if err != nil {
		return nil, err
	}
	return c.listing(ctx, r, r.url("tags/list"), r.pull())
}

// Catalog lists repositories of a host (paths without the host).
func (c *Client) Catalog(ctx context.Context, host string) ([]string, error) {
	h, err := c.host(host)
	if err != nil {
		return nil, err
	}
	return c.listing(ctx, repo{host: h}, h.scheme+"://"+h.wire+"/v2/_catalog", []string{"registry:catalog:*"})
}

// listing reads a paged listing of names.
func (c *Client) listing(ctx context.Context, r repo, at string, scopes []string) ([]string, error) {
	first := at
	at += fmt.Sprintf("?n=%d", pageSize)
	all, size := []string{}, 0
	for page := 0; at != ""; page++ {
		if page == maxPages || size > maxListingBytes {
			return nil, fmt.Errorf("%w: %s: more than %d pages, or than %d bytes", accel.ErrInvalid, first, maxPages, maxListingBytes)
		}
		header, raw, err := c.read(ctx, r, request{method: http.MethodGet, url: at, scopes: scopes, ok: []int{http.StatusOK}}, maxPageBytes, nil)
		if answer := (*responseError)(nil); page == 0 && errors.As(err, &answer) && answer.answer.StatusCode == http.StatusBadRequest {
			// Registries may allow less than pageSize (distribution: catalog.maxentries);
			// without a wish they give what they allow.
			at = first
			continue
		}
		if err != nil {
			return nil, err
		}
		size += len(raw)
		var body struct {
			Tags         []string `json:"tags"`
			Repositories []string `json:"repositories"`
		}
		if err := json.Unmarshal(raw, &body); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", accel.ErrInvalid, at, err)
		}
		all = append(append(all, body.Tags...), body.Repositories...)
		if at, err = nextPage(r, at, header); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// nextPage reads the Link header (RFC 8288) of a page; empty on the last one.
// The next page is always asked for at the registry itself, whatever host the
// header names.
func nextPage(r repo, at string, header http.Header) (string, error) {
	for _, link := range header.Values("Link") {
		target, parameters, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(link), "<"), ">")
		if !ok || !strings.Contains(strings.ReplaceAll(parameters, `"`, ""), "rel=next") {
			continue
		}
		base, err := url.Parse(at)
		if err != nil {
			return "", err
		}
		next, err := base.Parse(target)
		if err != nil {
			return "", fmt.Errorf("%w: link to the next page of %s: %w", accel.ErrInvalid, at, err)
		}
		there := (&url.URL{Scheme: r.scheme, Host: r.wire, Path: next.Path, RawPath: next.RawPath, RawQuery: next.RawQuery}).String()
		if there == at {
			return "", fmt.Errorf("%w: %s names itself as its next page", accel.ErrInvalid, at)
		}
		return there, nil
	}
	return "", nil
}
