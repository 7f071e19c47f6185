package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"accel"
	"accel/profile"
	"accel/trust"

	"github.com/opencontainers/go-digest"
)

// listLimit bounds how long a list may take: the tables of contents of all layers are read for it.
const listLimit = 30 * time.Second

// ListPaths gives an image's platform what a person lists of its start: paths, patterns and directories, which become a part
// of its profile that always counts; none takes that away. It returns those that mean nothing in the image. accel.ErrNotFound
// where nothing is known of the manifest, accel.ErrInvalid where no line means anything; else the ledger's
// error, a registry's or ctx's.
func (k *Worker) ListPaths(ctx context.Context, manifest digest.Digest, paths []string) (unmatched []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, listLimit)
	defer cancel()
	if k.Profiles == nil {
		return nil, fmt.Errorf("%w: profiles are not kept here", accel.ErrNotFound)
	}
	if _, err := k.Profiles.Place(ctx, manifest); err != nil {
		return nil, err
	}
	if len(paths) == 0 {
		return nil, k.Profiles.List(ctx, manifest, nil)
	}
	listing, err := k.listed(ctx, manifest, paths)
	if err != nil {
		return nil, err
	}
	if len(listing.Items) == 0 {
		return nil, fmt.Errorf("%w: none of the %d paths is a file with content in the image", accel.ErrInvalid, len(paths))
	}
	return listing.Unmatched, k.Profiles.List(ctx, manifest, listing.Items)
}

// listed looks the paths up in the image's converted form.
func (k *Worker) listed(ctx context.Context, manifest digest.Digest, paths []string) (l profile.Listing, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v", p)
		}
	}()
	envelope, err := k.Tracker.Mapping(ctx, "", manifest)
	if errors.Is(err, accel.ErrNotFound) {
		return l, fmt.Errorf("%w: the converted form of %s is not there", accel.ErrNotFound, manifest)
	}
	if err != nil {
		return l, err
	}
	verifier, err := trust.NewVerifier(k.Keys.Export())
	if err != nil {
		return l, err
	}
	m, err := verifier.Verify(ctx, envelope)
	if err != nil {
		return l, err
	}
	leave, err := k.enter(ctx)
	if err != nil {
		return l, err
	}
	defer leave()
	v, err := k.view(ctx, m, nil)
	if err != nil {
		return l, err
	}
	return profile.Listed(ctx, v.tree, paths)
}
