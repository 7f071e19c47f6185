package fleet

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"accel"
	"accel/internal/boltfile"

	"github.com/prometheus/client_golang/prometheus"
)

// Options: zero values take the defaults named.
type Options struct {
	Rules []Rule
	// SilentAfter is how long a node may say nothing before it counts as silent;
	// 2 min, four heartbeats. Time in which the server was not running does not count.
	SilentAfter time.Duration
	// ForgetAfter is how long a silent node and its warms are kept; 24 h.
	ForgetAfter time.Duration
	// CatchUp is how far a node is caught up with; 24 h.
	CatchUp time.Duration
	// KeepFinished is how long a Warm or Failed one is shown; 7 days, and never less
	// than CatchUp, which would bring the image again.
	KeepFinished time.Duration
	// StallAfter is how long a Fetching one may go without a report; 15 min.
	StallAfter time.Duration
	// MaxNodes bounds the nodes; 10,000. A new one takes the place of the longest
	// silent one.
	MaxNodes int
	// MaxWarms bounds all warms (about 1 KiB each); 200,000. A new one takes the place
	// of the longest finished one.
	MaxWarms int
	// MaxPending bounds what one node has waiting; 500. The oldest gives way.
	MaxPending int
	Registerer prometheus.Registerer // nil: not registered
	Log        *slog.Logger          // nil: silent
	Now        func() time.Time      // time.Now
}

const (
	// maxReady bounds the images that are kept for catch-ups, and maxCatchUp those
	// that one node is given at once, so that it is not busy with them for hours.
	maxReady   = 1000
	maxCatchUp = 100
	// maxNext bounds one answer of Next; the node asks again when it has taken them up.
	maxNext = 50
	// pruneEvery is how often Run looks for what is over, pruneBatch how much it
	// removes in one transaction, for which others wait.
	pruneEvery = time.Minute
	pruneBatch = 1000
)

func (o *Options) finish() error {
	o.SilentAfter = cmp.Or(o.SilentAfter, 2*time.Minute)
	o.ForgetAfter = cmp.Or(o.ForgetAfter, 24*time.Hour)
	o.CatchUp = cmp.Or(o.CatchUp, 24*time.Hour)
	o.KeepFinished = max(cmp.Or(o.KeepFinished, 7*24*time.Hour), o.CatchUp)
	o.StallAfter = cmp.Or(o.StallAfter, 15*time.Minute)
	o.MaxNodes = cmp.Or(o.MaxNodes, 10_000)
	o.MaxWarms = cmp.Or(o.MaxWarms, 200_000)
	o.MaxPending = cmp.Or(o.MaxPending, 500)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if min(o.SilentAfter, o.ForgetAfter, o.CatchUp, o.KeepFinished, o.StallAfter) < 0 || min(o.MaxNodes, o.MaxWarms, o.MaxPending) < 0 {
		return fmt.Errorf("%w: a bound of the fleet is negative", accel.ErrInvalid)
	}
	return CheckRules(o.Rules)
}

// Fleet knows nodes and their warms. It is safe for concurrent use. Errors of its
// methods that match none of accel's sentinels come from the file or from ctx.
type Fleet struct {
	o       Options
	file    *boltfile.File
	path    string
	opened  time.Time
	hub     hub
	metrics *metrics

	// mu is taken inside transactions too, so none is begun under it.
	mu    sync.Mutex
	nodes map[string]*member
}

// member is a node as the memory has it; its row lags behind, see Seen.
type member struct {
	accel.Node
	heard   time.Time // as Now gave it, so that a jump of the clock does not age it
	savedAt time.Time // when its row was written, as heard
	// What its next heartbeat has to do: see to it that the node has what it is to
	// have, and take back what a daemon that is gone was fetching.
	owesCatchUp, owesTakeBack bool
}

// Open opens the fleet in the file path, which is made where there is none. A file that
// is damaged is set aside as path.damaged, and a new one begun. ErrLocked when another
// process has it open. The caller closes it.
func Open(path string, o Options) (*Fleet, error) {
	if err := o.finish(); err != nil {
		return nil, err
	}
	f := &Fleet{o: o, path: path, opened: o.Now(), nodes: map[string]*member{}}
	err := f.open()
	if err != nil {
		return nil, err
	}
	if f.metrics, err = newMetrics(o.Registerer, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// silent reports whether the node said nothing for too long; the caller holds mu.
func (f *Fleet) silent(m *member, now time.Time) bool {
	return min(now.Sub(m.heard), now.Sub(f.opened)) > f.o.SilentAfter
}

// stamp is t as it is kept: UTC, whole microseconds.
func stamp(t time.Time) time.Time { return t.UTC().Truncate(time.Microsecond) }
