package node

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"accel"
	"accel/api"
	"accel/meter"

	"github.com/prometheus/client_golang/prometheus"
)

// link is the way to the server. What asks it tells how that went, so that an outage is
// one line in the log and not one for each attempt.
type link struct {
	*api.Client
	log   *slog.Logger
	up    prometheus.Gauge
	ended *prometheus.CounterVec // warms by how they ended

	mu   sync.Mutex
	down map[string]error // why, by what was tried
}

func newLink(c *api.Client, r prometheus.Registerer, log *slog.Logger) (*link, error) {
	l := &link{
		Client: c, log: log, down: map[string]error{},
		up:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "accel_node_server_up", Help: "1 while the server answers the node's heartbeats."}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "accel_node_warms_total", Help: "Images brought ahead, by how that ended."}, []string{"state"}),
	}
	for _, c := range []prometheus.Collector{l.up, l.ended} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// noted keeps how an attempt went, and returns what was known before.
func (l *link) noted(what string, err error) (before error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before = l.down[what]
	if err != nil {
		l.down[what] = err
	} else {
		delete(l.down, what)
	}
	return before
}

// tried is noted with a line in the log where things changed.
func (l *link) tried(what string, err error) {
	switch before := l.noted(what, err); {
	case err != nil && before == nil:
		l.log.Warn("the server cannot be reached; trying again", "server", l.Server(), "for", what, "error", err)
	case err != nil && before.Error() != err.Error():
		l.log.Debug("the server still cannot be reached", "server", l.Server(), "for", what, "error", err)
	case err == nil && before != nil:
		l.log.Info("the server can be reached again", "server", l.Server(), "for", what)
	}
}

// problem is why the server cannot be reached just now; nil where it can.
func (l *link) problem() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.down) == 0 {
		return nil
	}
	what := slices.Sorted(maps.Keys(l.down))
	return fmt.Errorf("%s: %w", strings.Join(what, ", "), l.down[what[0]])
}

// answerTime is how long the server may take for an answer, beyond a long poll's own time.
const answerTime = 30 * time.Second

// within bounds one request.
func within(ctx context.Context, d time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return do(ctx)
}

const (
	// The pauses after a failure, doubled from the first to the second.
	minPause, maxPause = time.Second, 30 * time.Second
)

// pauses counts them.
type pauses struct {
	next  time.Duration
	limit time.Duration // zero: maxPause
}

// wait sleeps for the next pause, with jitter, so that a fleet does not come back all at once.
func (p *pauses) wait(ctx context.Context) {
	p.next = min(max(2*p.next, minPause), cmp.Or(p.limit, maxPause))
	sleep(ctx, p.next/2+rand.N(p.next/2))
}

func (p *pauses) reset() { p.next = 0 }

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// heartbeats tell the server of the node until ctx ends.
func (n *Node) heartbeats(ctx context.Context) error {
	pause := pauses{limit: min(n.o.Heartbeat, maxPause)}
	for ctx.Err() == nil {
		err := within(ctx, answerTime, func(ctx context.Context) error { return n.server.Heartbeat(ctx, n.self()) })
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		n.server.tried("heartbeats", err)
		if err != nil {
			n.server.up.Set(0)
			pause.wait(ctx)
			continue
		}
		n.server.up.Set(1)
		pause.reset()
		sleep(ctx, n.o.Heartbeat)
	}
	return nil
}

// report sends spooled pulls until ctx ends.
func (n *Node) report(ctx context.Context) error {
	r := &meter.Reporter{Spool: n.spool, Sink: sink{n.server}, Log: n.o.Log}
	return r.Run(ctx)
}

// sink is the server as the reporter sees it.
type sink struct{ *link }

// ReportPulls implements meter.Sink.
func (s sink) ReportPulls(ctx context.Context, pulls []accel.Pull) error {
	err := within(ctx, answerTime, func(ctx context.Context) error { return s.Client.ReportPulls(ctx, pulls) })
	if ctx.Err() == nil {
		_ = s.noted("reports of pulls", err) // the reporter logs by itself
	}
	return err
}
