// Package api is where HTTP comes in and goes out: registries' webhooks go from
// here to package readiness, people and platforms ask here how an image stands
// and wait for it, and the Go Client for all of it is here too. The OpenAPI
// document at /openapi.json is generated from the operations below.
package api

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"

	"accel"
	"accel/fleet"
	"accel/meter"
	"accel/profile/ledger"
	"accel/readiness"
	"accel/trust"
	"accel/webhook"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Orphan is a target whose source is gone from the registry.
type Orphan struct {
	ID      string `json:"id"`
	Image   string `json:"image" doc:"the source that is gone"`
	Target  string `json:"target"`
	Reason  string `json:"reason"`
	Removed bool   `json:"removed" doc:"false in a dry run, and where error says why it did not work"`
	Error   string `json:"error,omitempty"`
}

// Lifecycle removes targets from registries; package worker does it.
type Lifecycle interface {
	DeleteTarget(ctx context.Context, rec accel.Record) error
	GC(ctx context.Context, dryRun bool) ([]Orphan, error)
}

// Options of the HTTP handler. Tracker, Canonical, Keys, Lifecycle and Log are
// required.
type Options struct {
	Tracker  *readiness.Tracker
	Webhooks []*webhook.Source
	// Canonical maps a registry's name to the one that records have, and returns
	// an accel.ErrRegistryNotAllowed for those that are not on the allowlist.
	Canonical func(host string) (string, error)
	Keys      *trust.Keyring
	Lifecycle Lifecycle
	// Fleet has the nodes and what is brought to them; nil: these routes are absent.
	Fleet *fleet.Fleet
	// Ledger has the measured pulls; nil: these routes are absent.
	Ledger *meter.Ledger
	// Profiles has what starts of images read; nil: these routes are absent.
	Profiles *ledger.Ledger
	// Lister looks up paths that are listed for a profile; nil: that route is absent.
	Lister Lister
	// Tokens that are accepted. Without any, Open must say that none is needed.
	Tokens []Token
	Open   bool
	// MaxBodyBytes bounds a request's body; default 4 MiB.
	MaxBodyBytes int64
	// Ready says whether the service can do its work, for /readyz; nil: always.
	Ready func(context.Context) error
	// Draining ends long polls and event streams early when it is done, so that a
	// server can stop quickly; nil: never.
	Draining context.Context
	Metrics  *prometheus.Registry // default: a new one
	Version  string
	Log      *slog.Logger
}

const defaultMaxBodyBytes = 4 << 20

type server struct {
	Options
	metrics *metrics
	spec    *huma.OpenAPI
}

// New returns the handler of all routes. It starts nothing.
func New(o Options) (http.Handler, error) {
	if len(o.Tokens) == 0 && !o.Open {
		return nil, fmt.Errorf("%w: no tokens are configured, so nobody could use the API; add tokens, or listen on loopback with an empty list", accel.ErrInvalid)
	}
	for _, t := range o.Tokens {
		if err := t.Validate(); err != nil {
			return nil, err
		}
	}
	if o.MaxBodyBytes <= 0 {
		o.MaxBodyBytes = defaultMaxBodyBytes
	}
	if o.Draining == nil {
		o.Draining = context.Background()
	}
	if o.Metrics == nil {
		o.Metrics = prometheus.NewRegistry()
	}
	s := &server{Options: o}
	var err error
	if s.metrics, err = newMetrics(o.Metrics, o.Tracker, o.Log); err != nil {
		return nil, err
	}
	for _, c := range []prometheus.Collector{collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := o.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	mux := http.NewServeMux()
	conf := huma.DefaultConfig("accel", o.Version)
	conf.Info.Description = "Turns pushed container images into lazily loadable ones, and says when they are ready."
	conf.DocsPath = ""     // our own page, without a script from elsewhere
	conf.CreateHooks = nil // no $schema links in answers
	conf.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		"bearer": {Type: "http", Scheme: "bearer", Description: "A token of the service's configuration, with scope read, write or node."},
	}
	routes := humago.New(mux, conf)
	routes.UseMiddleware(s.authorize(routes))
	s.spec = routes.OpenAPI()
	s.webhookRoutes(routes)
	s.readinessRoutes(routes)
	s.imageRoutes(routes)
	s.eventRoutes(routes)
	s.trustRoutes(routes)
	s.lifecycleRoutes(routes)
	if s.Fleet != nil {
		s.nodeRoutes(routes)
		s.warmRoutes(routes)
	}
	if s.Ledger != nil {
		s.pullRoutes(routes)
		s.usageRoutes(routes)
	}
	if s.Profiles != nil {
		s.profileRoutes(routes)
		if s.Lister != nil {
			s.listRoute(routes)
		}
	}

	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /docs", s.docsPage)
	mux.HandleFunc("GET /{$}", s.homePage)
	return s.outer(mux), nil
}

func (s *server) readyz(w http.ResponseWriter, r *http.Request) {
	if s.Ready != nil {
		if err := s.Ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
	}
	if s.Draining.Err() != nil {
		http.Error(w, "stopping", http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}
