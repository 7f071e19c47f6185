package lazy

import (
	"context"
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
	// maxRepositories of one layer are remembered, the ones used last first. The oldest stays: whoever names the layer in
	// many repositories, and empties them, does not cut off those who had it before.
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

// contradicts reports whether what another image says of the same layer cannot be right too.
func (o origin) contradicts(n origin) bool {
	return o.SizeBytes != n.SizeBytes || o.TOCDigest != n.TOCDigest || o.TOCOffset >= 0 && n.TOCOffset >= 0 && o.TOCOffset != n.TOCOffset
}

// join adds what another image says of the same layer. ErrConflict where they cannot both be
// right. What a mapping says counts more than what anybody's config does.
func (o origin) join(n origin) (origin, error) {
	if o.contradicts(n) {
		return o, fmt.Errorf("%w: the layer is known with %d bytes and the TOC %s at %d, not %d bytes and %s at %d",
			accel.ErrConflict, o.SizeBytes, o.TOCDigest, o.TOCOffset, n.SizeBytes, n.TOCDigest, n.TOCOffset)
	}
	o.TOCOffset = max(o.TOCOffset, n.TOCOffset)
	first, then := n.Repositories, o.Repositories
	if o.Signed && !n.Signed {
		first, then = then, first
	}
	o.Signed = o.Signed || n.Signed
	all := slices.Clone(first)
	for _, r := range then {
		if !slices.Contains(all, r) {
			all = append(all, r)
		}
	}
	if len(all) > maxRepositories { // the last is the oldest, or the newest that nobody signed for
		all = append(all[:maxRepositories-1], all[len(all)-1])
	}
	o.Repositories = all
	o.Claims = slices.Clone(o.Claims)
	for _, c := range n.Claims {
		if !slices.Contains(o.Claims, c) && (o.DiffID == "" || o.DiffID != c.DiffID) { // one that is known to be true is settled
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

// sweep removes the files of layers that are gone, and what crashes left. Nobody else may be writing any.
func (o origins) sweep(there func(digest.Digest) bool) error {
	entries, err := os.ReadDir(o.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if d := layerOfFile(e.Name()); d.Validate() == nil && there(d) {
			continue
		}
		errs = append(errs, os.Remove(filepath.Join(o.dir, e.Name())))
	}
	return errors.Join(errs...)
}

// layerOfFile is the layer that a file is about; not valid where it is about none.
func layerOfFile(name string) digest.Digest {
	algorithm, hex, _ := strings.Cut(strings.TrimSuffix(name, ".json"), "-")
	return digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
}

// sweepOrigins removes what is known of layers that were evicted, while layers are opened.
func (l *Lazy) sweepOrigins(ctx context.Context) error {
	entries, err := os.ReadDir(l.origins.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if d := layerOfFile(e.Name()); d.Validate() == nil {
			errs = append(errs, l.sweepOrigin(ctx, d))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return errors.Join(errs...)
}

func (l *Lazy) sweepOrigin(ctx context.Context, d digest.Digest) error {
	if !l.absent(d) {
		return nil
	}
	unlock, err := l.locks.Lock(ctx, d.String()) // lest it is just being made
	if err != nil {
		return err
	}
	defer unlock()
	if !l.absent(d) {
		return nil
	}
	if err := os.Remove(l.origins.path(d)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// absent reports whether a layer is neither open nor in the store, so that what is known of it was never compared with it,
// or is of no use any more.
func (l *Lazy) absent(d digest.Digest) bool {
	l.mu.Lock()
	open := l.open[d] != nil
	l.mu.Unlock()
	if open {
		return false
	}
	_, err := l.o.Store.Layer(d)
	return errors.Is(err, accel.ErrNotFound)
}
