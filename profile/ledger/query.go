package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"accel"
	"accel/profile"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// ManifestStatus is how the profile of one platform of an image stands.
type ManifestStatus struct {
	Manifest digest.Digest
	Platform string
	// Foretold says that a prediction was tried to its end.
	Foretold bool
	profile.Status
}

// Profile is a manifest's profile in canonical form, and its version. accel.ErrNotFound where there
// is none.
func (l *Ledger) Profile(ctx context.Context, manifest digest.Digest) (encoded []byte, version digest.Digest, err error) {
	var packed []byte
	stale := false
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		r, err := l.get(bt, manifest)
		if err != nil {
			return err
		}
		packed = bytes.Clone(bt.Bucket(bucketParts).Get(partKey(manifest, partServed)))
		version, stale = r.Served.Version, l.now().Sub(r.UsedAt) >= useStep
		return nil
	})
	if err != nil {
		return nil, "", err
	}
	if packed != nil {
		encoded, err = profile.Unpack(packed, profile.MaxEncodedBytes)
	}
	if packed == nil || err != nil {
		return nil, "", fmt.Errorf("%w: platform manifest %s has no profile", accel.ErrNotFound, manifest)
	}
	if stale {
		err = l.change(ctx, manifest, false, func(s *state) error {
			s.used()
			return nil
		})
		if err != nil && !errors.Is(err, accel.ErrNotFound) {
			l.o.Log.Warn("cannot note that a profile was used", "manifest", manifest, "error", err)
		}
	}
	return encoded, version, nil
}

// Status is how a manifest's profile stands; its Origin is empty where there is none.
// accel.ErrNotFound for an unknown manifest.
func (l *Ledger) Status(ctx context.Context, manifest digest.Digest) (s ManifestStatus, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		r, err := l.get(bt, manifest)
		if err != nil {
			return err
		}
		s = ManifestStatus{Manifest: manifest, Foretold: r.Foretold, Status: r.status()}
		if len(r.Places) > 0 {
			s.Platform = r.Places[len(r.Places)-1].Platform
		}
		return nil
	})
	return s, err
}

// OfImage lists the profiles of an image's platforms, by platform.
func (l *Ledger) OfImage(ctx context.Context, image digest.Digest) (all []ManifestStatus, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		all = nil
		return l.eachOf(bt, image, func(r *row) {
			s := ManifestStatus{Manifest: r.Manifest, Foretold: r.Foretold, Status: r.status()}
			for _, p := range r.Places {
				if p.Digest == image {
					s.Platform = p.Platform
				}
			}
			all = append(all, s)
		})
	})
	slices.SortFunc(all, func(a, b ManifestStatus) int {
		return bytes.Compare([]byte(a.Platform+" "+a.Manifest.String()), []byte(b.Platform+" "+b.Manifest.String()))
	})
	return all, err
}

func (l *Ledger) eachOf(bt *bbolt.Tx, image digest.Digest, do func(*row)) error {
	prefix := hash(image.String())
	c := bt.Bucket(bucketByImage).Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		r, err := l.get(bt, digest.Digest(k[hashBytes:]))
		if err != nil {
			return err
		}
		do(r)
	}
	return nil
}

func (l *Ledger) manifestsOf(ctx context.Context, image digest.Digest) (all []digest.Digest, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		all = nil
		return l.eachOf(bt, image, func(r *row) { all = append(all, r.Manifest) })
	})
	return all, err
}

// Ancestor is an image from which another one may inherit.
type Ancestor struct {
	Manifest digest.Digest
	// Profile was recorded. What only the image's maker listed is not in it.
	Profile accel.Profile
	// Predicted had been foretold; ok is false where nothing had.
	Predicted  accel.Profile
	Prediction bool
}

// maxAncestors bounds how many images are looked at for one that was recorded.
const maxAncestors = 100

// Ancestor finds the predecessor of a manifest: the platform's manifest in the images named
// first, in their order, else the one of the repository that was learned of last. Only
// those with recorded starts count. accel.ErrNotFound where there is none.
func (l *Ledger) Ancestor(ctx context.Context, repository, platform string, not digest.Digest, first ...digest.Digest) (a Ancestor, err error) {
	var found digest.Digest
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		found = ""
		look := func(r *row) {
			if found != "" || r.Manifest == not || r.Served.Origin != accel.ProfileRecorded {
				return
			}
			for _, p := range r.Places {
				if p.Repository == repository && p.Platform == platform {
					found = r.Manifest
				}
			}
		}
		for _, image := range first {
			if err := l.eachOf(bt, image, look); err != nil {
				return err
			}
		}
		prefix := hash(repository)
		c := bt.Bucket(bucketByRepository).Cursor()
		k, _ := c.Seek(slices.Concat(prefix, bytes.Repeat([]byte{0xff}, 9)))
		if k == nil {
			k, _ = c.Last()
		} else {
			k, _ = c.Prev()
		}
		for looked := 0; found == "" && looked < maxAncestors && bytes.HasPrefix(k, prefix); looked++ {
			r, err := l.get(bt, digest.Digest(k[hashBytes+8:]))
			if err != nil {
				return err
			}
			look(r)
			k, _ = c.Prev()
		}
		return nil
	})
	if err == nil && found == "" {
		err = fmt.Errorf("%w: no recorded profile of an image for %s in %s", accel.ErrNotFound, platform, repository)
	}
	if err != nil {
		return a, err
	}
	err = l.change(ctx, found, false, func(s *state) error {
		a = Ancestor{Manifest: found}
		var ok bool
		if a.Profile, ok = s.standing(false); !ok {
			return fmt.Errorf("%w: platform manifest %s has no profile", accel.ErrNotFound, found)
		}
		a.Predicted, a.Prediction = s.profile(partPredicted)
		return nil
	})
	return a, err
}

// Knows says whether a manifest is known as part of an image, with its start foretold.
func (l *Ledger) Knows(ctx context.Context, manifest digest.Digest, at Image) (known bool, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		known = false
		r, err := l.get(bt, manifest)
		if err != nil {
			return err
		}
		known = r.Foretold && slices.ContainsFunc(r.Places, func(p place) bool { return p.Image == at })
		return nil
	})
	if errors.Is(err, accel.ErrNotFound) {
		return false, nil
	}
	return known, err
}

// Place is where a manifest was learned of last. accel.ErrNotFound for an unknown one.
func (l *Ledger) Place(ctx context.Context, manifest digest.Digest) (at Image, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		r, err := l.get(bt, manifest)
		if err == nil && len(r.Places) == 0 {
			err = fmt.Errorf("%w: platform manifest %s is part of no image", accel.ErrNotFound, manifest)
		}
		if err == nil {
			at = r.Places[len(r.Places)-1].Image
		}
		return err
	})
	return at, err
}

// Usage is how much is kept.
type Usage struct {
	Images int
	Bytes  int64
}

// Usage tells it.
func (l *Ledger) Usage(ctx context.Context) (u Usage, err error) {
	err = l.view(ctx, func(bt *bbolt.Tx) error {
		u = Usage{Images: int(metaNumber(bt, keyImages)), Bytes: int64(metaNumber(bt, keyBytes))}
		return nil
	})
	return u, err
}
