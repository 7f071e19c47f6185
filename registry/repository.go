package registry

import (
	"fmt"
	"strings"

	"accel"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// repo is one repository of one registry.
type repo struct {
	*host
	path string
	// authorization is sent as it is; empty: what the host's authority gets.
	authorization string
}

func (r repo) String() string { return r.name + "/" + r.path }

// url of something below the repository, such as "manifests/v1".
func (r repo) url(rest string) string {
	return r.scheme + "://" + r.wire + "/v2/" + r.path + "/" + rest
}

func (r repo) pull() []string { return []string{"repository:" + r.path + ":pull"} }
func (r repo) push() []string { return []string{"repository:" + r.path + ":pull,push"} }

// repository finds the host of "host/path" and checks the path.
func (c *Client) repository(s string) (repo, error) {
	name, path, _ := strings.Cut(s, "/")
	h, err := c.host(name)
	if err != nil {
		return repo{}, err
	}
	if h.name == dockerHub[0] && !strings.Contains(path, "/") {
		path = "library/" + path
	}
	if _, err := reference.WithName(h.name + "/" + path); err != nil || path == "" {
		return repo{}, fmt.Errorf("%w: repository %q: want HOST/PATH with a lower-case path", accel.ErrInvalid, s)
	}
	return repo{host: h, path: path}, nil
}

// target is repository for a tag or digest of it, which is checked too.
func (c *Client) target(repository, tagOrDigest string) (repo, error) {
	r, err := c.repository(repository)
	if err != nil {
		return repo{}, err
	}
	if strings.Contains(tagOrDigest, ":") {
		return r, validDigest(digest.Digest(tagOrDigest))
	}
	named, err := reference.WithName(r.String())
	if err == nil {
		_, err = reference.WithTag(named, tagOrDigest)
	}
	if err != nil {
		return repo{}, fmt.Errorf("%w: tag %q of %s: %w", accel.ErrInvalid, tagOrDigest, repository, err)
	}
	return r, nil
}

// validDigest takes SHA-256 alone: the manifest types of go-containerregistry
// know no other.
func validDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%w: digest %q: %w", accel.ErrInvalid, d, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return accel.Permanent(fmt.Errorf("%w: digest %q: only sha256 is supported", accel.ErrInvalid, d))
	}
	return nil
}
