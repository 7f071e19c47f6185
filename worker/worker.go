// Package worker takes an image from its claim to Ready: it leases a due
// record from package readiness, pulls the source with package registry, has
// package convert make the eStargz form, pushes that, reads it back, moves the
// target's tags and finishes the record. Beside the claim loops it checks that
// Ready targets are still there, reconciles repositories whose webhooks were
// lost, and removes targets whose source is gone.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"accel"
	"accel/convert"
	"accel/profile/ledger"
	"accel/readiness"
	"accel/registry"
	"accel/trust"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

// Options of a Worker. Tracker, Registry, Converter, Keys and Log are required.
type Options struct {
	Tracker   *readiness.Tracker
	Registry  *registry.Client
	Converter *convert.Converter
	Keys      *trust.Keyring
	// Target says where converted images go; the zero value means
	// "{repository}" and "{tag}-esgz".
	Target Target
	// Repositories may be converted; the zero value allows all.
	Repositories RepositoryPolicy
	// Verify is how deep a pushed image is compared before it is Ready.
	Verify VerifyMode
	// Concurrency is how many images are converted at a time; default 2.
	Concurrency int
	// LeaseTime must equal the Tracker's; default 30 s. It is renewed three times
	// as often.
	LeaseTime time.Duration
	// TagSettle is how long after a push the registry may still name the tag's former digest, since some tell of a push before they
	// move the tag; 5 s where zero.
	TagSettle time.Duration
	// DeleteTargets removes the target when a check finds its source gone.
	DeleteTargets bool
	// Profiles is told of each image, and of what its starts are likely to read; nil: of none.
	Profiles *ledger.Ledger
	// SkipPrediction leaves out what is predicted: a predecessor's profile and what the image's
	// maker lists still count.
	SkipPrediction bool
	Log            *slog.Logger
	// Registerer takes the worker's metrics; nil registers none.
	Registerer prometheus.Registerer
}

// Worker converts what is due. It may be run once.
type Worker struct {
	Options
	tags    tagMover
	metrics *metrics
	// foretelling has a slot for each image that is looked into.
	foretelling chan struct{}
}

// New checks o and fills in its defaults. It starts nothing; see Run.
func New(o Options) (*Worker, error) {
	if err := o.Target.validate(); err != nil {
		return nil, err
	}
	if err := o.Repositories.validate(); err != nil {
		return nil, err
	}
	if o.Verify == "" {
		o.Verify = VerifySampled
	}
	if !o.Verify.valid() {
		return nil, fmt.Errorf("%w: verify %q: want full, sampled or digest", accel.ErrInvalid, o.Verify)
	}
	if o.Concurrency <= 0 {
		o.Concurrency = 2
	}
	if o.LeaseTime <= 0 {
		o.LeaseTime = 30 * time.Second
	}
	if o.TagSettle == 0 {
		o.TagSettle = tagSettle
	}
	metrics, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	k := &Worker{Options: o, metrics: metrics, foretelling: make(chan struct{}, maxForetells)}
	k.tags = tagMover{source: sourceTags{o.Tracker, o.Registry, o.TagSettle}, tracker: o.Tracker, registry: o.Registry, target: o.Target}
	return k, nil
}

// Run claims and checks until ctx ends; work that is under way then is given
// back, so that another worker (or this one, started again) takes it at once.
// It returns nil when ctx ended, else what broke the store.
func (k *Worker) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for range k.Concurrency {
		g.Go(func() error { return k.claimLoop(ctx) })
	}
	g.Go(func() error { return k.checkLoop(ctx) })
	return g.Wait()
}

func (k *Worker) claimLoop(ctx context.Context) error {
	for {
		w, err := k.Tracker.Claim(ctx)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				k.giveBack(ctx, w)
			}
			return nil
		case err != nil:
			return fmt.Errorf("claim the next image: %w", err)
		}
		k.work(ctx, w)
	}
}

// work takes one claimed record to its end and tells the tracker how that was.
func (k *Worker) work(ctx context.Context, w readiness.Work) {
	if w.Digest == "" {
		next, ok, err := k.resolve(ctx, w)
		if err != nil {
			k.settle(ctx, w, err)
			return
		}
		if !ok {
			return
		}
		w = next
	}
	leased, stop := k.keepLease(ctx, w)
	after := &afterwork{run: ctx}
	err := k.guard(leased, w, after)
	stop()
	if errors.Is(context.Cause(leased), accel.ErrLeaseLost) {
		err = accel.ErrLeaseLost
	}
	k.settle(ctx, w, err)
	after.do(ctx)
}

// afterwork is what process leaves to be done when the record has gone on: it does not need
// the lease.
type afterwork struct {
	run   context.Context // lasts longer than the lease
	steps []func(context.Context)
}

func (a *afterwork) add(step func(context.Context)) { a.steps = append(a.steps, step) }

// do does the steps, the last added first.
func (a *afterwork) do(ctx context.Context) {
	for n := len(a.steps) - 1; n >= 0; n-- {
		a.steps[n](ctx)
	}
}

// guard keeps a panic, for instance of a library that was given a hostile
// image, inside the attempt that caused it.
func (k *Worker) guard(ctx context.Context, w readiness.Work, after *afterwork) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error while converting %s: %v", w.Image(), p)
		}
	}()
	return k.process(ctx, w, after)
}

// settle reports an attempt's end. The report itself must not be lost to the
// end of ctx, or the record would wait for its lease to run out.
func (k *Worker) settle(ctx context.Context, w readiness.Work, err error) {
	if err == nil {
		return
	}
	log := k.Log.With("image", w.Image(), "id", w.ID)
	if errors.Is(err, accel.ErrLeaseLost) {
		log.Info("stopped: the record was superseded, deleted or taken by another worker")
		return
	}
	if ctx.Err() != nil {
		k.giveBack(ctx, w)
		return
	}
	k.metrics.failed(err)
	report, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if ferr := k.Tracker.Fail(report, w, err); ferr != nil && !errors.Is(ferr, accel.ErrLeaseLost) {
		log.Error("cannot record a failed attempt; its lease will run out", "attempt", err, "error", ferr)
	}
}

func (k *Worker) giveBack(ctx context.Context, w readiness.Work) {
	report, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := k.Tracker.Defer(report, w, 0, "the worker was stopped"); err != nil && !errors.Is(err, accel.ErrLeaseLost) {
		k.Log.Error("cannot give a record back; its lease will run out", "image", w.Image(), "error", err)
	}
}

// keepLease renews w's lease until stop is called. The context ends with
// accel.ErrLeaseLost as its cause when the lease is lost.
func (k *Worker) keepLease(ctx context.Context, w readiness.Work) (leased context.Context, stop func()) {
	leased, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(k.LeaseTime / 3)
		defer tick.Stop()
		for {
			select {
			case <-leased.Done():
				return
			case <-tick.C:
			}
			err := k.Tracker.Renew(leased, w)
			if errors.Is(err, accel.ErrLeaseLost) {
				cancel(accel.ErrLeaseLost)
				return
			}
			if err != nil && leased.Err() == nil {
				k.Log.Warn("cannot renew a lease; trying again", "image", w.Image(), "error", err)
			}
		}
	}()
	return leased, func() {
		cancel(context.Canceled)
		<-done
	}
}
