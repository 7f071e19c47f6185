package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"accel"
	"accel/api"
	"accel/convert"
	"accel/fleet"
	"accel/meter"
	"accel/profile/ledger"
	"accel/readiness"
	"accel/readiness/boltstore"
	"accel/registry"
	"accel/trust"
	"accel/webhook"
	"accel/worker"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

// drainTime is how long running requests may take after a stop was asked for.
const drainTime = 20 * time.Second

// service is the wiring that `up` and `serve` share. It is made in two steps:
// the data directory is taken first, before anything listens, and `up` must
// listen before it knows the name of its own registry.
type service struct {
	conf    config
	log     *slog.Logger
	store   *boltstore.Store
	tracker *readiness.Tracker
	keys    *trust.Keyring

	client     *registry.Client
	handler    http.Handler
	worker     *worker.Worker
	reconciler *worker.Reconciler
	fleet      *fleet.Fleet
	ledger     *meter.Ledger
	profiles   *ledger.Ledger
	publisher  *worker.Publisher
	drain      context.CancelFunc
}

func newLogger(c logConfig, out io.Writer) *slog.Logger {
	var level slog.LevelVar
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level.Set(slog.LevelInfo) // finish has said so
	}
	o := &slog.HandlerOptions{Level: &level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(out, o))
	}
	return slog.New(slog.NewTextHandler(out, o))
}

// openService takes the data directory. The caller runs or closes the service.
func openService(conf config, log *slog.Logger) (*service, error) {
	s := &service{conf: conf, log: log, drain: func() {}}
	var err error
	s.store, err = boltstore.Open(filepath.Join(conf.Data, "readiness.db"))
	if errors.Is(err, boltstore.ErrLocked) {
		return nil, fmt.Errorf("data directory %s is in use by another accel; stop that one, or choose another directory with --data", conf.Data)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", conf.Data, err)
	}
	if err := os.MkdirAll(conf.Convert.TempDir, 0o700); err != nil {
		return nil, errors.Join(err, s.store.Close())
	}
	if s.keys, err = trust.CreateKeyring(conf.Keys.Dir); err != nil {
		return nil, errors.Join(fmt.Errorf("signing keys: %w", err), s.store.Close())
	}
	return s, nil
}

// params are the conversion parameters that the configuration asks for.
func (c *config) params() convert.Params {
	return convert.Params{ChunkBytes: int64(c.Convert.ChunkSize), Level: c.Convert.Level}
}

// wire makes all parts; nothing runs yet. hosts and sources come beside the
// configuration's.
func (s *service) wire(hosts []registry.Host, sources []*webhook.Source) error {
	conf := &s.conf
	configured, err := conf.hosts()
	if err != nil {
		return usage(err)
	}
	senders, err := conf.sources()
	if err != nil {
		return usage(err)
	}
	tokens, err := conf.apiTokens()
	if err != nil {
		return usage(err)
	}
	if s.client, err = registry.New(registry.Options{Hosts: append(configured, hosts...), Keychain: registry.DefaultKeychain()}); err != nil {
		return usage(err)
	}
	s.tracker = readiness.New(s.store, readiness.Options{
		Params: conf.params().Fingerprint(), LeaseTime: conf.Readiness.Lease, ChildHold: conf.Readiness.ChildHold, CheckInterval: conf.Readiness.CheckInterval,
		MaxAttempts: conf.Readiness.MaxAttempts, BackoffMin: conf.Readiness.BackoffMin, BackoffMax: conf.Readiness.BackoffMax,
	})
	metrics := prometheus.NewRegistry()
	if s.profiles, err = ledger.Open(filepath.Join(conf.Data, "profiles.db"), conf.profilesOptions(metrics, s.log)); err != nil {
		return err
	}
	if s.publisher, err = worker.NewPublisher(worker.PublisherOptions{
		Profiles: s.profiles, Registry: s.client, Tracker: s.tracker, Keys: s.keys, BundleBytes: int64(conf.Profiles.Bundle), Log: s.log, Registerer: metrics,
	}); err != nil {
		return err
	}
	s.worker, err = worker.New(worker.Options{
		Tracker: s.tracker, Registry: s.client, Keys: s.keys, Log: s.log, Registerer: metrics,
		Converter: &convert.Converter{
			Params: conf.params(), TempDir: conf.Convert.TempDir, Workers: conf.Convert.Workers, Log: s.log,
			Policy: convert.Policy{Platforms: conf.Policy.Platforms, MaxUncompressedBytes: int64(conf.Policy.MaxUncompressedSize)},
		},
		Target:       worker.Target{Repository: conf.Target.Repository, Tag: conf.Target.Tag},
		Repositories: worker.RepositoryPolicy{Allow: conf.Policy.Allow, Deny: conf.Policy.Deny},
		Verify:       worker.VerifyMode(conf.Verify), Concurrency: conf.Convert.Concurrency, LeaseTime: conf.Readiness.Lease,
		DeleteTargets: conf.SourceDeleted == "delete-target", Profiles: s.profiles, SkipPrediction: !conf.Profiles.Predict,
	})
	if err != nil {
		return usage(err)
	}
	s.reconciler = worker.NewReconciler(worker.ReconcileOptions{
		Tracker: s.tracker, Registry: s.client, Repositories: conf.Reconcile.Repositories, Interval: conf.Reconcile.Interval, Log: s.log,
	})
	if s.fleet, err = fleet.Open(filepath.Join(conf.Data, "fleet.db"), conf.fleetOptions(metrics, s.log)); err != nil {
		return err
	}
	if s.ledger, err = meter.OpenLedger(filepath.Join(conf.Data, "pulls.db"), conf.ledgerOptions(metrics, s.log)); err != nil {
		return err
	}
	draining, drain := context.WithCancel(context.Background())
	s.drain = drain
	s.handler, err = api.New(api.Options{
		Tracker: s.tracker, Webhooks: append(senders, sources...), Canonical: s.client.Canonical, Keys: s.keys,
		Lifecycle: lifecycle{worker.Lifecycle{Tracker: s.tracker, Registry: s.client, Profiles: s.profiles}}, Fleet: s.fleet, Ledger: s.ledger, Profiles: s.profiles, Lister: s.worker,
		Tokens: tokens, Open: len(tokens) == 0, Draining: draining, Metrics: metrics, Version: version(), Log: s.log,
	})
	return err
}

