package lazy

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"time"

	"accel"
	"accel/profile"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

// Where a profile was found.
const (
	fromNode     = "node"     // this node recorded it
	fromServer   = "server"   // the server gave it
	fromRegistry = "registry" // an artifact refers to the image
)

const (
	// serverTime is how long the server is waited for before the registry's profile is taken: what comes
	// later is for nothing, the start has read it by then.
	serverTime = 2 * time.Second
	// ownTime is the same where this node has recorded starts itself.
	ownTime = 250 * time.Millisecond
	// maxPackedProfileBytes bounds a profile's blob.
	maxPackedProfileBytes = 1 << 20
)

// found is a profile, or that there is none.
type found struct {
	accel.Profile
	from string // empty: there is none
}

// lookForProfile looks for what an image's start reads, while its layers are opened. It is work of l that
// ends with ctx; the channel gives one answer.
func (l *Lazy) lookForProfile(ctx context.Context, there *attached) <-chan found {
	answer := make(chan found, 1)
	l.work.Go(func() {
		f, err := l.findProfile(ctx, there)
		if err != nil && ctx.Err() == nil {
			l.o.Log.Debug("an image has no profile", "manifest", there.manifest, "reason", err)
		}
		answer <- f
	})
	return answer
}

// findProfile goes by who is to be trusted: the server, which knows what starts on many nodes read, this
// node's own starts, whoever may push to the repository. A profile is a hint; a wrong one costs bytes.
// accel.ErrNotFound where there is none.
func (l *Lazy) findProfile(ctx context.Context, there *attached) (found, error) {
	own, ownErr := l.profiles.get(there.manifest)
	patience := serverTime
	if len(own.Items) > 0 {
		patience = ownTime
	}
	served, err := l.servedProfile(ctx, there.manifest, patience)
	switch served.Origin {
	case accel.ProfilePredicted, accel.ProfileInherited:
		if len(own.Items) > 0 { // what was seen here is worth more
			return found{own, fromNode}, nil
		}
	}
	switch {
	case err == nil:
		return found{served, fromServer}, nil
	case len(own.Items) > 0:
		return found{own, fromNode}, nil
	}
	p, attachedErr := attachedProfile(ctx, there)
	if attachedErr == nil {
		return found{p, fromRegistry}, nil
	}
	return found{}, errors.Join(ownErr, err, attachedErr)
}

// servedProfile asks the server.
func (l *Lazy) servedProfile(ctx context.Context, manifest digest.Digest, patience time.Duration) (accel.Profile, error) {
	if l.o.Server == nil {
		return accel.Profile{}, fmt.Errorf("%w: there is no server", accel.ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	p, err := l.o.Server.Profile(ctx, manifest)
	if err != nil {
		return accel.Profile{}, fmt.Errorf("ask the server for the profile of %s: %w", manifest, err)
	}
	return p, nil
}

// attachedProfile is the first that can be read among what refers to the manifest, a recorded one before
// others.
func attachedProfile(ctx context.Context, there *attached) (best accel.Profile, err error) {
	list, err := there.of(ctx, accel.MediaTypeProfile)
	if err != nil {
		return best, err
	}
	var errs []error
	for _, desc := range list {
		p, err := readProfile(ctx, there, desc)
		switch {
		case ctx.Err() != nil:
			return best, ctx.Err()
		case err == nil && p.Manifest != there.manifest:
			err = fmt.Errorf("%w: it is about manifest %s", accel.ErrInvalid, p.Manifest)
		case err == nil && p.Origin == accel.ProfileRecorded:
			return p, nil
		case err == nil && best.Manifest == "":
			best = p
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("profile artifact %s: %w", desc.Digest, err))
		}
	}
	if best.Manifest != "" {
		return best, nil
	}
	return best, errors.Join(append(errs, fmt.Errorf("%w: no profile refers to %s", accel.ErrNotFound, there.manifest))...)
}

// readProfile reads an artifact: from the listing's annotation, the manifest's, or its one layer.
func readProfile(ctx context.Context, there *attached, desc v1.Descriptor) (p accel.Profile, err error) {
	packed := desc.Annotations[accel.AnnotationProfile]
	if packed == "" {
		m, err := artifactOf(ctx, there.source, digest.Digest(desc.Digest.String()))
		if err != nil {
			return p, err
		}
		if packed = m.Annotations[accel.AnnotationProfile]; packed == "" {
			if len(m.Layers) != 1 || m.Layers[0].Size <= 0 || m.Layers[0].Size > maxPackedProfileBytes {
				return p, fmt.Errorf("%w: it has no profile of at most %d bytes", accel.ErrInvalid, maxPackedProfileBytes)
			}
			raw, err := small(ctx, there.source, m.Layers[0].Digest, m.Layers[0].Size)
			if err != nil {
				return p, err
			}
			return unpackProfile(bytes.NewReader(raw))
		}
	}
	return unpackProfile(base64.NewDecoder(base64.StdEncoding, bytes.NewReader([]byte(packed))))
}

func unpackProfile(packed io.Reader) (p accel.Profile, err error) {
	zr, err := gzip.NewReader(packed)
	if err != nil {
		return p, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	raw, err := io.ReadAll(io.LimitReader(zr, profile.MaxEncodedBytes+1))
	if err != nil {
		return p, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	return profile.Decode(raw)
}
