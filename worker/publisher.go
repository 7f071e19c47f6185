package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
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
	"golang.org/x/sync/errgroup"
)

const (
	// publishLimit bounds one publication: a few small requests for each place, and the making of boot bundles, for
	// which all that is hot is read and packed.
	publishLimit = 10 * time.Minute
	// publishers is how many are published at a time, publishersOfHost how many of them in one registry: a slow one
	// does not hold the others up.
	publishers       = 8
	publishersOfHost = 2
	// A registry that does not answer is left alone for minRest, and for twice as long each time, up to maxRest.
	minRest, maxRest = 15 * time.Second, 15 * time.Minute
	// The ledger is asked again after minStorePause, and twice that each time; what was done is told to it at most
	// maxStoreTries times.
	minStorePause, maxStorePause = time.Second, time.Minute
	maxStoreTries                = 10
	// maxDoomed bounds the former profiles that one publication deletes: anybody may have attached some.
	maxDoomed = 64
)

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
	bundling  chan struct{} // a bundle is made: one at a time, as it takes memory and a processor

	mu    sync.Mutex
	hosts map[string]*publishedHost // those that are written to, or left alone
}

// publishedHost is a registry.
type publishedHost struct {
	busy  int // publications that are under way
	rest  time.Duration
	until time.Time // of the rest
}

// NewPublisher starts nothing; see Run.
func NewPublisher(o PublisherOptions) (*Publisher, error) {
	p := &Publisher{o: o, hosts: map[string]*publishedHost{}, bundling: make(chan struct{}, 1), published: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "accel_profile_publications_total", Help: "Profiles that were published in registries, by result (ok, removed, error; store_error: the file of profiles could not be read or written).",
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

// Run publishes what is due, several at a time, until ctx ends. It returns nil then. Whatever breaks is said in the log, counted
// and tried again.
func (p *Publisher) Run(ctx context.Context) error {
	var work errgroup.Group
	defer work.Wait() //nolint:errcheck // none returns one
	work.SetLimit(publishers)
	for pause := minStorePause; ; {
		next, err := p.o.Profiles.NextPublication(ctx, p.may)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		if err != nil {
			p.storeFailed("cannot find the next profile to publish; tried again", err)
			sleep(ctx, pause)
			pause = min(2*pause, maxStorePause)
			continue
		}
		pause = minStorePause
		p.begin(next)
		work.Go(func() error {
			defer p.end(next)
			p.one(ctx, next)
			return nil
		})
	}
}

func (p *Publisher) storeFailed(what string, err error) {
	p.published.WithLabelValues("store_error").Inc()
	p.o.Log.Error(what, "error", err)
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// may says whether a place's registries can be asked now.
func (p *Publisher) may(at ledger.Image) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range []string{hostOf(at.Repository), hostOf(at.Target)} {
		if h := p.hosts[name]; h != nil && (h.busy >= publishersOfHost || time.Now().Before(h.until)) {
			return false
		}
	}
	return true
}

func hostOf(repository string) string {
	host, _, _ := strings.Cut(repository, "/")
	return host
}

// hostsOf are the registries of all places, each once.
func hostsOf(next ledger.Publication) (hosts []string) {
	for _, at := range next.Places {
		for _, h := range []string{hostOf(at.Repository), hostOf(at.Target)} {
			if !slices.Contains(hosts, h) {
				hosts = append(hosts, h)
			}
		}
	}
	return hosts
}

func (p *Publisher) begin(next ledger.Publication) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range hostsOf(next) {
		if p.hosts[name] == nil {
			p.hosts[name] = &publishedHost{}
		}
		p.hosts[name].busy++
	}
}

func (p *Publisher) end(next ledger.Publication) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range hostsOf(next) {
		if h := p.hosts[name]; h != nil {
			if h.busy--; h.busy == 0 && h.rest == 0 {
				delete(p.hosts, name)
			}
		}
	}
}

// answered notes whether a registry was there.
func (p *Publisher) answered(host string, yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.hosts[host]
	switch {
	case h == nil: // never: it is busy
	case yes:
		h.rest, h.until = 0, time.Time{}
	case !time.Now().Before(h.until): // one that failed beside another is no second failure
		h.rest = min(max(2*h.rest, minRest), maxRest)
		h.until = time.Now().Add(h.rest)
	}
}

