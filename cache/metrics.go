package cache

import (
	"errors"
	"time"

	"accel"
	"accel/internal/collectors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	unregister func() // those of the gauges ask the store

	reads       *prometheus.CounterVec
	fetched     *prometheus.CounterVec
	fills       *prometheus.CounterVec
	dropped     *prometheus.CounterVec
	layers      *prometheus.CounterVec
	wrongChunks prometheus.Counter
	evictions   prometheus.Counter
	evictedSize prometheus.Counter
	passed      prometheus.Counter
	commits     prometheus.Histogram

	// of fetched, whose labels are looked up for each read of a stream otherwise
	fromRegistry, fromPeer prometheus.Counter
}

func newMetrics(r prometheus.Registerer, s *Store) (*metrics, error) {
	m := &metrics{
		reads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_cache_read_bytes_total",
			Help: "Bytes given to readers, by where they came from (cache, registry, peer, shared: fetched for another reader just then).",
		}, []string{"from"}),
		fetched: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_cache_fetched_bytes_total",
			Help: "Bytes that were fetched, by where they came from (registry, peer).",
		}, []string{"from"}),
		fills: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_cache_fills_total",
			Help: "Fills that ended, by how (done, no_space, digest, idle, local, fetch).",
		}, []string{"result"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_cache_dropped_blobs_total",
			Help: "Blobs that were dropped because something was wrong with them, by what (digest, damaged).",
		}, []string{"reason"}),
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_cache_removed_layers_total",
			Help: "Layers that went, by why (evicted, damaged).",
		}, []string{"reason"}),
		wrongChunks: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_cache_wrong_chunks_total",
			Help: "Chunks of layers that were not as they had been written.",
		}),
		evictions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_cache_evicted_blobs_total",
			Help: "Blobs that were evicted to make room.",
		}),
		evictedSize: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_cache_evicted_bytes_total",
			Help: "Bytes on disk that eviction of blobs and layers gave back.",
		}),
		passed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_cache_uncached_reads_total",
			Help: "Readers that were served without caching: no room, or a failing disk.",
		}),
		commits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "accel_cache_commit_seconds",
			Help:    "Time to sync what was written and to mark it in the index.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
	}
	m.fromRegistry, m.fromPeer = m.fetched.WithLabelValues("registry"), m.fetched.WithLabelValues("peer")
	gauge := func(name, help string, of func(accel.CacheUsage) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return of(s.Usage()) })
	}
	all := []prometheus.Collector{
		m.reads, m.fetched, m.fills, m.dropped, m.layers, m.wrongChunks, m.evictions, m.evictedSize, m.passed, m.commits,
		gauge("accel_cache_used_bytes", "Bytes that the cache takes on disk.", func(u accel.CacheUsage) float64 { return float64(u.UsedBytes) }),
		gauge("accel_cache_budget_bytes", "Bytes that the cache may take; 0: not bounded.", func(u accel.CacheUsage) float64 { return float64(u.BudgetBytes) }),
		gauge("accel_cache_pinned_bytes", "Bytes on disk that may not be evicted.", func(u accel.CacheUsage) float64 { return float64(u.PinnedBytes) }),
		gauge("accel_cache_blobs", "Blobs in the cache.", func(u accel.CacheUsage) float64 { return float64(u.Blobs) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "accel_cache_layers", Help: "Layers that are kept inflated in the cache."}, func() float64 { return float64(s.held().layers) }),
	}
	var err error
	m.unregister, err = collectors.Register(r, all...)
	return m, err
}

func (m *metrics) filled(n int, peer bool) {
	if peer {
		m.fromPeer.Add(float64(n))
	} else {
		m.fromRegistry.Add(float64(n))
	}
}

func (m *metrics) read(t accel.Tally) {
	for from, n := range map[string]int64{"cache": t.CacheBytes, "registry": t.RegistryBytes, "peer": t.PeerBytes, "shared": t.SharedBytes} {
		m.reads.WithLabelValues(from).Add(float64(n))
	}
}

func (m *metrics) fillEnded(f *fill) {
	var local localError
	result := "fetch"
	switch {
	case f.err == nil:
		result = "done"
	case f.idled:
		result = "idle"
	case errors.Is(f.err, ErrNoSpace):
		result = "no_space"
	case errors.Is(f.err, ErrDigest):
		result = "digest"
	case errors.As(f.err, &local):
		result = "local"
	}
	m.fills.WithLabelValues(result).Inc()
}

func (m *metrics) lost(i *item, why error) {
	if i.layer != nil {
		m.layers.WithLabelValues("damaged").Inc()
		return
	}
	reason := "damaged"
	if errors.Is(why, ErrDigest) {
		reason = "digest"
	}
	m.dropped.WithLabelValues(reason).Inc()
}

func (m *metrics) evicted(i *item) {
	m.evictedSize.Add(float64(i.allocated))
	if i.layer != nil {
		m.layers.WithLabelValues("evicted").Inc()
		return
	}
	m.evictions.Inc()
}

// committed times a commit from the call to the call of what it returns.
func (m *metrics) committed() func() {
	began := time.Now()
	return func() { m.commits.Observe(time.Since(began).Seconds()) }
}
