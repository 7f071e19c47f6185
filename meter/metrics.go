package meter

import (
	"fmt"

	"accel"
	"accel/internal/boltfile"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
)

// pullMetrics are what both sides count of pulls, each under its own prefix.
type pullMetrics struct {
	pulls   *prometheus.CounterVec
	bytes   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

func newPullMetrics(prefix, where string) pullMetrics {
	return pullMetrics{
		pulls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "_total", Help: "Pulls " + where + " by mode and outcome.",
		}, []string{"mode", "outcome"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "_bytes_total", Help: "Layer bytes of pulls " + where + " by where they came from (registry, peer, cache).",
		}, []string{"source"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: prefix + "_seconds", Help: "Duration of pulls " + where + " by outcome.",
			Buckets: prometheus.ExponentialBuckets(0.05, 2, 14),
		}, []string{"outcome"}),
	}
}

func (m *pullMetrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.pulls, m.bytes, m.seconds}
}

func (m *pullMetrics) pull(p accel.Pull) {
	m.pulls.WithLabelValues(string(p.Mode), string(p.Outcome)).Inc()
	m.seconds.WithLabelValues(string(p.Outcome)).Observe(p.Duration.Seconds())
	m.bytes.WithLabelValues("registry").Add(float64(p.RegistryBytes))
	m.bytes.WithLabelValues("peer").Add(float64(p.PeerBytes))
	m.bytes.WithLabelValues("cache").Add(float64(p.CacheBytes))
}

func register(r prometheus.Registerer, all ...prometheus.Collector) error {
	if r == nil {
		return nil
	}
	for _, c := range all {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

type meterMetrics struct{ pullMetrics }

func newMeterMetrics(r prometheus.Registerer, m *Meter) (*meterMetrics, error) {
	mm := &meterMetrics{newPullMetrics("accel_node_pulls", "through this node")}
	underWay := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "accel_node_pulls_under_way", Help: "Pulls that are being measured.",
	}, func() float64 {
		m.mu.Lock()
		defer m.mu.Unlock()
		n := 0
		for _, t := range m.talks {
			n += len(t.pulls)
		}
		return float64(n)
	})
	return mm, register(r, append(mm.all(), underWay)...)
}

type spoolMetrics struct {
	dropped *prometheus.CounterVec
	acked   prometheus.Counter
}

func newSpoolMetrics(r prometheus.Registerer, s *Spool) (*spoolMetrics, error) {
	m := &spoolMetrics{
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_node_spool_dropped_total", Help: "Pulls that were lost, by reason (full: there was no room; refused: the server will never take them).",
		}, []string{"reason"}),
		acked: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_node_spool_reported_total", Help: "Pulls that the server has taken.",
		}),
	}
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "accel_node_spool_pulls", Help: "Pulls that wait for the server.",
	}, func() float64 { return float64(s.Len()) })
	return m, register(r, m.dropped, m.acked, waiting)
}

type ledgerMetrics struct {
	pullMetrics
	results *prometheus.CounterVec
	pruned  prometheus.Counter
}

func newLedgerMetrics(r prometheus.Registerer, l *Ledger) (*ledgerMetrics, error) {
	m := &ledgerMetrics{
		pullMetrics: newPullMetrics("accel_pulls", "that nodes reported"),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_pull_reports_total", Help: "Reported pulls by what became of them (accepted, duplicate, late, invalid).",
		}, []string{"result"}),
		pruned: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_pulls_removed_total", Help: "Single pulls that were removed for their age or number; their sums stay.",
		}),
	}
	return m, register(r, append(m.all(), m.results, m.pruned, &ledgerCollector{l})...)
}

// added counts what a transaction that is durable did.
func (m *ledgerMetrics) added(e *entry, pulls []accel.Pull) {
	for _, i := range e.counted {
		m.pull(pulls[i])
	}
	m.results.WithLabelValues("accepted").Add(float64(e.receipt.Accepted))
	m.results.WithLabelValues("duplicate").Add(float64(e.receipt.Duplicates))
	if e.receipt.Late > 0 {
		m.results.WithLabelValues("late").Add(float64(e.receipt.Late))
		e.o.Log.Warn("pulls came that are older than what is kept; they are not counted", "count", e.receipt.Late, "node", pulls[0].Node)
	}
}

var (
	keptDesc    = prometheus.NewDesc("accel_ledger_pulls", "Single pulls that are kept.", nil, nil)
	rollupsDesc = prometheus.NewDesc("accel_ledger_rollups", "Sums of days that are kept: by image, tenant and node together, and folded ones.", nil, nil)
	sizeDesc    = prometheus.NewDesc("accel_ledger_file_bytes", "Size of the ledger's file.", nil, nil)
)

// ledgerCollector counts at scrape time, so that there is no second count that could disagree.
type ledgerCollector struct{ l *Ledger }

func (c *ledgerCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- keptDesc
	ch <- rollupsDesc
	ch <- sizeDesc
}

func (c *ledgerCollector) Collect(ch chan<- prometheus.Metric) {
	err := c.l.file.View(func(bt *bbolt.Tx) error {
		rollups := uint64(0)
		days := bt.Bucket(bucketDays).Cursor()
		for k, v := days.First(); k != nil; k, v = days.Next() {
			rollups += number(v)
		}
		ch <- prometheus.MustNewConstMetric(keptDesc, prometheus.GaugeValue, float64(number(bt.Bucket(boltfile.Meta).Get(keyCount))))
		ch <- prometheus.MustNewConstMetric(rollupsDesc, prometheus.GaugeValue, float64(rollups))
		ch <- prometheus.MustNewConstMetric(sizeDesc, prometheus.GaugeValue, float64(bt.Size()))
		return nil
	})
	if err != nil {
		c.l.o.Log.Error("cannot count pulls for metrics", "error", err)
	}
}