// one publishes in all places. A registry's error puts the publication off.
func (p *Publisher) one(ctx context.Context, next ledger.Publication) {
	limited, cancel := context.WithTimeout(ctx, publishLimit)
	defer cancel()
	var errs []error
	made := bundles{}
	for n := range next.Places {
		host, err := p.place(limited, &next, &next.Places[n], made)
		if ctx.Err() != nil {
			return
		}
		p.answered(host, err == nil || errors.Is(err, errUnready) || (limited.Err() == nil && !registry.Unreachable(err)))
		if err != nil {
			errs = append(errs, err)
		}
	}
	settle := p.o.Profiles.Published
	switch err := errors.Join(errs...); {
	case errors.Is(err, errUnready):
		p.o.Log.Debug("an image's profile is published later", "manifest", next.Manifest, "reason", err)
		settle = p.o.Profiles.PublicationFailed
	case err != nil:
		p.published.WithLabelValues("error").Inc()
		p.o.Log.Warn("cannot publish an image's profile; tried again later", "manifest", next.Manifest, "error", err)
		settle = p.o.Profiles.PublicationFailed
	case next.Profile == nil:
		p.published.WithLabelValues("removed").Inc()
	default:
		p.published.WithLabelValues("ok").Inc()
	}
	p.settle(ctx, next, settle)
}

// settle tells the ledger how it went. Until that knows, nobody publishes the same again.
func (p *Publisher) settle(ctx context.Context, next ledger.Publication, tell func(context.Context, ledger.Publication) error) {
	pause := minStorePause
	for range maxStoreTries {
		err := tell(ctx, next)
		if err == nil || ctx.Err() != nil {
			return
		}
		p.storeFailed("cannot keep how a profile was published; tried again", err)
		sleep(ctx, pause)
		pause = min(2*pause, maxStorePause)
	}
	p.o.Log.Error("it is not kept how a profile was published; its image's profiles are not published until the service is started again", "manifest", next.Manifest)
}

// place publishes in one place, and takes away what is there of older profiles. The new one
// is there before the old one goes. host is the registry that was asked last.
func (p *Publisher) place(ctx context.Context, next *ledger.Publication, at *ledger.Place, made bundles) (host string, err error) {
	if next.Profile != nil {
		subject, err := p.o.Registry.Head(ctx, at.Repository, next.Manifest.String())
		if errors.Is(err, accel.ErrNotFound) || errors.Is(err, accel.ErrRegistryNotAllowed) {
			at.Gone = true
			return hostOf(at.Repository), nil
		}
		if err != nil {
			return hostOf(at.Repository), fmt.Errorf("look at %s@%s: %w", at.Repository, next.Manifest, err)
		}
		form, err := p.form(ctx, at, *next.Profile, made)
		if err != nil {
			return hostOf(at.Repository), err
		}
		d, err := p.attach(ctx, at.Target, v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}, form)
		if err != nil {
			return hostOf(at.Target), fmt.Errorf("attach the profile of %s in %s: %w", next.Manifest, at.Target, err)
		}
		if at.Artifact != "" && at.Artifact != d {
			at.Stale = append(slices.Clone(at.Stale), at.Artifact)
		}
		at.Artifact = d
	} else if at.Artifact != "" {
		at.Stale, at.Artifact = append(slices.Clone(at.Stale), at.Artifact), ""
	}
	return hostOf(at.Target), p.clear(ctx, next.Manifest, at)
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
	for _, d := range list[:min(len(list), maxDoomed)] {
		doomed = append(doomed, digest.Digest(d.Digest.String()))
	}
	slices.Sort(doomed)
	at.Stale = nil
	for _, d := range slices.Compact(doomed) {
		if d == at.Artifact {
			continue
		}
		err := p.o.Registry.DeleteReferrer(ctx, at.Target, manifest, accel.MediaTypeProfile, d)
		switch {
		case err == nil:
		case errors.Is(err, accel.ErrConflict):
			p.o.Log.Warn("the registry lists something else as an image's profile; it is left alone", "artifact", at.Target+"@"+d.String(), "error", err)
		case ctx.Err() != nil || registry.Unreachable(err):
			return fmt.Errorf("delete the former profile %s@%s: %w", at.Target, d, err)
		default:
			p.o.Log.Info("the registry does not delete a former profile; nodes take the best of several", "artifact", at.Target+"@"+d.String(), "error", err)
			at.Stale = append(at.Stale, d)
		}
	}
	return nil
}
