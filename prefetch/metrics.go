package prefetch

import (
	"time"

	"accel/internal/collectors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	bytes     *prometheus.CounterVec
	misses    *prometheus.CounterVec
	wait      prometheus.Histogram
	corrupt   prometheus.Counter
	stalls    prometheus.Counter
	retries   prometheus.Counter
	overtakes prometheus.Counter

	fetched, copies, skipped [kinds]prometheus.Counter // of bytes
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_fill_bytes_total",
			Help: "Bytes that filled lazily loaded layers, by who wanted them (demand, hot, background) and where they came from " +
				"(registry: compressed; copy: content that another layer had; skipped: from the registry and there already).",
		}, []string{"kind", "source"}),
		misses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_fill_misses_total",
			Help: "Reads that had to wait for content, by result (ok, error, canceled).",
		}, []string{"result"}),
		wait: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "accel_fill_wait_seconds",
			Help:    "Time that a read waited for missing content.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 17),
		}),
		corrupt:   counter("accel_fill_corrupt_chunks_total", "Chunks that came with content that does not match their digest."),
		stalls:    counter("accel_fill_stalls_total", "Requests that were given up because they brought nothing for too long."),
		retries:   counter("accel_fill_retries_total", "Attempts to bring content after a failed one."),
		overtakes: counter("accel_fill_overtakes_total", "Requests for what another one would have brought too late."),
	}
	for k := range kinds {
		m.fetched[k] = m.bytes.WithLabelValues(k.String(), "registry")
		m.copies[k] = m.bytes.WithLabelValues(k.String(), "copy")
		m.skipped[k] = m.bytes.WithLabelValues(k.String(), "skipped")
	}
	_, err := collectors.Register(r, m.bytes, m.misses, m.wait, m.corrupt, m.stalls, m.retries, m.overtakes)
	return m, err
}

func (m *metrics) copied(k kind, bytes int64) { m.copies[k].Add(float64(bytes)) }

func (m *metrics) missed(result string, waited time.Duration) {
	m.misses.WithLabelValues(result).Inc()
	m.wait.Observe(waited.Seconds())
}
