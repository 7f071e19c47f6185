package worker

import (
	"errors"
	"fmt"
	"time"

	"accel"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	seconds *prometheus.HistogramVec
	bytes   *prometheus.CounterVec
	errors  *prometheus.CounterVec

	foretold        *prometheus.CounterVec
	foretellSeconds prometheus.Histogram
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "accel_conversion_seconds",
			Help:    "Time of finished conversions by phase (queued, convert, push, verify, total).",
			Buckets: prometheus.ExponentialBuckets(0.1, 2, 14),
		}, []string{"phase"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_conversion_bytes_total",
			Help: "Compressed layer bytes of finished conversions by side (source, target).",
		}, []string{"side"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_conversion_errors_total",
			Help: "Attempts that ended without a Ready image, by reason.",
		}, []string{"reason"}),
		foretold: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_profile_predictions_total",
			Help: "Platforms of converted images whose starts were predicted, by result (ok, late, error).",
		}, []string{"result"}),
		foretellSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "accel_profile_prediction_seconds",
			Help:    "Time to predict the start of one platform of an image.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 12),
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.seconds, m.bytes, m.errors, m.foretold, m.foretellSeconds} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) finished(res accel.Result) {
	for phase, d := range map[string]time.Duration{
		"queued": res.Queued, "convert": res.Convert, "push": res.Push, "verify": res.Verify, "total": res.Total,
	} {
		m.seconds.WithLabelValues(phase).Observe(d.Seconds())
	}
	m.bytes.WithLabelValues("source").Add(float64(res.SourceBytes))
	m.bytes.WithLabelValues("target").Add(float64(res.TargetBytes))
}

func (m *metrics) failed(err error) { m.errors.WithLabelValues(errorReason(err)).Inc() }

// errorReason sorts an error into a few label values, so that the metric's
// cardinality is bounded whatever registries answer.
func errorReason(err error) string {
	var rejection *accel.Rejection
	switch {
	case errors.As(err, &rejection):
		return "rejected"
	case errors.Is(err, accel.ErrNotFound):
		return "not_found"
	case errors.Is(err, accel.ErrUnauthenticated), errors.Is(err, accel.ErrForbidden):
		return "auth"
	case errors.Is(err, accel.ErrRegistryNotAllowed):
		return "not_allowed"
	case accel.IsPermanent(err):
		return "permanent"
	default:
		return "transient"
	}
}
