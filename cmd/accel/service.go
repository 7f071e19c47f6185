package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"accel"
	"accel/api"
	"accel/convert"
	"accel/readiness"
	"accel/readiness/boltstore"
	"accel/registry"
	"accel/trust"
	"accel/webhook"
	"accel/worker"

	"github.com/prometheus/client_golang/prometheus"
)

// service is what up and serve have in common. It is made in two steps, because
// up must listen, to know its own addresses, before the second; and before it
// listens it must know that the data directory is its own.
type service struct {
	*settings
	log     *slog.Logger
	store   *boltstore.Store
	keys    *trust.Keyring
	tracker *readiness.Tracker

	client      *registry.Client
	worker      *worker.Worker
	reconcilers []*worker.Reconciler
	handler     http.Handler
	draining    context.Context // done when the service is about to stop
	drain       context.CancelFunc
}

// openService takes the data directory. The caller closes the service.
func openService(ctx context.Context, s *settings, log *slog.Logger) (*service, error) {
	store, err := boltstore.Open(s.storeFile())
	if errors.Is(err, boltstore.ErrLocked) {
		return nil, fmt.Errorf("data directory %s is in use by another accel process; stop that one, or take another directory with --data", s.Data)
	}
	if err != nil {
		return nil, fmt.Errorf("open data directory %s: %w", s.Data, err)
	}
	v := &service{settings: s, log: log, store: store}
	v.draining, v.drain = context.WithCancel(context.WithoutCancel(ctx))
	if err := v.openRest(ctx); err != nil {
		v.close()
		return nil, err
	}
	return v, nil
}

func (v *service) openRest(ctx context.Context) (err error) {
	if err := v.prepareTempDir(); err != nil {
		return err
	}
	if v.keys, err = trust.CreateKeyring(v.keysDir()); err != nil {
		return fmt.Errorf("keys in %s: %w", v.keysDir(), err)
	}
	r := v.Readiness
	v.tracker = readiness.New(v.store, readiness.Options{
		Params: v.params().Fingerprint(), LeaseTime: r.Lease, ChildHold: r.ChildHold, CheckInterval: r.CheckInterval,
		MaxAttempts: r.MaxAttempts, BackoffMin: r.BackoffMin, BackoffMax: r.BackoffMax,
	})
	// The store is ours alone: whoever held a lease is dead.
	n, err := v.tracker.ExpireLeases(ctx)
	if err != nil {
		return fmt.Errorf("take up the work of the last run: %w", err)
	}
	if n > 0 {
		v.log.Info("taking up what the last run left unfinished", "images", n)
	}
	return nil
}

// prepareTempDir makes the default one and empties it of what a crash left.
func (v *service) prepareTempDir() error {
	dir := v.tempDir()
	if v.Convert.TempDir == "" {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("empty the directory for temporary files: %w", err)
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make the directory for temporary files: %w", err)
		}
	}
	return nil
}

func (v *service) params() convert.Params {
	p := convert.DefaultParams()
	p.ChunkBytes, p.Level = int64(v.Convert.ChunkBytes), v.Convert.Level
	return p
}

// lifecycle is worker's in the API's terms.
type lifecycle struct{ worker.Lifecycle }

func (l lifecycle) GC(ctx context.Context, dryRun bool) ([]api.Orphan, error) {
	found, err := l.Lifecycle.GC(ctx, dryRun)
	out := make([]api.Orphan, 0, len(found))
	for _, o := range found {
		out = append(out, api.Orphan(o))
	}
	return out, err
}

// own is what a service brings along beside its configuration: up's embedded
// registry.
type own struct {
	hosts       []registry.Host
	webhooks    []*webhook.Source
	reconcilers []worker.ReconcileOptions // Tracker, Registry and Log are filled in
}

// assemble makes all parts; it starts none.
func (v *service) assemble(o own) (err error) {
	v.client, err = registry.New(registry.Options{Hosts: append(o.hosts, v.hosts...), Keychain: registry.DefaultKeychain()})
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	if v.worker, err = v.newWorker(metrics); err != nil {
		return err
	}
	if r := v.Reconcile; len(r.Repositories) > 0 {
		o.reconcilers = append(o.reconcilers, worker.ReconcileOptions{Repositories: r.Repositories, Interval: r.Interval})
	}
	for _, r := range o.reconcilers {
		for _, pattern := range r.Repositories {
			host, _, _ := strings.Cut(pattern, "/")
			if _, err := v.client.Canonical(host); err != nil {
				return withCode(exitUsage, fmt.Errorf("reconcile.repositories %q: %w", pattern, err))
			}
		}
		r.Tracker, r.Registry, r.Log = v.tracker, v.client, v.log
		v.reconcilers = append(v.reconcilers, worker.NewReconciler(r))
	}
	v.handler, err = api.New(api.Options{
		Tracker: v.tracker, Webhooks: append(o.webhooks, v.webhooks...), Canonical: v.client.Canonical, Keys: v.keys,
		Lifecycle: lifecycle{worker.Lifecycle{Tracker: v.tracker, Registry: v.client}},
		Tokens:    v.tokens, Open: len(v.tokens) == 0, Ready: storeReady(v.tracker), Draining: v.draining,
		Metrics: metrics, Version: thisBuild().Version, Log: v.log,
	})
	return err
}

func (v *service) newWorker(metrics prometheus.Registerer) (*worker.Worker, error) {
	return worker.New(worker.Options{
		Tracker: v.tracker, Registry: v.client, Keys: v.keys,
		Converter: &convert.Converter{
			Params:  v.params(),
			Policy:  convert.Policy{Platforms: v.Policy.Platforms, MaxUncompressedBytes: int64(v.Policy.MaxUncompressedBytes)},
			TempDir: v.tempDir(), Workers: v.Convert.Workers, Log: v.log,
		},
		Target:       worker.Target{Repository: v.Target.Repository, Tag: v.Target.Tag},
		Repositories: worker.RepositoryPolicy{Allow: v.Policy.Allow, Deny: v.Policy.Deny},
		Verify:       worker.VerifyMode(v.Verify), Concurrency: v.Convert.Concurrency, LeaseTime: v.Readiness.Lease,
		DeleteTargets: v.SourceDeleted == sourceDeleteTarget, Log: v.log, Registerer: metrics,
	})
}

func (v *service) close() {
	v.drain()
	if v.client != nil {
		v.client.Close()
	}
	if err := v.store.Close(); err != nil {
		v.log.Error("cannot close the store", "file", filepath.Clean(v.storeFile()), "error", err)
	}
}

// reachable turns a listening address into one that this machine can call.
func reachable(l net.Listener) string {
	host, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return l.Addr().String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
		if _, v6, _ := net.ParseCIDR(ip.String() + "/128"); v6 != nil && ip.To4() == nil && !listensOnIPv4(l) {
			host = "::1"
		}
	}
	return net.JoinHostPort(host, port)
}

var _ api.Lifecycle = lifecycle{}
var _ = accel.ErrInvalid
