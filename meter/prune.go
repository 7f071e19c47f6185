package meter

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"time"

	"accel/internal/boltfile"

	"go.etcd.io/bbolt"
)

// Run folds and removes what is too old, at once and then every hour, until ctx ends. What goes wrong is
// logged, and tried again: an account that does not shrink still counts.
func (l *Ledger) Run(ctx context.Context) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	failed := false
	for {
		switch err := l.Prune(ctx); {
		case ctx.Err() != nil:
		case err != nil && !failed: // once, not with each try
			l.o.Log.Error("old pulls cannot be folded or removed", "error", err)
			failed = true
		case err == nil && failed:
			l.o.Log.Info("old pulls are folded and removed again")
			failed = false
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Prune removes what is too old now, and folds days. It may be ended at any time, and goes on from there.
func (l *Ledger) Prune(ctx context.Context) error {
	l.pruning.Lock()
	defer l.pruning.Unlock()
	now, any, err := l.believedNow()
	if err != nil || !any {
		return l.located(err)
	}
	if err := l.prunePulls(ctx, now.Add(-l.o.KeepPulls)); err != nil {
		return l.located(err)
	}
	// Whole months: their percentiles cannot be taken apart.
	first := monthStart(monthOf(dayOf(now.Add(-l.o.KeepRollups))))
	if err := l.pruneDays(ctx, first); err != nil {
		return l.located(err)
	}
	detail := dayOf(now.Add(-l.o.KeepDetail))
	if err := l.fold(ctx, detail); err != nil {
		return l.located(err)
	}
	// Pulls may still come for the days of which single ones are kept.
	if err := l.pruneBaselines(ctx, min(detail, dayOf(now.Add(-l.o.KeepPulls)))-BaselineDays); err != nil {
		return l.located(err)
	}
	return l.located(l.sweep(ctx))
}

// prunePulls removes single pulls from before a time, and what is above the bound.
func (l *Ledger) prunePulls(ctx context.Context, before time.Time) error {
	end := timeKey(before)
	over := func(bt *bbolt.Tx) int { return int(number(bt.Bucket(boltfile.Meta).Get(keyCount))) - l.o.MaxPulls }
	removed := 0
	return l.bitByBit(ctx, func(bt *bbolt.Tx) bool {
		l.metrics.pruned.Add(float64(removed)) // they are gone for good
		k, _ := bt.Bucket(bucketPulls).Cursor().First()
		return k != nil && (bytes.Compare(k, end) < 0 || over(bt) > 0)
	}, func(bt *bbolt.Tx) (err error) {
		e := &entry{Ledger: l, bt: bt}
		removed, err = e.removePulls(pruneBatch, end)
		if n := over(bt); err == nil && removed == 0 && n > 0 {
			removed, err = e.removePulls(min(pruneBatch, n), nil)
		}
		return err
	})
}

// bitByBit runs a transaction that does a bounded part of something, for as long as it is due.
func (l *Ledger) bitByBit(ctx context.Context, due func(*bbolt.Tx) bool, part func(*bbolt.Tx) error) error {
	for {
		more := false
		err := l.file.View(func(bt *bbolt.Tx) error {
			more = due(bt)
			return nil
		})
		if err != nil || !more {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := l.file.Update(part); err != nil {
			return err
		}
	}
}

// beginsBefore reports whether a table has keys that are less than limit.
func beginsBefore(bucket, limit []byte) func(*bbolt.Tx) bool {
	return func(bt *bbolt.Tx) bool {
		k, _ := bt.Bucket(bucket).Cursor().First()
		return k != nil && bytes.Compare(k, limit) < 0
	}
}

// believedNow is the time that age counts from: our clock's, but not later than a day after
// the newest day that pulls speak of.
func (l *Ledger) believedNow() (now time.Time, any bool, err error) {
	now = l.o.Now()
	err = l.file.View(func(bt *bbolt.Tx) error {
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

// pruneDays removes the days before first, which begins a month.
func (l *Ledger) pruneDays(ctx context.Context, first int) error {
	return l.bitByBit(ctx, beginsBefore(bucketDays, dayKey(first)), func(bt *bbolt.Tx) error {
		days := bt.Bucket(bucketDays)
		k, _ := days.Cursor().First()
		day := int(binary.BigEndian.Uint32(k))
		month := monthOf(day)
		// Months first: they are gone, or their days are all there.
		for _, x := range []struct {
			bucket []byte
			prefix []byte
		}{
			{bucketMonths, foldedKey(ofImage, month)},
			{bucketMonths, foldedKey(ofTenant, month)},
			{bucketMonths, foldedKey(ofNode, month)},
			{bucketMonths, foldedKey(ofPair, month)},
			{bucketRollups, dayKey(day)},
			{bucketFolded, foldedKey(ofAll, day)},
			{bucketFolded, foldedKey(ofImage, day)},
			{bucketFolded, foldedKey(ofTenant, day)},
			{bucketFolded, foldedKey(ofNode, day)},
			{bucketBaseline, dayKey(day)},
		} {
			if n, err := removePrefix(bt.Bucket(x.bucket), x.prefix, pruneBatch); err != nil || n > 0 {
				return err
			}
		}
		return errors.Join(days.Delete(dayKey(day)), bt.Bucket(boltfile.Meta).Put(keySweep, []byte{1}))
	})
}

// pruneBaselines removes what no estimate asks for any more.
func (l *Ledger) pruneBaselines(ctx context.Context, first int) error {
	return l.bitByBit(ctx, beginsBefore(bucketBaseline, dayKey(first)), func(bt *bbolt.Tx) error {
		b := bt.Bucket(bucketBaseline)
		k, _ := b.Cursor().First()
		_, err := removePrefix(b, bytes.Clone(k[:dayBytes]), pruneBatch)
		return err
	})
}

func removePrefix(b *bbolt.Bucket, prefix []byte, most int) (int, error) {
	var keys [][]byte
	c := b.Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix) && len(keys) < most; k, _ = c.Next() {
		keys = append(keys, bytes.Clone(k))
	}
	for _, k := range keys {
		if err := b.Delete(k); err != nil {
			return 0, err
		}
	}
	return len(keys), nil
}
