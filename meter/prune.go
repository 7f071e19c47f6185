package meter

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"time"

	"go.etcd.io/bbolt"
)

// Run removes what is too old, at once and then every hour, until ctx ends. What goes wrong is logged, and
// tried again: an account that does not shrink still counts.
func (l *Ledger) Run(ctx context.Context) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		if err := l.Prune(ctx); err != nil && ctx.Err() == nil {
			l.o.Log.Error("old pulls cannot be removed", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Prune removes what is too old now.
func (l *Ledger) Prune(ctx context.Context) error {
	now, any, err := l.believedNow()
	if err != nil || !any {
		return l.located(err)
	}
	for removed := pruneBatch; removed == pruneBatch; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := l.file.update(func(bt *bbolt.Tx) (err error) {
			e := &entry{Ledger: l, bt: bt}
			over := int(number(bt.Bucket(bucketMeta).Get(keyCount))) - l.o.MaxPulls
			if removed, err = e.removePulls(pruneBatch, timeKey(now.Add(-l.o.KeepPulls))); err != nil || removed > 0 || over <= 0 {
				return err
			}
			removed, err = e.removePulls(min(pruneBatch, over), nil)
			return err
		})
		if err != nil {
			return l.located(err)
		}
		l.metrics.pruned.Add(float64(removed))
	}
	return l.located(l.pruneDays(ctx, dayOf(now.Add(-l.o.KeepRollups))))
}

// believedNow is the time that age counts from: our clock's, but not later than a day after
// the newest day that pulls speak of.
func (l *Ledger) believedNow() (now time.Time, any bool, err error) {
	now = l.o.Now()
	err = l.file.view(func(bt *bbolt.Tx) error {
		if k, _ := bt.Bucket(bucketDays).Cursor().Last(); k != nil {
			any = true
			if newest := dayTimeOf(int(binary.BigEndian.Uint32(k)) + 2); newest.Before(now) {
				now = newest
			}
		}
		return nil
	})
	return now, any, err
}

// pruneDays removes the days before first, a batch at a time, and the names that only they used.
func (l *Ledger) pruneDays(ctx context.Context, first int) error {
	limit := dayKey(first)
	gone := false
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := l.file.update(func(bt *bbolt.Tx) error {
			more = false
			days := bt.Bucket(bucketDays)
			day, _ := days.Cursor().First()
			if day == nil || bytes.Compare(day, limit) >= 0 {
				return nil
			}
			more = true
			day = bytes.Clone(day)
			n, err := removePrefix(bt.Bucket(bucketRollups), day, pruneBatch)
			if err != nil || n == pruneBatch {
				return err
			}
			if n, err = removePrefix(bt.Bucket(bucketBaseline), day, pruneBatch); err != nil || n == pruneBatch {
				return err
			}
			return days.Delete(day)
		})
		if err != nil {
			return err
		}
		gone = gone || more
	}
	if !gone {
		return nil
	}
	return l.file.update(sweepNames)
}

func removePrefix(b *bbolt.Bucket, prefix []byte, most int) (int, error) {
	var keys [][]byte
	c := b.Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix) && len(keys) < most; k, _ = c.Next() {
		keys = append(keys, bytes.Clone(k))
	}
	var errs []error //nolint:prealloc
	for _, k := range keys {
		errs = append(errs, b.Delete(k))
	}
	return len(keys), errors.Join(errs...)
}

// sweepNames removes the names that no row has any more.
func sweepNames(bt *bbolt.Tx) error {
	used := map[string]bool{}
	c := bt.Bucket(bucketRollups).Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		for name := k[dayBytes:]; len(name) >= nameBytes; name = name[nameBytes:] {
			if !used[string(name[:nameBytes])] {
				used[string(name[:nameBytes])] = true
			}
		}
	}
	var names, texts [][]byte
	c = bt.Bucket(bucketTexts).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		if !used[string(k)] {
			names, texts = append(names, bytes.Clone(k)), append(texts, bytes.Clone(v))
		}
	}
	var errs []error //nolint:prealloc
	for i := range names {
		errs = append(errs, bt.Bucket(bucketTexts).Delete(names[i]), bt.Bucket(bucketNames).Delete(texts[i]))
	}
	return errors.Join(errs...)
}
