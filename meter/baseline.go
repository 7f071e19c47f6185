package meter

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

// baselines are what downloads took without accel in some days.
type baselines struct {
	billing    Billing
	seconds    map[uint32]sketch // by image
	throughput sketch            // bytes per second
	known      map[uint32]estimate
}

// estimate is what downloads of an image take without accel. The zero value: it is not known.
type estimate struct {
	each  time.Duration // billed for each; 0: it goes by speed
	speed float64       // bytes per second
}

// baselinesOf reads those of the days [from, to).
func (l *Ledger) baselinesOf(bt *bbolt.Tx, from, to int) (*baselines, error) {
	b := &baselines{billing: l.o.Billing, seconds: map[uint32]sketch{}, known: map[uint32]estimate{}}
	var err error
	if b.throughput, err = newSketch(); err != nil {
		return nil, err
	}
	end := dayKey(to)
	c := bt.Bucket(bucketBaseline).Cursor()
	for k, v := c.Seek(dayKey(from)); k != nil && bytes.Compare(k[:dayBytes], end) < 0; k, v = c.Next() {
		if len(k) != dayBytes+nameBytes {
			return nil, fmt.Errorf("%w: key %x of a baseline", ErrDamaged, k)
		}
		s := b.throughput
		if image := binary.BigEndian.Uint32(k[dayBytes:]); image != 0 {
			var ok bool
			if s, ok = b.seconds[image]; !ok {
				if s, err = newSketch(); err != nil {
					return nil, err
				}
				b.seconds[image] = s
			}
		}
		if err := s.merge(v); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// of is what is known of an image.
func (b *baselines) of(image uint32) estimate {
	e, ok := b.known[image]
	if ok {
		return e
	}
	if s, ok := b.seconds[image]; ok {
		if median, ok := s.quantile(0.5); ok {
			e.each = b.billing.priced(time.Duration(median * 1e9))
		}
	}
	if e.each == 0 {
		e.speed, _ = b.throughput.quantile(0.5)
	}
	b.known[image] = e
	return e
}

// settle puts what savers would have cost in the place of what that is estimated from.
func (s *sums) settle(e estimate) {
	if s.savers == 0 {
		return
	}
	switch {
	case e.each > 0:
		s.wouldPlain.add(total{lo: uint64(s.saversPlain)}.times(int64(e.each)))
		s.wouldArea.add(s.saversMemory.times(int64(e.each)))
	case e.speed > 0:
		s.wouldPlain.add(totalOf(s.saverBytesPlain.float() / e.speed * 1e9))
		s.wouldArea.add(totalOf(s.saverBytesArea.float() / e.speed * 1e9))
	default:
		s.noBaseline += s.savers
		s.saverBilledPlain, s.saverBilledArea = total{}, total{}
	}
	s.savers, s.saversPlain = 0, 0
	s.saversMemory, s.saverBytesPlain, s.saverBytesArea = total{}, total{}, total{}
}
