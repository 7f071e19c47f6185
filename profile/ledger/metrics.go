package ledger

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	reports  *prometheus.CounterVec
	coverage prometheus.Histogram
}

func newMetrics(r prometheus.Registerer, l *Ledger) (*metrics, error) {
	m := &metrics{
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_profile_reports_total", Help: "Reports of starts by result (counted, duplicate, refused).",
		}, []string{"result"}),
		coverage: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "accel_profile_coverage_ratio", Help: "Share of the bytes that complete starts read which the image's profile had named.",
			Buckets: []float64{.1, .25, .5, .7, .8, .9, .95, .98, .99, 1},
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.reports, m.coverage, &usageCollector{l}} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

var (
	imagesDesc = prometheus.NewDesc("accel_profile_images", "Platform manifests whose profiles are kept.", nil, nil)
	bytesDesc  = prometheus.NewDesc("accel_profile_stored_bytes", "Bytes that are kept of them.", nil, nil)
)

// scrapeTimeout bounds how long a scrape waits for the file.
const scrapeTimeout = 5 * time.Second

// usageCollector asks the file at scrape time, so that there is no second count that could
// disagree.
type usageCollector struct{ l *Ledger }

func (c *usageCollector) Describe(ch chan<- *prometheus.Desc) { ch <- imagesDesc; ch <- bytesDesc }

func (c *usageCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	u, err := c.l.Usage(ctx)
	if err != nil {
		c.l.o.Log.Error("cannot count profiles for metrics", "error", err)
		return
	}
	ch <- prometheus.MustNewConstMetric(imagesDesc, prometheus.GaugeValue, float64(u.Images))
	ch <- prometheus.MustNewConstMetric(bytesDesc, prometheus.GaugeValue, float64(u.Bytes))
}
