package meter

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"

	"accel/internal/boltfile"

	"go.etcd.io/bbolt"
)

// sweepBatch is how many keys a sweep looks at in one transaction: a reading one in whose time the
// file cannot grow, or a writing one that others wait for.
const sweepBatch = 20_000

// sweep removes the names that no row has any more, if days were removed since the last sweep. Names that
// are given out meanwhile are known, and stay. A crash leaves it to be done again.
func (l *Ledger) sweep(ctx context.Context) error {
	due := false
	if err := l.file.View(func(bt *bbolt.Tx) error {
		due = bt.Bucket(boltfile.Meta).Get(keySweep) != nil
		return nil
	}); err != nil || !due {
		return err
	}
	if err := l.file.Update(func(*bbolt.Tx) error {
		l.sweeping = map[uint32]bool{}
		return nil
	}); err != nil {
		return err
	}
	unused, err := l.unusedNames(ctx)
	if err == nil {
		err = l.removeNames(ctx, unused)
	}
	swept := err == nil
	return errors.Join(err, l.file.Update(func(bt *bbolt.Tx) error {
		l.sweeping = nil
		if !swept {
			return nil
		}
		return bt.Bucket(boltfile.Meta).Delete(keySweep)
	}))
}

// unusedNames are those that no row and no pull has.
func (l *Ledger) unusedNames(ctx context.Context) (unused [][]byte, err error) {
	used := map[uint32]bool{}
	for _, t := range []struct {
		bucket []byte
		prefix int // of keys, before their names
	}{{bucketRollups, dayBytes}, {bucketFolded, 1 + dayBytes}, {bucketMonths, 1 + dayBytes}, {bucketBaseline, dayBytes}} {
		if err := l.eachRow(ctx, t.bucket, func(k, _ []byte) error {
			for name := k[min(t.prefix, len(k)):]; len(name) >= nameBytes; name = name[nameBytes:] {
				used[binary.BigEndian.Uint32(name)] = true
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	if err := l.eachRow(ctx, bucketPulls, func(_, v []byte) error {
		return keptNames(v, func(name uint32) { used[name] = true })
	}); err != nil {
		return nil, err
	}
	err = l.eachRow(ctx, bucketTexts, func(k, _ []byte) error {
		if len(k) == nameBytes && !used[binary.BigEndian.Uint32(k)] {
			unused = append(unused, bytes.Clone(k))
		}
		return nil
	})
	return unused, err
}

// eachRow calls each for every row of a bucket. Others may write in between.
func (l *Ledger) eachRow(ctx context.Context, bucket []byte, each func(k, v []byte) error) error {
	var last []byte
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := l.file.View(func(bt *bbolt.Tx) error {
			c := bt.Bucket(bucket).Cursor()
			k, v := c.Seek(last)
			if last != nil && bytes.Equal(k, last) {
				k, v = c.Next()
			}
			n := 0
			for ; k != nil && n < sweepBatch; k, v = c.Next() {
				if err := each(k, v); err != nil {
					return err
				}
				last = append(last[:0], k...)
				n++
			}
			more = k != nil
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// removeNames removes those that were not given out since the sweep began.
func (l *Ledger) removeNames(ctx context.Context, unused [][]byte) error {
	for len(unused) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		some := unused[:min(len(unused), pruneBatch)]
		if err := l.file.Update(func(bt *bbolt.Tx) error {
			names, texts := bt.Bucket(bucketNames), bt.Bucket(bucketTexts)
			for _, k := range some {
				if l.sweeping[binary.BigEndian.Uint32(k)] {
					continue
				}
				text := bytes.Clone(texts.Get(k))
				if err := errors.Join(texts.Delete(k), names.Delete(text)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		unused = unused[len(some):]
	}
	return nil
}
