package fleet

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"accel"
)

// Ready brings an image that became Ready to the nodes that the rules choose. Calling it
// again for the same record changes nothing, so whoever follows the records may go
// back. One that became Ready longer ago than CatchUp is passed over. ErrInvalid for a
// record that is not Ready.
func (f *Fleet) Ready(ctx context.Context, rec accel.Record) error {
	if rec.State != accel.Ready || rec.Digest == "" {
		return fmt.Errorf("%w: %s is %s, not Ready", accel.ErrInvalid, rec.Image(), rec.State)
	}
	if stamp(f.o.Now()).Sub(rec.UpdatedAt) > f.o.CatchUp {
		return nil
	}
	all := readyImages(&rec)
	return f.update(ctx, func(c *change) error {
		if err := c.remember(all, rec.UpdatedAt); err != nil {
			return err
		}
		if len(c.o.Rules) == 0 {
			return nil
		}
		for _, n := range c.listening() {
			for i := range all {
				for _, w := range c.o.wishes(&all[i], n.Labels) {
					if _, err := c.want(n.Name, w, byReady); err != nil {
						return err
					}
				}
			}
		}
		return nil
	})
}

// remember keeps an image for catch-ups, under each of its tags in place of what
// the tag had before; without a tag under its digest.
func (c *change) remember(all []readyImage, at time.Time) error {
	var former []readyImage
	for i := range all {
		r := &all[i]
		k := hash(r.Source.Repository, cmp.Or(r.Source.Tag, r.Source.Digest.String()))
		value, err := json.Marshal(r)
		if err != nil {
			return err
		}
		value = append(moment(at), value...)
		old := bytes.Clone(c.bt.Bucket(bucketReady).Get(k))
		if bytes.Equal(old, value) {
			continue
		}
		if old != nil {
			was, err := c.readyOf(k, old)
			if err != nil {
				return err
			}
			if was.Source.Digest != r.Source.Digest {
				former = append(former, was)
			}
			if err := c.bt.Bucket(bucketReadyOrder).Delete(append(bytes.Clone(old[:8]), k...)); err != nil {
				return err
			}
		}
		if err := c.bt.Bucket(bucketReady).Put(k, value); err != nil {
			return err
		}
		if err := c.bt.Bucket(bucketReadyOrder).Put(append(bytes.Clone(value[:8]), k...), nil); err != nil {
			return err
		}
	}
	for i := range former {
		if err := c.moved(&former[i]); err != nil {
			return err
		}
	}
	return c.dropReady(maxReady, 0)
}

func (c *change) readyOf(key, value []byte) (r readyImage, err error) {
	if len(value) < 8 {
		return r, fmt.Errorf("%w: %s: ready image %x has %d bytes", ErrDamaged, c.path, key, len(value))
	}
	if err := json.Unmarshal(value[8:], &r); err != nil {
		return r, fmt.Errorf("%w: %s: ready image %x: %w", ErrDamaged, c.path, key, err)
	}
	return r, nil
}

// eachReady calls fn for the images of the catch-up, newest first, each once, until fn returns false.
func (c *change) eachReady(fn func(*readyImage) (bool, error)) error {
	seen := map[string]bool{}
	cur := c.bt.Bucket(bucketReadyOrder).Cursor()
	for k, _ := cur.Last(); k != nil; k, _ = cur.Prev() {
		key := k[min(8, len(k)):]
		r, err := c.readyOf(key, c.bt.Bucket(bucketReady).Get(key))
		if err != nil {
			return err
		}
		if seen[r.Source.Name] {
			continue
		}
		seen[r.Source.Name] = true
		if more, err := fn(&r); err != nil || !more {
			return err
		}
	}
	return nil
}

// moved drops what rules asked for and no node took up, of an image by the tag that moved
// away from it; of the image altogether when that was the last of its tags.
func (c *change) moved(former *readyImage) error {
	still := false
	err := c.eachReady(func(r *readyImage) (bool, error) {
		still = r.Source.Repository == former.Source.Repository && r.Source.Digest == former.Source.Digest
		return !still, nil
	})
	if err != nil {
		return err
	}
	gone := []string{former.Source.Name}
	if !still {
		gone = []string{name(former.Source.Repository, "", former.Source.Digest), former.Target.Name}
	} else if former.Source.Tag == "" {
		return nil // kept by a former version, which knew no tags
	}
	for _, what := range gone {
		all, err := c.oldest(bucketByImage, hash(what), c.o.MaxWarms)
		if err != nil {
			return err
		}
		for i := range all {
			if all[i].State != accel.WarmPending || all[i].Rule == "" {
				continue
			}
			if err := c.put(&all[i], nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// dropReady forgets ready images above the number keep, and those before the time
// (as moment has it), oldest first.
func (c *change) dropReady(keep int, before uint64) error {
	over := rows(c.bt.Bucket(bucketReadyOrder)) - keep
	var gone [][]byte // a cursor does not stand changes
	cur := c.bt.Bucket(bucketReadyOrder).Cursor()
	for k, _ := cur.First(); k != nil && (len(gone) < over || bytes.Compare(k[:8], number(before)) < 0); k, _ = cur.Next() {
		gone = append(gone, bytes.Clone(k))
	}
	for _, k := range gone {
		if err := c.bt.Bucket(bucketReadyOrder).Delete(k); err != nil {
			return err
		}
		if err := c.bt.Bucket(bucketReady).Delete(k[8:]); err != nil {
			return err
		}
	}
	return nil
}

// catchUp gives a node what became Ready lately and the rules choose for it.
func (c *change) catchUp(n *accel.Node) error {
	since := c.now.Add(-c.o.CatchUp)
	given := 0
	if len(c.o.Rules) == 0 {
		return nil
	}
	if err := c.dropReady(maxReady, micros(since)); err != nil {
		return err
	}
	return c.eachReady(func(r *readyImage) (bool, error) {
		for _, w := range c.o.wishes(r, n.Labels) {
			if _, err := c.want(n.Name, w, byCatchUp); err != nil {
				return false, err
			}
			given++
		}
		return given < maxCatchUp, nil
	})
}

// Position is the number of the last readiness event that was taken in; zero at first.
func (f *Fleet) Position(ctx context.Context) (seq uint64, err error) {
	err = f.view(ctx, func(c *change) error {
		seq = readNumber(c.bt, keyPosition)
		return nil
	})
	return seq, err
}

// SetPosition keeps the number for the next start.
func (f *Fleet) SetPosition(ctx context.Context, seq uint64) error {
	return f.update(ctx, func(c *change) error { return c.bt.Bucket(bucketMeta).Put(keyPosition, number(seq)) })
}
