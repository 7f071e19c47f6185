package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"

	"accel"
	"accel/profile"

	"github.com/opencontainers/go-digest"
)

// ProfileStatus is what is known of the profile of one platform of an image.
type ProfileStatus struct {
	Manifest string `json:"manifest" doc:"digest of the source PLATFORM manifest"`
	Platform string `json:"platform,omitempty" example:"linux/amd64"`
	profile.Status
}

// StartReceipt answers a report of a start.
type StartReceipt struct {
	WantMore bool `json:"wantMore" doc:"more recordings of this image would make its profile better"`
}

func profilePath(manifest digest.Digest) string {
	return "/v1/profiles/" + url.PathEscape(manifest.String())
}

// Profile gets the profile of a source PLATFORM manifest. accel.ErrNotFound where there
// is none.
func (c *Client) Profile(ctx context.Context, manifest digest.Digest) (accel.Profile, error) {
	var raw json.RawMessage
	if err := c.do(ctx, http.MethodGet, profilePath(manifest), nil, nil, &raw); err != nil {
		return accel.Profile{}, err
	}
	p, err := profile.Decode(raw)
	if err == nil && p.Manifest != manifest {
		err = fmt.Errorf("%w: asked %s for the profile of %s and got that of %s", accel.ErrInvalid, c.base, manifest, p.Manifest)
	}
	return p, err
}

// ReportStart brings what a start on a node read, which the server has for good when the
// error is nil. It may be done again. accel.ErrNotFound where the server knows no such image,
// accel.ErrInvalid where it will never take the report.
func (c *Client) ReportStart(ctx context.Context, node string, r profile.Report) (receipt StartReceipt, err error) {
	b, err := profile.EncodeReport(r)
	if err != nil {
		return receipt, err
	}
	q := url.Values{"node": {node}}
	return receipt, c.do(ctx, http.MethodPost, profilePath(r.Manifest)+"/starts", q, rawBody{"application/json", b}, &receipt)
}

// ImportProfile gives a source PLATFORM manifest a profile, which stands until starts have been
// recorded that say otherwise. What p says of its manifest and origin does not count.
func (c *Client) ImportProfile(ctx context.Context, manifest digest.Digest, p accel.Profile) (s ProfileStatus, err error) {
	p.Manifest, p.Origin, p.Starts = manifest, accel.ProfileImported, 0
	p.RecordedAt = accel.Profile{}.RecordedAt
	b, err := profile.Encode(p)
	if err != nil {
		return s, err
	}
	return s, c.do(ctx, http.MethodPut, profilePath(manifest), nil, rawBody{profile.MediaType, b}, &s)
}

// ListPaths lists files that starts of a source PLATFORM manifest read: names, directories and patterns, in place of those
// that were listed before; none takes them away. accel.ErrNotFound where the server knows no such image, accel.ErrInvalid
// where none of them means a file of it.
func (c *Client) ListPaths(ctx context.Context, manifest digest.Digest, paths []string) (l ListedProfile, err error) {
	if paths == nil {
		paths = []string{}
	}
	return l, c.do(ctx, http.MethodPut, profilePath(manifest)+"/paths", nil, PathList{Paths: paths}, &l)
}

// RemoveProfile forgets the profile of a source PLATFORM manifest with all recorded starts.
func (c *Client) RemoveProfile(ctx context.Context, manifest digest.Digest) (s ProfileStatus, err error) {
	return s, c.do(ctx, http.MethodDelete, profilePath(manifest), nil, nil, &s)
}
