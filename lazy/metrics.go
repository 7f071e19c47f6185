package lazy

import (
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics of lazy mounts; what fills them has its own.
type metrics struct {
	images       *prometheus.CounterVec
	refused      prometheus.Counter
	liars        prometheus.Counter
	holderDeaths prometheus.Counter

	profiles     *prometheus.CounterVec
	profileBytes *prometheus.CounterVec
	starts       *prometheus.CounterVec
	startMisses  prometheus.Histogram
	bundles      *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer, l *Lazy) (*metrics, error) {
	m := &metrics{
		images:       prometheus.NewCounterVec(prometheus.CounterOpts{Name: "accel_lazy_images_total", Help: "Images that were looked at, by how they can be mounted."}, []string{"answer"}),
		refused:      prometheus.NewCounter(prometheus.CounterOpts{Name: "accel_lazy_refused_mappings_total", Help: "Mappings that no trusted key signed for the manifest that they were found with."}),
		liars:        prometheus.NewCounter(prometheus.CounterOpts{Name: "accel_lazy_false_diff_ids_total", Help: "Images whose config claims another DiffID than a layer of theirs has; their snapshots were set aside."}),
		holderDeaths: prometheus.NewCounter(prometheus.CounterOpts{Name: "accel_lazy_holder_deaths_total", Help: "Holder processes that ended with mounts of theirs in use."}),
	}
	m.profiles = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "accel_lazy_profile_waves_total", Help: "Images of which was fetched ahead what their start reads, by where the profile was found."}, []string{"from"})
	m.profileBytes = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "accel_lazy_profile_bytes_total", Help: "Content that was fetched ahead by profiles: planned; and of that, when a start was recorded, used or vain."}, []string{"what"})
	m.starts = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "accel_lazy_profile_starts_total", Help: "Starts that were recorded: complete, incomplete, or lost."}, []string{"result"})
	m.startMisses = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "accel_lazy_profile_start_misses", Help: "Reads that had to wait during a recorded start that something was fetched ahead of.", Buckets: prometheus.ExponentialBuckets(1, 2, 12)})
	m.bundles = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "accel_lazy_bundles_total", Help: "Boot bundles that were fetched: ok, failed (the rest came by ranges) or canceled."}, []string{"result"})
	for _, result := range []string{"ok", "failed", "canceled"} {
		m.bundles.WithLabelValues(result)
	}
	for _, from := range []string{fromNode, fromServer, fromRegistry} {
		m.profiles.WithLabelValues(from)
	}
	for _, what := range []string{"planned", "used", "vain"} {
		m.profileBytes.WithLabelValues(what)
	}
	for _, result := range []string{"complete", "incomplete", "lost"} {
		m.starts.WithLabelValues(result)
	}
	for _, answer := range []string{"mapping", "stargz", "declined", "error"} {
		m.images.WithLabelValues(answer)
	}
	if r == nil {
		return m, nil
	}
	layers := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "accel_lazy_open_layers", Help: "Layers that are mounted or about to be."}, func() float64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return float64(len(l.open))
	})
	for _, c := range []prometheus.Collector{m.images, m.refused, m.liars, m.holderDeaths, m.profiles, m.profileBytes, m.starts, m.startMisses, m.bundles, layers} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// count notes how an image was answered for.
func (m *metrics) count(img *image, err error) {
	var no *Declined
	switch {
	case errors.As(err, &no):
		m.images.WithLabelValues("declined").Inc()
	case err != nil:
		m.images.WithLabelValues("error").Inc()
	case img.layers[0].origin.Signed:
		m.images.WithLabelValues("mapping").Inc()
	default:
		m.images.WithLabelValues("stargz").Inc()
	}
}

// planned counts what is fetched ahead by a profile.
func (m *metrics) planned(w *wave) {
	m.profiles.WithLabelValues(w.From).Inc()
	m.profileBytes.WithLabelValues("planned").Add(float64(w.PlannedBytes))
}

// ended counts what that was worth.
func (m *metrics) ended(a Ahead) {
	m.profileBytes.WithLabelValues("used").Add(float64(a.UsedBytes))
	m.profileBytes.WithLabelValues("vain").Add(float64(a.VainBytes))
}

// recorded counts a start.
func (m *metrics) recorded(s Start) {
	result := "incomplete"
	switch {
	case s.Problem != "":
		result = "lost"
	case s.Complete:
		result = "complete"
	}
	m.starts.WithLabelValues(result).Inc()
	if s.Ahead != nil {
		m.startMisses.Observe(float64(s.Misses))
	}
}

// holderDied is told by the host. Containers that run get I/O errors for what they read from then on; those to
// come are mounted anew.
func (l *Lazy) holderDied(layers []digest.Digest) {
	l.metrics.holderDeaths.Inc()
	l.o.Log.Error("the process that serves lazy mounts has died: running containers get I/O errors for what they had not read; new ones are not affected", "layers", len(layers))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.diedAt = time.Now()
	if ctx := l.running; ctx != nil && ctx.Err() == nil && l.o.Remount != nil {
		l.work.Go(func() {
			if err := l.o.Remount(ctx, layers); err != nil && ctx.Err() == nil {
				l.o.Log.Error("layers could not be mounted anew; they are tried again when a container asks for them", "error", err)
			}
		})
	}
}

// HolderDiedAt is when, of this daemon, the process that serves lazy mounts died last; zero: it has not.
func (l *Lazy) HolderDiedAt() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.diedAt
}
