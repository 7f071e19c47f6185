package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"accel"
	"accel/readiness"
	"accel/registry"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// ReconcileOptions of a Reconciler. Tracker, Registry and Log are required.
type ReconcileOptions struct {
	Tracker  *readiness.Tracker
	Registry *registry.Client
	// Repositories are "host/path", or globs as in RepositoryPolicy, which are
	// matched against the host's catalog.
	Repositories []string
	// Interval between passes; default 5 min.
	Interval time.Duration
	// RequestsPerSecond bounds the load on the registries; default 20.
	RequestsPerSecond float64
	Log               *slog.Logger
}

// Reconciler finds tags whose webhook was lost, by comparing what registries
// list with what the tracker knows. Pushes by digest alone cannot be found so.
type Reconciler struct {
	ReconcileOptions
	limit *rate.Limiter
}

// NewReconciler fills in the defaults. It starts nothing; see Run.
func NewReconciler(o ReconcileOptions) *Reconciler {
	if o.Interval <= 0 {
		o.Interval = 5 * time.Minute
	}
	if o.RequestsPerSecond <= 0 {
		o.RequestsPerSecond = 20
	}
	return &Reconciler{ReconcileOptions: o, limit: rate.NewLimiter(rate.Limit(o.RequestsPerSecond), max(1, int(o.RequestsPerSecond)))}
}

// Run makes a pass at once and then every Interval, until ctx ends.
func (r *Reconciler) Run(ctx context.Context) error {
	if len(r.Repositories) == 0 {
		return nil
	}
	tick := time.NewTicker(r.Interval)
	defer tick.Stop()
	for {
		for _, pattern := range r.Repositories {
			if err := r.pass(ctx, pattern); err != nil && ctx.Err() == nil {
				r.Log.Warn("cannot reconcile; trying again at the next interval", "repositories", pattern, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (r *Reconciler) pass(ctx context.Context, pattern string) error {
	repositories := []string{pattern}
	if strings.ContainsAny(pattern, "*?[") {
		host, _, _ := strings.Cut(pattern, "/")
		paths, err := r.Registry.Catalog(ctx, host)
		if err != nil {
			return fmt.Errorf("list the repositories of %s: %w", host, err)
		}
		repositories = nil
		for _, p := range paths {
			if accel.MatchRepository(pattern, host+"/"+p) {
				repositories = append(repositories, host+"/"+p)
			}
		}
	}
	var errs []error
	for _, repository := range repositories {
		if err := r.repository(ctx, repository); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (r *Reconciler) repository(ctx context.Context, repository string) error {
	tags, err := r.Registry.Tags(ctx, repository)
	if errors.Is(err, accel.ErrNotFound) {
		return nil // deleted, or nothing pushed yet
	}
	if err != nil {
		return fmt.Errorf("list the tags of %s: %w", repository, err)
	}
	for _, tag := range tags {
		if !isTag(tag) {
			continue
		}
		if err := r.limit.Wait(ctx); err != nil {
			return err
		}
		if err := r.tag(ctx, repository, tag); err != nil {
			return err
		}
	}
	return nil
}

func (r *Reconciler) tag(ctx context.Context, repository, tag string) error {
	asked := time.Now()
	desc, err := r.Registry.Head(ctx, repository, tag)
	if errors.Is(err, accel.ErrNotFound) {
		return nil // deleted since it was listed
	}
	if err != nil {
		return fmt.Errorf("look at %s:%s: %w", repository, tag, err)
	}
	d := digest.Digest(desc.Digest.String())
	if ours, err := r.Tracker.Ours(ctx, repository, d); err != nil || ours {
		return err
	}
	holder, err := r.Tracker.Holder(ctx, repository, tag)
	if err == nil && holder.Digest == d {
		return nil
	}
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		return err
	}
	if err == nil {
		pushed, err := r.Tracker.PushedAt(ctx, repository, tag, holder.ID)
		if err != nil || time.Since(pushed) < tagSettle {
			return err // the registry may be about to move the tag; who converts the image looks at it
		}
	}
	_, err = r.Tracker.ObserveAt(ctx, asked, repository, tag, d, string(desc.MediaType))
	return err
}
