package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"accel"
	"accel/bundle"
	"accel/profile/artifact"
	"accel/profile/ledger"
	"accel/trust"
)

// bundles are those of one publication, by the digests of the layers: an image in two repositories has one.
type bundles map[string]bundle.Made

// errUnready: a profile is not published yet, as a boot bundle is made of the converted image. The image is of use to nodes from then on.
var errUnready = errors.New("the image is not Ready yet")

// form makes a profile's artifact, with the boot bundle where one is wanted and can be had. What is wrong with a bundle is
// said and is no error: nodes do without. errUnready: it is to be made later.
func (p *Publisher) form(ctx context.Context, at *ledger.Place, what accel.Profile, made bundles) (artifact.Form, error) {
	form, err := artifact.FormOf(what)
	if err != nil || p.o.BundleBytes == 0 || len(what.Items) == 0 {
		return form, err
	}
	began := time.Now()
	m, err := p.bundle(ctx, at, what, made)
	if err == nil {
		var with artifact.Form
		if with, err = form.WithBundle(m); err == nil {
			p.bundled.WithLabelValues("ok").Inc()
			p.o.Log.Debug("a boot bundle was made", "manifest", what.Manifest, "target", at.Target, "bundle", m.Digest, "size", m.SizeBytes, "took", time.Since(began))
			return with, nil
		}
	}
	switch {
	case ctx.Err() != nil:
		return form, context.Cause(ctx)
	case errors.Is(err, errUnready):
		return form, err
	}
	p.bundled.WithLabelValues("error").Inc()
	p.o.Log.Info("a profile is published without a boot bundle", "manifest", what.Manifest, "target", at.Target, "reason", err)
	return form, nil
}

// bundle makes the bundle of an image in one place.
func (p *Publisher) bundle(ctx context.Context, at *ledger.Place, what accel.Profile, made bundles) (m bundle.Made, err error) {
	envelope, err := p.o.Tracker.Mapping(ctx, at.Repository, what.Manifest)
	if errors.Is(err, accel.ErrNotFound) {
		return m, errUnready
	}
	if err != nil {
		return m, fmt.Errorf("its mapping: %w", err)
	}
	keys, err := trust.NewVerifier(p.o.Keys.Export())
	if err != nil {
		return m, err
	}
	mapping, err := keys.Verify(ctx, envelope)
	if err != nil {
		return m, fmt.Errorf("its mapping: %w", err)
	}
	var targets []string
	var sizes []bundle.LayerSize
	for _, l := range mapping.Layers {
		targets = append(targets, l.Target.String())
		sizes = append(sizes, bundle.LayerSize{Bytes: l.TargetBytes, TOCOffset: l.TOCOffset})
	}
	of := strings.Join(targets, " ")
	if m, ok := made[of]; ok {
		return m, nil
	}
	select {
	case p.bundling <- struct{}{}:
		defer func() { <-p.bundling }()
	case <-ctx.Done():
		return m, context.Cause(ctx)
	}
	source, err := p.o.Registry.Source(mapping.TargetRepository, "")
	if err != nil {
		return m, err
	}
	most := bundle.Bound(sizes) // nodes take no more
	most.SizeBytes = min(most.SizeBytes, p.o.BundleBytes)
	m, err = bundle.Make(ctx, mapping.Layers, what.Items, func(ctx context.Context, layer int, offset, n int64) ([]byte, error) {
		l := mapping.Layers[layer]
		r, err := source.Range(ctx, l.Target, l.TargetBytes, offset, n)
		if err != nil {
			return nil, err
		}
		if r.Unranged {
			return nil, errors.Join(fmt.Errorf("%s knows no ranges", source.Host()), r.Close())
		}
		b := make([]byte, n)
		_, err = io.ReadFull(r, b)
		return b, errors.Join(err, r.Close())
	}, most)
	if err == nil {
		made[of] = m
	}
	return m, err
}
