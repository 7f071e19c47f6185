// Package node is the daemon on a machine that runs containers. It puts the parts together:
// clients ask the mirror (package mirror) on loopback, which answers from the store (package
// cache) and brings what is missing (package registry); each request is measured (package
// meter), spooled and reported to the server (package api), which hears from the node
// at intervals and may ask for images to be brought ahead. People and `accel` ask the
// daemon by a unix socket; on a stopped one, Offline does the same on its files.
//
// Without a server everything works but for reports and warms: pulls are kept until
// there is one.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"accel"
	"accel/api"
	"accel/cache"
	"accel/meter"
	"accel/mirror"
	"accel/registry"
	"accel/snapshot"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
)

// Options of a Node. Name, Dir and Registry are required.
type Options struct {
	Name    string // unique in the fleet
	Labels  map[string]string
	Version string
	// Dir is the node's own folder; made (mode 0700) where it is not there.
	Dir string
	// BudgetBytes and FreeFloorBytes bound the store, as in cache.Options.
	BudgetBytes, FreeFloorBytes int64
	Registry                    *registry.Client
	// DefaultRegistry and the times are the mirror's, as in mirror.Options.
	DefaultRegistry               string
	TagTTL, GrantTTL, GrantGrace  time.Duration
	AnswerPatience, StallPatience time.Duration
	// Quiet ends the measurement of a pull, MaxSpooled bounds the pulls that wait for
	// the server; zero: the meter's own defaults.
	Quiet      time.Duration
	MaxSpooled int
	// Snapshotter is how images are mounted for containerd; nil: they are not.
	Snapshotter *Snapshotter
	// Server is told of the node and of its pulls; nil: there is none.
	Server *api.Client
	// Heartbeat is how often the server is told of the node; default 30 s.
	Heartbeat time.Duration
	// Warms is how many images are brought ahead at a time; default 1. WarmForm is one of the constants, default
	// WarmAuto. WarmAll has all of an image brought that is to be mounted lazily, not only what its start reads.
	Warms    int
	WarmForm string
	WarmAll  bool
	// Drain is how long clients may go on to read after a stop was asked for; default 5 s. They
	// know to go on with a range, at the registry itself where need be.
	Drain   time.Duration
	Metrics *prometheus.Registry // default: a new one
	Log     *slog.Logger         // default: slog.Default
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Node is one daemon. It has its folder for itself.
type Node struct {
	o         Options
	startedAt time.Time
	store     *cache.Store
	spool     *meter.Spool
	meter     *meter.Meter
	mirror    *mirror.Mirror
	server    *link   // nil without a server
	mounts    *mounts // nil without a snapshotter
}

// Open takes the folder and makes all parts; nothing runs yet. The error wraps cache.ErrLocked when
// another process has the folder.
func Open(o Options) (*Node, error) {
	if o.Name == "" || o.Dir == "" || o.Registry == nil {
		return nil, fmt.Errorf("%w: a node needs a name, a folder and its registries", accel.ErrInvalid)
	}
	if o.Heartbeat <= 0 {
		o.Heartbeat = 30 * time.Second
	}
	if o.Warms <= 0 {
		o.Warms = 1
	}
	if o.Drain <= 0 {
		o.Drain = 5 * time.Second
	}
	if o.Metrics == nil {
		o.Metrics = prometheus.NewRegistry()
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	n := &Node{o: o, startedAt: o.Now()}
	if err := n.open(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Node) open() (err error) {
	o := &n.o
	if o.Dir, err = resolved(o.Dir); err != nil {
		return fmt.Errorf("node's folder: %w", err)
	}
	for _, c := range []prometheus.Collector{collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := o.Metrics.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	n.store, err = cache.Open(cache.Options{
		Dir: storeDir(o.Dir), BudgetBytes: o.BudgetBytes, FreeFloorBytes: o.FreeFloorBytes,
		VerifyLayer: n.verifyLayer, Registerer: o.Metrics, Log: o.Log, Now: o.Now,
	})
	if err != nil {
		return fmt.Errorf("node's folder %s: %w", o.Dir, err)
	}
	key, err := grantKey(o.Dir)
	if err != nil {
		return err
	}
	if n.spool, err = meter.OpenSpool(filepath.Join(o.Dir, "pulls.db"), meter.SpoolOptions{MaxPulls: o.MaxSpooled, Log: o.Log, Registerer: o.Metrics}); err != nil {
		return fmt.Errorf("spool of pulls: %w", err)
	}
	if n.meter, err = meter.New(meter.Options{Node: o.Name, Spool: n.spool, Quiet: o.Quiet, Log: o.Log, Registerer: o.Metrics, Now: o.Now}); err != nil {
		return err
	}
	n.mirror, err = mirror.New(mirror.Options{
		Store: n.store, Registry: o.Registry, Begin: n.meter.Begin, Observe: n.passed, Default: o.DefaultRegistry,
		TagTTL: o.TagTTL, GrantTTL: o.GrantTTL, GrantGrace: o.GrantGrace, Key: key,
		AnswerPatience: o.AnswerPatience, StallPatience: o.StallPatience,
		Registerer: o.Metrics, Log: o.Log, Now: o.Now,
	})
	if err != nil {
		return err
	}
	if o.Server != nil {
		if n.server, err = newLink(o.Server, o.Metrics, o.Log); err != nil {
			return err
		}
	}
	if o.Snapshotter != nil {
		if n.mounts, err = n.openMounts(context.Background()); err != nil { // nothing of it waits
			if errors.Is(err, snapshot.ErrLocked) {
				return err
			}
			o.Log.Error("containerd gets no snapshots from this node; all else goes on", "error", err)
			n.mounts = nil
		}
	}
	return nil
}

// passed sees what a client got from the mirror. Who gets an image's manifest by its digest is about to pull it, and if that is
// containerd, it asks for the first layer's snapshot next.
func (n *Node) passed(t accel.Transfer) {
	if n.mounts != nil && t.Complete && t.Tag == "" && t.Manifest != nil && t.Manifest.Config != "" {
		n.mounts.lazy.Expect(t.Repository, t.Digest)
	}
}

// resolved makes a folder, where it is not there, and gives its path without symlinks: what is mounted in it is known by that
// path (proc(5), mountinfo).
func resolved(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// storeDir is where the store is in a node's folder.
func storeDir(dir string) string { return filepath.Join(dir, "cache") }

// Listeners are where a node is asked. Mirror and Admin are required.
type Listeners struct {
	Mirror, Admin net.Listener
	Snapshotter   net.Listener // of ListenSnapshotter; nil: containerd is not served
	Beside        []Served
}

// Run serves the mirror and the admin API, and does all else, until ctx ends or something breaks.
// It may be called once; then comes Close.
func (n *Node) Run(ctx context.Context, at Listeners) error {
	g, ctx := errgroup.WithContext(ctx)
	all := append([]Served{{at.Mirror, n.mirror}, {at.Admin, n.admin(ctx)}}, at.Beside...)
	servers := make([]*http.Server, 0, len(all))
	for _, s := range all {
		servers = append(servers, n.serve(g, s))
	}
	// What fills the store and measures pulls outlives the last request.
	inner, stop := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error { return n.store.Run(inner) })
	g.Go(func() error { return n.meter.Run(inner) })
	if n.mounts != nil {
		g.Go(func() error { return n.mounts.lazy.Run(inner) })
		if at.Snapshotter != nil {
			g.Go(func() error { return n.mounts.serve(ctx, at.Snapshotter) })
		}
	}
	if n.server != nil {
		g.Go(func() error { return n.heartbeats(ctx) })
		g.Go(func() error { return n.report(ctx) })
		g.Go(func() error { return n.warms(ctx) })
	}
	g.Go(func() error {
		defer stop()
		<-ctx.Done()
		n.o.Log.Info("stopping")
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.o.Drain)
		defer cancel()
		var errs []error
		for _, s := range servers {
			if err := s.Shutdown(drain); err != nil {
				n.o.Log.Info("clients that were still reading are cut off", "error", err)
				errs = append(errs, s.Close())
			}
		}
		return errors.Join(errs...)
	})
	return g.Wait()
}

// Served is a handler and where it listens.
type Served struct {
	Listener net.Listener
	Handler  http.Handler
}

func (n *Node) serve(g *errgroup.Group, what Served) *http.Server {
	// No write time-out: a slow client may take its time over a layer.
	s := &http.Server{
		Handler: what.Handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(n.o.Log.Handler(), slog.LevelDebug),
	}
	g.Go(func() error {
		if err := s.Serve(what.Listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", what.Listener.Addr(), err)
		}
		return nil
	})
	return s
}

// Close gives the folder back. A Node that was never run may be closed too.
func (n *Node) Close() error {
	var errs []error
	if n.mounts != nil {
		errs = append(errs, n.mounts.close())
	}
	if n.spool != nil {
		errs = append(errs, n.spool.Close())
	}
	if n.store != nil {
		errs = append(errs, n.store.Close())
	}
	return errors.Join(errs...)
}

// self is what the node tells of itself.
func (n *Node) self() accel.Node {
	return accel.Node{
		Name: n.o.Name, Labels: n.o.Labels, Version: n.o.Version, StartedAt: n.startedAt,
		Cache: n.store.Usage(), DroppedPulls: n.spool.Dropped(),
	}
}

// fetch brings an image's blobs; see mirror.Warm.
func (n *Node) fetch(ctx context.Context, image string, progress func(fetched, total int64)) (digest.Digest, error) {
	_, d, err := n.mirror.Warm(ctx, image, "", progress)
	return d, err
}
