package snapshot

import (
	"accel/internal/collectors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	unregister func() // those of the gauges ask the snapshotter

	answers  *prometheus.CounterVec
	declined *prometheus.CounterVec
	took     prometheus.Histogram
	mounts   prometheus.Histogram
}

func newMetrics(r prometheus.Registerer, s *Snapshotter) (*metrics, error) {
	m := &metrics{
		answers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_snapshot_layers_total",
			Help: "Layers that containerd asked for, by the answer (mounted, shared: mounted before, declined: containerd downloads it).",
		}, []string{"answer"}),
		declined: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_snapshot_declined_total",
			Help: "Layers that containerd downloads, by why (image, labels, timeout, error, mount, conflict).",
		}, []string{"cause"}),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "accel_snapshot_answer_seconds",
			Help:    "Time until containerd was told whether a layer is there.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
		mounts: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "accel_snapshot_mount_seconds",
			Help:    "Time to mount a layer.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}),
	}
	all := []prometheus.Collector{
		m.answers, m.declined, m.took, m.mounts,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "accel_snapshot_lazy", Help: "Layers that are mounted lazily.",
		}, func() float64 { return float64(len(s.Lazy())) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "accel_snapshot_bad", Help: "Lazy snapshots on which no container can start.",
		}, func() float64 { return float64(len(s.Bad())) }),
	}
	var err error
	m.unregister, err = collectors.Register(r, all...)
	return m, err
}

func (m *metrics) answered(e Event) {
	m.answers.WithLabelValues(string(e.Kind)).Inc()
	m.took.Observe(e.Took.Seconds())
	if e.Kind == KindDeclined {
		m.declined.WithLabelValues(e.Cause).Inc()
	}
}
