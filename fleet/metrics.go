package fleet

import (
	"context"
	"fmt"
	"time"

	"accel"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	made     prometheus.Counter
	finished *prometheus.CounterVec
	fetched  prometheus.Counter
	dropped  *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer, f *Fleet) (*metrics, error) {
	m := &metrics{
		made: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_warms_made_total", Help: "Images that nodes were asked to bring, one for each image and node.",
		}),
		finished: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_warms_finished_total", Help: "Images that nodes finished, by result (Warm, Failed).",
		}, []string{"result"}),
		fetched: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_warms_fetched_bytes_total", Help: "Compressed layer bytes that nodes had to bring for them.",
		}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_warms_dropped_total", Help: "Wishes that a bound refused, by which (node: the oldest of a node gave way; fleet: a rule's was not kept).",
		}, []string{"bound"}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.made, m.finished, m.fetched, m.dropped, &fleetCollector{f}} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

// count notes what a change that is durable did.
func (m *metrics) count(c *change) {
	m.made.Add(float64(c.made))
	for s, n := range c.finished {
		m.finished.WithLabelValues(string(s)).Add(float64(n))
	}
	m.fetched.Add(float64(c.fetched))
	if c.gaveWay > 0 {
		m.dropped.WithLabelValues("node").Add(float64(c.gaveWay))
	}
	if c.refused > 0 {
		m.dropped.WithLabelValues("fleet").Add(float64(c.refused))
		c.o.Log.Warn("the fleet has too many images waiting; rules' wishes were not kept", "count", c.refused)
	}
}

var (
	nodesDesc = prometheus.NewDesc("accel_nodes", "Nodes by state (live, silent).", []string{"state"}, nil)
	warmsDesc = prometheus.NewDesc("accel_warms", "Images that nodes are to have, by state.", []string{"state"}, nil)
)

// scrapeTimeout bounds how long a scrape waits for the file.
const scrapeTimeout = 5 * time.Second

// fleetCollector counts at scrape time, so that there is no second count that could
// disagree.
type fleetCollector struct{ f *Fleet }

func (c *fleetCollector) Describe(ch chan<- *prometheus.Desc) { ch <- nodesDesc; ch <- warmsDesc }

func (c *fleetCollector) Collect(ch chan<- prometheus.Metric) {
	states := map[string]int{"live": 0, "silent": 0}
	for _, n := range c.f.Nodes() {
		if n.Silent {
			states["silent"]++
		} else {
			states["live"]++
		}
	}
	for s, n := range states {
		ch <- prometheus.MustNewConstMetric(nodesDesc, prometheus.GaugeValue, float64(n), s)
	}
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	counts, err := c.f.counts(ctx)
	if err != nil {
		c.f.o.Log.Error("cannot count warms for metrics", "error", err)
		return
	}
	for s, n := range counts {
		ch <- prometheus.MustNewConstMetric(warmsDesc, prometheus.GaugeValue, float64(n), string(s))
	}
}

func (f *Fleet) counts(ctx context.Context) (map[accel.WarmState]uint64, error) {
	all := map[accel.WarmState]uint64{}
	err := f.view(ctx, func(c *change) error {
		for _, s := range warmStates {
			all[s] = count(c.bt, s)
		}
		return nil
	})
	return all, err
}
