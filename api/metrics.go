package api

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"accel"
	"accel/readiness"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	intake   *prometheus.CounterVec
	requests *prometheus.HistogramVec
}

func newMetrics(r *prometheus.Registry, tracker *readiness.Tracker, log *slog.Logger) (*metrics, error) {
	m := &metrics{
		intake: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_intake_events_total",
			Help: "Webhook deliveries by source and result (accepted, ignored, malformed, refused, error).",
		}, []string{"source", "result"}),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "accel_http_request_seconds",
			Help:    "Time of HTTP requests by route and status.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60},
		}, []string{"route", "status"}),
	}
	for _, c := range []prometheus.Collector{m.intake, m.requests, &queueCollector{tracker: tracker, log: log}} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// request measures one; a route is its pattern, so that labels stay few.
func (m *metrics) request(r *http.Request, status int, took time.Duration) {
	route := r.Pattern
	if route == "" {
		route = "none"
	}
	if status == 0 {
		status = http.StatusOK
	}
	m.requests.WithLabelValues(route, strconv.Itoa(status)).Observe(took.Seconds())
}

var (
	depthDesc = prometheus.NewDesc("accel_images", "Images by state.", []string{"state"}, nil)
	ageDesc   = prometheus.NewDesc("accel_images_oldest_seconds", "Age of the oldest image in each state.", []string{"state"}, nil)
)

// scrapeTimeout bounds how long a scrape waits for the store.
const scrapeTimeout = 5 * time.Second

// queueCollector asks the tracker at scrape time, so that there is no second
// count that could disagree with the records.
type queueCollector struct {
	tracker *readiness.Tracker
	log     *slog.Logger
}

func (c *queueCollector) Describe(ch chan<- *prometheus.Desc) { ch <- depthDesc; ch <- ageDesc }

func (c *queueCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	counts, err := c.tracker.Counts(ctx)
	if err != nil {
		c.log.Error("cannot count images for metrics", "error", err)
		return
	}
	for _, s := range accel.States {
		n := counts[s]
		ch <- prometheus.MustNewConstMetric(depthDesc, prometheus.GaugeValue, float64(n.Count), string(s))
		age := 0.0
		if n.Count > 0 && !n.Oldest.IsZero() {
			age = max(0, time.Since(n.Oldest).Seconds())
		}
		ch <- prometheus.MustNewConstMetric(ageDesc, prometheus.GaugeValue, age, string(s))
	}
}
