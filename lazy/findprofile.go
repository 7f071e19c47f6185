package lazy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"accel"
	"accel/profile/artifact"

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
// node's own starts, whoever may push to the repository. A profile is a hint; a wrong one costs bytes. One that
// was removed at the server is removed here.
// accel.ErrNotFound where there is none.
func (l *Lazy) findProfile(ctx context.Context, there *attached) (found, error) {
	own, ownErr := l.profiles.get(there.manifest)
	patience := serverTime
	if len(own.Items) > 0 {
		patience = ownTime
	}
	served, err := l.servedProfile(ctx, there.manifest, patience)
	if l.o.Server != nil && errors.Is(err, accel.ErrNotFound) && l.profiles.told(there.manifest) {
		if err := l.forgetProfile(there.manifest); err != nil {
			return found{}, err
		}
		own, ownErr = accel.Profile{}, err
	}
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
	list, attachedErr := there.of(ctx, accel.MediaTypeProfile)
	if attachedErr == nil {
		var p accel.Profile
		if p, attachedErr = artifact.FindIn(ctx, there.source, there.manifest, list); attachedErr == nil {
			return found{p, fromRegistry}, nil
		}
	}
	return found{}, errors.Join(ownErr, err, attachedErr)
}

// forgetProfile drops what this node recorded of an image: the server had it too, and it was removed there (accel profile
// rm). The next start is recorded anew.
func (l *Lazy) forgetProfile(manifest digest.Digest) error {
	l.o.Log.Info("the profile of an image was removed at the server, and is here too", "manifest", manifest)
	l.starts.more(manifest, true)
	return l.profiles.remove(manifest)
}

// profileAtTarget looks where the converted image is, when that is another repository.
func (l *Lazy) profileAtTarget(ctx context.Context, p *prospect) found {
	at, list, err := p.profiles(ctx)
	if at == p.there {
		return found{}
	}
	if err == nil {
		var f accel.Profile
		if f, err = artifact.FindIn(ctx, at.source, at.manifest, list); err == nil {
			return found{f, fromRegistry}
		}
	}
	l.o.Log.Debug("an image has no profile beside its converted form", "manifest", at.manifest, "reason", err)
	return found{}
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
