package lazy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"accel"
	"accel/internal/durable"

	"github.com/opencontainers/go-digest"
)

const (
	// maxRepositories of one layer are remembered, the ones used last first.
	maxRepositories = 4
	// maxClaims about one layer are remembered; more than these are declined.
	maxClaims = 256
)

// origin is where a layer's content comes from, and what is known of it. It is kept on disk, so
// that a node that starts without its server and registries knows it too.
type origin struct {
	Repositories []string      `json:"repositories"` // "host/path", the one to ask first first
	SizeBytes    int64         `json:"sizeBytes"`    // of the blob
	TOCDigest    digest.Digest `json:"tocDigest"`
	TOCOffset    int64         `json:"tocOffset"` // -1: the footer tells
	// Signed: a mapping that is trusted said so. Else an image's config claimed things.
	Signed bool    `json:"signed,omitempty"`
	Claims []claim `json:"claims,omitempty"`
	// DiffID was computed over the whole layer; empty: not yet.
	DiffID digest.Digest `json:"diffId,omitempty"`
}

// claim is what the config of an image says of one of its layers: under this chain ID
// containerd has it for the layer with this DiffID.
type claim struct {
	DiffID digest.Digest `json:"diffId"`
	Chain  digest.Digest `json:"chain"`
}

// join adds what another image says of the same layer. ErrConflict where they cannot both be
// right.
func (o origin) join(n origin) (origin, error) {
	if o.SizeBytes != n.SizeBytes || o.TOCDigest != n.TOCDigest || o.TOCOffset >= 0 && n.TOCOffset >= 0 && o.TOCOffset != n.TOCOffset {
		return o, fmt.Errorf("%w: the layer is known with %d bytes and the TOC %s at %d, not %d bytes and %s at %d",
			accel.ErrConflict, o.SizeBytes, o.TOCDigest, o.TOCOffset, n.SizeBytes, n.TOCDigest, n.TOCOffset)
	}
	o.TOCOffset = max(o.TOCOffset, n.TOCOffset)
	o.Signed = o.Signed || n.Signed
	all := slices.Clone(n.Repositories)
	for _, r := range o.Repositories {
		if !slices.Contains(all, r) {
			all = append(all, r)
		}
	}
	o.Repositories = all[:min(len(all), maxRepositories)]
	o.Claims = slices.Clone(o.Claims)
	for _, c := range n.Claims {
		if !slices.Contains(o.Claims, c) {
			o.Claims = append(o.Claims, c)
		}
	}
	if len(o.Claims) > maxClaims {
		return o, fmt.Errorf("%w: more than %d claims about one layer", accel.ErrConflict, maxClaims)
	}
	return o, nil
}

// host is the registry that is asked first.
func (o origin) host() string {
	host, _, _ := strings.Cut(o.Repositories[0], "/")
	return host
}

func (o origin) equal(n origin) bool {
	return slices.Equal(o.Repositories, n.Repositories) && slices.Equal(o.Claims, n.Claims) &&
		o.SizeBytes == n.SizeBytes && o.TOCDigest == n.TOCDigest && o.TOCOffset == n.TOCOffset && o.Signed == n.Signed && o.DiffID == n.DiffID
}

// origins are the files with what is known of the layers, one for each.
type origins struct{ dir string }

func (o origins) path(d digest.Digest) string {
	return filepath.Join(o.dir, d.Algorithm().String()+"-"+d.Encoded()+".json")
}

// get returns accel.ErrNotFound where nothing is known, also where what was there is damaged.
func (o origins) get(d digest.Digest) (origin, error) {
	raw, err := os.ReadFile(o.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return origin{}, fmt.Errorf("%w: where layer %s comes from", accel.ErrNotFound, d)
	}
	if err != nil {
		return origin{}, err
	}
	var at origin
	if err := json.Unmarshal(raw, &at); err != nil || at.TOCDigest.Validate() != nil || at.SizeBytes <= 0 || len(at.Repositories) == 0 {
		return origin{}, fmt.Errorf("%w: where layer %s comes from: %s is damaged", accel.ErrNotFound, d, o.path(d))
	}
	return at, nil
}

func (o origins) put(d digest.Digest, at origin) error {
	raw, err := json.Marshal(at)
	if err != nil {
		return err
	}
	return durable.WriteFile(o.path(d), raw, 0o600)
}

// sweep removes the files of layers that are gone, and what crashes left.
func (o origins) sweep(there func(digest.Digest) bool) error {
	entries, err := os.ReadDir(o.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		algorithm, hex, _ := strings.Cut(strings.TrimSuffix(e.Name(), ".json"), "-")
		d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
		if d.Validate() == nil && there(d) {
			continue
		}
		errs = append(errs, os.Remove(filepath.Join(o.dir, e.Name())))
	}
	return errors.Join(errs...)
}
