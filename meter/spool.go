package meter

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"accel"
	"accel/internal/boltfile"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
)

// SpoolOptions: zero values take the defaults named.
type SpoolOptions struct {
	// MaxPulls bounds the pulls that wait for the server; 100,000 (some 30 MB). The
	// oldest are dropped first.
	MaxPulls   int
	Log        *slog.Logger          // nil: silent
	Registerer prometheus.Registerer // nil: not registered
}

const (
	defaultMaxSpooled = 100_000
	spoolFormat       = "accel spool 1"
)

var bucketPulls = []byte("pulls") // id -> pull

// Spool keeps a node's pulls on disk until the server has them. It is safe for
// concurrent use.
type Spool struct {
	o       SpoolOptions
	file    *boltfile.File
	length  atomic.Int64
	dropped atomic.Int64
	changed chan struct{} // holds one token when there is something new
	metrics *spoolMetrics
}

// OpenSpool opens the spool in the file path, or makes it. A damaged one is set aside
// (the last of these is kept), and what waited in it is lost. ErrLocked when another process has it.
func OpenSpool(path string, o SpoolOptions) (*Spool, error) {
	o.MaxPulls = cmp.Or(o.MaxPulls, defaultMaxSpooled)
	if o.MaxPulls < 0 {
		return nil, fmt.Errorf("%w: a spool of %d pulls", accel.ErrInvalid, o.MaxPulls)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Spool{o: o, changed: make(chan struct{}, 1)}
	var err error
	s.file, err = boltfile.OpenAnew(path, boltfile.Schema{Format: spoolFormat, Buckets: [][]byte{bucketPulls}, Check: s.check}, func(aside string, damage error) {
		o.Log.Error("the spool of pulls is set aside; what waited in it is not reported", "file", path, "aside", aside, "error", damage)
		s.length.Store(0)
	})
	if err != nil {
		return nil, err
	}
	if s.metrics, err = newSpoolMetrics(o.Registerer, s); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	if s.Len() > 0 {
		s.wake()
	}
	return s, nil
}

// check reads all of an old spool, which is small: a row that cannot be read would
// stay in the way of all others for ever.
func (s *Spool) check(bt *bbolt.Tx) error {
	s.length.Store(0)
	err := bt.Bucket(bucketPulls).ForEach(func(k, v []byte) error {
		s.length.Add(1)
		_, err := decodePull(k, v, nil)
		return err
	})
	for damage := range bt.Check() { // to its end, for it reads the transaction
		if err == nil {
			err = fmt.Errorf("%w: spool: %w", ErrDamaged, damage)
		}
	}
	return err
}

// Add keeps pulls; when it returns nil they are on disk. One whose id is there already is kept
// as it was. Where the bound is reached the oldest make room.
func (s *Spool) Add(pulls ...accel.Pull) error {
	if len(pulls) == 0 {
		return nil
	}
	var added, dropped int64
	err := s.file.Update(func(bt *bbolt.Tx) error {
		added, dropped = 0, 0
		b := bt.Bucket(bucketPulls)
		for i := range pulls {
			k, err := idKey(pulls[i].ID)
			if err != nil {
				return err
			}
			if b.Get(k) != nil {
				continue
			}
			if err := b.Put(k, encodePull(&pulls[i])); err != nil {
				return err
			}
			added++
		}
		for over := s.length.Load() + added - int64(s.o.MaxPulls); over > 0; over-- {
			k, _ := b.Cursor().First()
			if k == nil {
				break
			}
			if err := b.Delete(k); err != nil {
				return err
			}
			dropped++
		}
		// Inside the transaction, of which there is one at a time: the next one counts on it.
		// Where the commit fails, it is taken back.
		s.length.Add(added - dropped)
		return nil
	})
	if err != nil {
		s.recount()
		return fmt.Errorf("spool pulls: %w", err)
	}
	if dropped > 0 {
		s.lost(int(dropped))
		s.o.Log.Warn("the spool of pulls is full; the oldest were dropped", "dropped", dropped, "kept", s.Len())
	}
	s.wake()
	return nil
}

// Oldest gives up to n pulls, by their start.
func (s *Spool) Oldest(n int) ([]accel.Pull, error) {
	var pulls []accel.Pull
	err := s.file.View(func(bt *bbolt.Tx) error {
		pulls = nil
		c := bt.Bucket(bucketPulls).Cursor()
		for k, v := c.First(); k != nil && len(pulls) < n; k, v = c.Next() {
			p, err := decodePull(k, v, nil)
			if err != nil {
				return err
			}
			pulls = append(pulls, p)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read spooled pulls: %w", err)
	}
	return pulls, nil
}

// Ack forgets pulls that the server has. Unknown ids are passed over.
func (s *Spool) Ack(ids ...string) error {
	n, err := s.remove(ids)
	s.metrics.acked.Add(float64(n))
	return err
}

// refuse forgets pulls that the server will never take.
func (s *Spool) refuse(ids ...string) error {
	n, err := s.remove(ids)
	s.dropped.Add(n)
	s.metrics.dropped.WithLabelValues("refused").Add(float64(n))
	return err
}

func (s *Spool) remove(ids []string) (removed int64, err error) {
	err = s.file.Update(func(bt *bbolt.Tx) error {
		removed = 0
		b := bt.Bucket(bucketPulls)
		for _, id := range ids {
			k, err := idKey(id)
			if err != nil {
				return err
			}
			if b.Get(k) == nil {
				continue
			}
			if err := b.Delete(k); err != nil {
				return err
			}
			removed++
		}
		s.length.Add(-removed)
		return nil
	})
	if err != nil {
		s.recount()
		return 0, fmt.Errorf("forget spooled pulls: %w", err)
	}
	return removed, nil
}

// recount finds the length again after a transaction that failed.
func (s *Spool) recount() {
	_ = s.file.View(func(bt *bbolt.Tx) error { // it failed before, and the caller knows
		s.length.Store(int64(bt.Bucket(bucketPulls).Stats().KeyN))
		return nil
	})
}

// lost counts pulls for which there was no room.
func (s *Spool) lost(n int) {
	s.dropped.Add(int64(n))
	s.metrics.dropped.WithLabelValues("full").Add(float64(n))
}

// Dropped counts pulls that were lost since the start: the bound was reached, or the server refused them.
func (s *Spool) Dropped() int64 { return s.dropped.Load() }

// Len is how many pulls wait.
func (s *Spool) Len() int { return int(s.length.Load()) }

// Close waits for running calls and closes the file. A second Close is no error.
func (s *Spool) Close() error { return s.file.Close() }

func (s *Spool) wake() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}