// lifecycle gives the worker's orphans to the API in its own words.
type lifecycle struct{ worker.Lifecycle }

// GC implements api.Lifecycle.
func (l lifecycle) GC(ctx context.Context, dryRun bool) ([]api.Orphan, error) {
	found, err := l.Lifecycle.GC(ctx, dryRun)
	orphans := make([]api.Orphan, 0, len(found))
	for _, o := range found {
		orphans = append(orphans, api.Orphan(o))
	}
	return orphans, err
}

func (s *service) close() error {
	s.drain()
	if s.client != nil {
		s.client.Close()
	}
	var err error
	if s.fleet != nil {
		err = s.fleet.Close()
	}
	if s.ledger != nil {
		err = errors.Join(err, s.ledger.Close())
	}
	if s.profiles != nil {
		err = errors.Join(err, s.profiles.Close())
	}
	return errors.Join(err, s.store.Close())
}

// served is a handler and where it listens.
type served struct {
	listener net.Listener
	handler  http.Handler
}

// run serves the API, and what stands beside it, until ctx ends; then it drains.
func (s *service) run(ctx context.Context, apiListener net.Listener, beside ...served) error {
	// The store is locked, so whoever held a lease is dead.
	if n, err := s.tracker.ExpireLeases(ctx); err != nil {
		return err
	} else if n > 0 {
		s.log.Info("images that a former process was converting are taken up again", "count", n)
	}
	g, gctx := errgroup.WithContext(ctx)
	var servers []*http.Server
	for _, part := range append(beside, served{apiListener, s.handler}) {
		// No write time-out: long polls, event streams and uploads take their time.
		server := &http.Server{Handler: part.handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10}
		servers = append(servers, server)
		g.Go(func() error {
			if err := server.Serve(part.listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", part.listener.Addr(), err)
			}
			return nil
		})
	}
	g.Go(func() error { return s.worker.Run(gctx) })
	g.Go(func() error { return s.reconciler.Run(gctx) })
	g.Go(func() error { return s.followStates(gctx) })
	g.Go(func() error { return s.followReady(gctx) })
	g.Go(func() error { return s.fleet.Run(gctx) })
	g.Go(func() error { return s.ledger.Run(gctx) })
	g.Go(func() error { return s.publisher.Run(gctx) })
	g.Go(func() error {
		<-gctx.Done()
		s.log.Info("stopping")
		s.drain()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		var errs []error
		for _, server := range servers {
			if err := server.Shutdown(stop); err != nil {
				errs = append(errs, fmt.Errorf("drain: %w", err), server.Close())
			}
		}
		return errors.Join(errs...)
	})
	return g.Wait()
}

// followStates logs each change of state in a line.
func (s *service) followStates(ctx context.Context) error {
	after, err := s.lastEvent(ctx)
	for err == nil {
		var evs []readiness.Event
		evs, _, err = s.tracker.NextEvents(ctx, after, 100)
		for _, e := range evs {
			after = e.Seq
			s.logEvent(e)
		}
	}
	if ctx.Err() != nil {
		return nil //nolint:nilerr // asked to stop
	}
	return err
}

// lastEvent is the number of the newest event, found page by page.
func (s *service) lastEvent(ctx context.Context) (last uint64, err error) {
	for {
		past, _, err := s.tracker.Events(ctx, last, readiness.EventsKept)
		if err != nil || len(past) == 0 {
			return last, err
		}
		last = past[len(past)-1].Seq
	}
}

func (s *service) logEvent(e readiness.Event) {
	to := string(e.To)
	if e.To == "" {
		to = "removed"
	}
	attrs := []slog.Attr{slog.String("image", e.Repository), slog.Any("tags", e.Tags), slog.String("digest", e.Digest.String())}
	if e.Reason != "" {
		attrs = append(attrs, slog.String("reason", e.Reason))
	}
	level := slog.LevelInfo
	if e.To == accel.Failed || e.To == accel.Rejected {
		level = slog.LevelWarn
	}
	s.log.LogAttrs(context.Background(), level, to, attrs...)
}
