package meter

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"

	"accel"
	"accel/internal/boltfile"

	"go.etcd.io/bbolt"
)

// Days that are older than LedgerOptions.KeepDetail are folded: the roll-ups of each image, tenant
// and node become sums of each image, of each tenant, of each node and of all, a day each; and
// those of each image and tenant together, a month each. Percentiles are the largest part of
// a row, so but for those of all they are kept for whole months.
//
// A transaction takes a bounded number of roll-ups away and adds them to the folded sums, so
// that at any instant each pull is in one of the two. What usage is can so be read from both, and a
// crash leaves less to be folded. A pull that comes for a folded day is added to its folded sums.

// kind says what a folded sum is of. It is the first byte of its key.
type kind byte

const (
	ofAll    kind = 'd' // with percentiles
	ofImage  kind = 'i'
	ofTenant kind = 't'
	ofNode   kind = 'n'
	ofPair   kind = 'p' // image and tenant, of months; with percentiles
)

// foldBatch is how many roll-ups are folded in one transaction, for which others wait: some 20 ms.
const foldBatch = 2000

// foldedKey is the key of a folded sum: period is a day, or a month.
func foldedKey(k kind, period int, names ...uint32) []byte {
	key := append(make([]byte, 0, 1+dayBytes+len(names)*nameBytes), byte(k))
	key = binary.BigEndian.AppendUint32(key, uint32(max(0, period)))
	for _, n := range names {
		key = binary.BigEndian.AppendUint32(key, n)
	}
	return key
}

// monthOf numbers months; monthStart is a month's first day.
func monthOf(day int) int {
	t := dayTimeOf(day)
	return t.Year()*12 + int(t.Month()) - 1
}

func monthStart(month int) int {
	return dayOf(time.Date(month/12, time.Month(month%12+1), 1, 0, 0, 0, 0, time.UTC))
}

// foldedBefore is the first day that is not folded; 0: none is.
func foldedBefore(bt *bbolt.Tx) int { return int(number(bt.Bucket(boltfile.Meta).Get(keyFolded))) }

// names are those of one roll-up.
type names struct{ image, tenant, node uint32 }

func namesOf(key []byte) (n names, err error) {
	if len(key) != dayBytes+3*nameBytes {
		return n, fmt.Errorf("%w: key %x of a roll-up", ErrDamaged, key)
	}
	for i, p := range []*uint32{&n.image, &n.tenant, &n.node} {
		*p = binary.BigEndian.Uint32(key[dayBytes+i*nameBytes:])
	}
	return n, nil
}

// folding collects what one transaction adds to folded sums.
type folding struct{ days, months map[string]*group }

func newFolding() *folding {
	return &folding{days: map[string]*group{}, months: map[string]*group{}}
}

// add takes a roll-up, whose savings are settled.
func (f *folding) add(day int, n names, r *row) error {
	month := monthOf(day)
	for _, to := range []struct {
		into           map[string]*group
		key            []byte
		sums, quantile bool
	}{
		{f.days, foldedKey(ofAll, day, 0), true, true},
		{f.days, foldedKey(ofImage, day, n.image), true, false},
		{f.days, foldedKey(ofTenant, day, n.tenant), true, false},
		{f.days, foldedKey(ofNode, day, n.node), true, false},
		{f.months, foldedKey(ofImage, month, n.image), false, true},
		{f.months, foldedKey(ofTenant, month, n.tenant), false, true},
		{f.months, foldedKey(ofNode, month, n.node), false, true},
		{f.months, foldedKey(ofPair, month, n.image, n.tenant), true, true},
	} {
		if !to.sums && len(r.sketch) == 0 {
			continue
		}
		g := to.into[string(to.key)]
		if g == nil {
			var err error
			if g, err = newGroup(); err != nil {
				return err
			}
			to.into[string(to.key)] = g
		}
		if to.sums {
			g.merge(&r.sums)
		}
		if to.quantile {
			if err := g.sketch.merge(r.sketch); err != nil {
				return err
			}
		}
	}
	return nil
}

// write adds what was collected to what is there.
func (f *folding) write(bt *bbolt.Tx) error {
	for _, t := range []struct {
		groups map[string]*group
		bucket *bbolt.Bucket
		daily  bool
	}{{f.days, bt.Bucket(bucketFolded), true}, {f.months, bt.Bucket(bucketMonths), false}} {
		t.bucket.FillPercent = 0.9 // periods come in order
		for _, key := range slices.Sorted(maps.Keys(t.groups)) {
			g, old := t.groups[key], t.bucket.Get([]byte(key))
			if old == nil && t.daily {
				if err := addRows(bt, []byte(key[1:1+dayBytes]), 1); err != nil {
					return err
				}
			}
			r, err := decodeRow(old)
			if err != nil {
				return fmt.Errorf("folded sum %x: %w", key, err)
			}
			if err := g.sketch.merge(r.sketch); err != nil {
				return err
			}
			g.merge(&r.sums)
			r.sums, r.sketch = g.sums, g.sketch.encode()
			if err := t.bucket.Put([]byte(key), r.encode()); err != nil {
				return err
			}
		}
	}
	return nil
}

