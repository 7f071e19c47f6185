package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"accel"
	"accel/profile/artifact"
	"accel/profile/ledger"
	"accel/readiness"
	"accel/registry"
	"accel/trust"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// publishLimit bounds one publication: a few small requests for each place, and the making of boot bundles, for which all
// that is hot is read and packed.
const publishLimit = 10 * time.Minute

// PublisherOptions are all required but BundleBytes and Registerer.
type PublisherOptions struct {
	Profiles *ledger.Ledger
	Registry *registry.Client
	Tracker  *readiness.Tracker
	Keys     *trust.Keyring // that mappings are signed with
	// BundleBytes bounds the boot bundle that goes with a profile; 0: none does. One is in memory as it is made.
	BundleBytes int64
	Log         *slog.Logger
	Registerer  prometheus.Registerer // nil: not registered
}

// Publisher attaches profiles to their images in registries, so that nodes find them without
// a control plane.
type Publisher struct {
	o         PublisherOptions
	published *prometheus.CounterVec
	bundled   *prometheus.CounterVec
}

// NewPublisher starts nothing; see Run.
func NewPublisher(o PublisherOptions) (*Publisher, error) {
	p := &Publisher{o: o, published: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "accel_profile_publications_total", Help: "Profiles that were published in registries, by result (ok, removed, error).",
	}, []string{"result"}), bundled: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "accel_profile_bundles_total", Help: "Boot bundles that were made for profiles, by result (ok, error).",
	}, []string{"result"})}
	if o.Registerer != nil {
		for _, c := range []prometheus.Collector{p.published, p.bundled} {
			if err := o.Registerer.Register(c); err != nil {
				return nil, fmt.Errorf("register metrics: %w", err)
			}
		}
	}
	return p, nil
}

// Run publishes what is due until ctx ends. It returns nil then, else what broke the ledger.
func (p *Publisher) Run(ctx context.Context) error {
	for {
		next, err := p.o.Profiles.NextPublication(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		if err != nil {
			return fmt.Errorf("find the next profile to publish: %w", err)
		}
		if err := p.one(ctx, next); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// one publishes in all places. Its error is the ledger's; a registry's puts the publication off.
func (p *Publisher) one(ctx context.Context, next ledger.Publication) error {
	limited, cancel := context.WithTimeout(ctx, publishLimit)
	defer cancel()
	var errs []error
	made := bundles{}
	for n := range next.Places {
		if err := p.place(limited, &next, &next.Places[n], made); err != nil {
			errs = append(errs, err)
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	switch err := errors.Join(errs...); {
	case errors.Is(err, errUnbundled):
		p.o.Log.Debug("an image's profile is published again later", "manifest", next.Manifest, "reason", err)
		return p.o.Profiles.PublicationFailed(ctx, next)
	case err != nil:
		p.published.WithLabelValues("error").Inc()
		p.o.Log.Warn("cannot publish an image's profile; tried again later", "manifest", next.Manifest, "error", err)
		return p.o.Profiles.PublicationFailed(ctx, next)
	case next.Profile == nil:
		p.published.WithLabelValues("removed").Inc()
	default:
		p.published.WithLabelValues("ok").Inc()
	}
	return p.o.Profiles.Published(ctx, next)
}

// place publishes in one place, and takes away what is there of older profiles. The new one
// is there before the old one goes.
func (p *Publisher) place(ctx context.Context, next *ledger.Publication, at *ledger.Place, made bundles) error {
	if next.Profile != nil {
		subject, err := p.o.Registry.Head(ctx, at.Repository, next.Manifest.String())
		if errors.Is(err, accel.ErrNotFound) || errors.Is(err, accel.ErrRegistryNotAllowed) {
			at.Gone = true
			return nil
		}
		if err != nil {
			return fmt.Errorf("look at %s@%s: %w", at.Repository, next.Manifest, err)
		}
		form, early := p.form(ctx, at, *next.Profile, made)
		if early != nil && !errors.Is(early, errUnbundled) {
			return early
		}
		d, err := p.attach(ctx, at.Target, v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}, form)
		if err != nil {
			return fmt.Errorf("attach the profile of %s in %s: %w", next.Manifest, at.Target, err)
		}
		if at.Artifact != "" && at.Artifact != d {
			at.Stale = append(slices.Clone(at.Stale), at.Artifact)
		}
		if at.Artifact = d; early != nil {
			return errors.Join(early, p.clear(ctx, next.Manifest, at))
		}
	} else if at.Artifact != "" {
		at.Stale, at.Artifact = append(slices.Clone(at.Stale), at.Artifact), ""
	}
	return p.clear(ctx, next.Manifest, at)
}

func (p *Publisher) attach(ctx context.Context, repository string, subject v1.Descriptor, form artifact.Form) (digest.Digest, error) {
	_, desc, err := registry.BuildAttachment(subject, accel.MediaTypeProfile, form.Annotations, form.Blobs...)
	if err != nil {
		return "", err
	}
	// Before it is pushed, so that its webhook is known as our own push's.
	if err := p.o.Tracker.AnnounceArtifact(ctx, digest.Digest(desc.Digest.String())); err != nil {
		return "", err
	}
	return p.o.Registry.Attach(ctx, repository, subject, accel.MediaTypeProfile, form.Annotations, form.Blobs...)
}

// clear deletes all profiles of the manifest in the place but the one that stands: also those
// of a ledger that was lost.
func (p *Publisher) clear(ctx context.Context, manifest digest.Digest, at *ledger.Place) error {
	doomed := slices.Clone(at.Stale)
	list, err := p.o.Registry.Referrers(ctx, at.Target, manifest, accel.MediaTypeProfile)
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		return err
	}
	for _, d := range list {
		doomed = append(doomed, digest.Digest(d.Digest.String()))
	}
	slices.Sort(doomed)
	at.Stale = nil
	for _, d := range slices.Compact(doomed) {
		if d == at.Artifact {
			continue
		}
		if err := p.o.Registry.Delete(ctx, at.Target, d); err != nil {
			if ctx.Err() != nil || registry.Unreachable(err) {
				return fmt.Errorf("delete the former profile %s@%s: %w", at.Target, d, err)
			}
			p.o.Log.Info("the registry does not delete a former profile; nodes take the best of several", "artifact", at.Target+"@"+d.String(), "error", err)
			at.Stale = append(at.Stale, d)
		}
	}
	return nil
}
