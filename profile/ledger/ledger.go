package ledger

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"accel"
	"accel/internal/boltfile"
	"accel/internal/keylock"

	"github.com/prometheus/client_golang/prometheus"
)

// Options: zero values take the defaults named.
type Options struct {
	// MaxImages bounds the images (platform manifests); 100,000. One whose profile was
	// used last makes room.
	MaxImages int
	// MaxBytes bounds what is kept of all of them; 2 GiB. An image whose start reads 2,000
	// files takes some 40 kB, and some 100 kB more when starts were recorded.
	MaxBytes int64
	// PublishEvery is how often an image's profile is published at most; 1 min.
	PublishEvery time.Duration
	// SettleAfter is how long small changes wait to be published; 1 h.
	SettleAfter time.Duration
	// Unpublished keeps profiles in this ledger alone: nothing is ever due.
	Unpublished bool
	Registerer  prometheus.Registerer // nil: not registered
	Log         *slog.Logger          // nil: silent
	Now         func() time.Time      // time.Now
}

const (
	// useStep is how exactly it is known when a profile was last used, so that most uses
	// write nothing.
	useStep = time.Hour
	// maxPlaces bounds where one manifest may be: base images are children of many indexes.
	maxPlaces = 8
	// maxStale bounds the artifacts that a place remembers to have to delete.
	maxStale = 8
	// maxSeen bounds the ids of reports that are remembered beside the sample's.
	maxSeen = 256
	// maxForetells is how often a prediction is tried; an image may be such that it never comes to an end.
	maxForetells = 5
	// maxTries bounds the exponent of the pause before a publication is tried again.
	maxTries = 10
)

func (o *Options) finish() error {
	o.MaxImages = cmp.Or(o.MaxImages, 100_000)
	o.MaxBytes = cmp.Or(o.MaxBytes, 2<<30)
	o.PublishEvery = cmp.Or(o.PublishEvery, time.Minute)
	o.SettleAfter = cmp.Or(o.SettleAfter, time.Hour)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxImages < 1 || min(o.MaxBytes, int64(o.PublishEvery), int64(o.SettleAfter)) < 1 {
		return fmt.Errorf("%w: a bound of the profiles is not positive", accel.ErrInvalid)
	}
	return nil
}

// Ledger keeps profiles. It is safe for concurrent use. Errors of its methods that match
// none of accel's sentinels come from the file or from ctx.
type Ledger struct {
	o       Options
	file    *boltfile.File
	path    string
	metrics *metrics
	// images serialises what happens to one image, so that the work of folding is done
	// outside of transactions.
	images keylock.Mutex
	// due has one slot: there may be something to publish sooner than was thought.
	due   chan struct{}
	taken taken
}

// Open opens the ledger in the file path, which is made where there is none. A file
// that is damaged is set aside as path.damaged, and a new one begun. ErrLocked when
// another process has it open. The caller closes it.
func Open(path string, o Options) (*Ledger, error) {
	if err := o.finish(); err != nil {
		return nil, err
	}
	l := &Ledger{o: o, path: path, due: make(chan struct{}, 1)}
	err := l.open()
	if err != nil {
		return nil, err
	}
	if l.metrics, err = newMetrics(o.Registerer, l); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// now is the time as it is kept: UTC, whole microseconds.
func (l *Ledger) now() time.Time { return l.o.Now().UTC().Truncate(time.Microsecond) }