// addRows counts the rows of a day.
func addRows(bt *bbolt.Tx, day []byte, n int) error {
	days := bt.Bucket(bucketDays)
	return days.Put(day, numberKey(uint64(int64(number(days.Get(day)))+int64(n))))
}

// fold folds the days before one, each of which nobody adds roll-ups to any more.
func (l *Ledger) fold(ctx context.Context, before int) error {
	if err := l.bitByBit(ctx, func(bt *bbolt.Tx) bool { return foldedBefore(bt) < before }, func(bt *bbolt.Tx) error {
		return bt.Bucket(boltfile.Meta).Put(keyFolded, numberKey(uint64(max(before, foldedBefore(bt)))))
	}); err != nil {
		return err
	}
	for {
		day := -1
		var base *baselines
		err := l.file.View(func(bt *bbolt.Tx) (err error) {
			k, _ := bt.Bucket(bucketRollups).Cursor().First()
			if len(k) < dayBytes {
				return nil
			}
			if d := int(binary.BigEndian.Uint32(k)); d < foldedBefore(bt) {
				day = d
				base, err = l.baselinesOf(bt, d-BaselineDays, d+1)
			}
			return err
		})
		if err != nil || day < 0 {
			return err
		}
		for more := true; more; {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := l.file.Update(func(bt *bbolt.Tx) (err error) {
				more, err = foldSome(bt, day, base, l.batch)
				return err
			}); err != nil {
				return err
			}
		}
	}
}

// foldSome folds up to most roll-ups of a day, and reports whether there may be more.
func foldSome(bt *bbolt.Tx, day int, base *baselines, most int) (more bool, err error) {
	b, f := bt.Bucket(bucketRollups), newFolding()
	prefix := dayKey(day)
	keys := make([][]byte, 0, most)
	c := b.Cursor()
	for k, v := c.Seek(prefix); bytes.HasPrefix(k, prefix) && len(keys) < most; k, v = c.Next() {
		n, err := namesOf(k)
		if err != nil {
			return false, err
		}
		r, err := decodeRow(v)
		if err != nil {
			return false, fmt.Errorf("roll-up %x: %w", k, err)
		}
		r.settle(base.of(n.image))
		if err := f.add(day, n, &r); err != nil {
			return false, err
		}
		keys = append(keys, bytes.Clone(k))
	}
	if len(keys) == 0 {
		return false, nil
	}
	for _, k := range keys {
		if err := b.Delete(k); err != nil {
			return false, err
		}
	}
	if err := addRows(bt, prefix, -len(keys)); err != nil {
		return false, err
	}
	return len(keys) == most, f.write(bt)
}

// foldedNames are the names of a pull of a folded day, which are those of others where the day has
// too many rows and they are new.
func (e *entry) foldedNames(p *accel.Pull) (n names, err error) {
	full := number(e.bt.Bucket(bucketDays).Get(dayKey(dayOf(p.Start)))) >= uint64(e.o.MaxDayRows)
	for _, x := range []struct {
		name        *uint32
		text, other string
	}{{&n.image, p.Image, OtherImage}, {&n.tenant, p.Tenant, Other}, {&n.node, p.Node, Other}} {
		short, err := e.name(x.text, !full)
		if err == nil && short == nil {
			short, err = e.name(x.other, true)
		}
		if err != nil {
			return n, err
		}
		*x.name = binary.BigEndian.Uint32(short)
	}
	return n, nil
}

// addFolded counts a pull of a folded day.
func (e *entry) addFolded(p *accel.Pull) error {
	n, err := e.foldedNames(p)
	if err != nil {
		return err
	}
	var r row
	if err = r.add(p, e.o.Billing); err != nil {
		return err
	}
	day := dayOf(p.Start)
	if isSaver(p) {
		base := e.bases[day]
		if base == nil {
			if base, err = e.baselinesOf(e.bt, day-BaselineDays, day+1); err != nil {
				return err
			}
			if e.bases == nil {
				e.bases = map[int]*baselines{}
			}
			e.bases[day] = base
		}
		r.settle(base.of(n.image))
	}
	if e.folding == nil {
		e.folding = newFolding()
	}
	return e.folding.add(day, n, &r)
}
