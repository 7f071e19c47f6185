package meter

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"accel"
)

// foldedKind is which folded sums answer the query; 0: none do.
func (q *Query) foldedKind() kind {
	image, tenant, node := q.By == ByImage || q.Image != "", q.By == ByTenant || q.Tenant != "", q.By == ByNode || q.Node != ""
	switch {
	case image && tenant && !node && q.By != ByDay:
		return ofPair
	case image && !tenant && !node:
		return ofImage
	case tenant && !image && !node:
		return ofTenant
	case node && !image && !tenant:
		return ofNode
	case !image && !tenant && !node:
		return ofAll
	}
	return 0
}

// answerable moves a from that was not asked for to the first day for which the query can be answered; first is the
// first day that is kept. Where another was asked for, it is an accel.ErrInvalid.
func (a *account) answerable(first int) error {
	from, to := max(a.from, first), min(a.to, a.folded)
	if from >= to { // no folded day
		return nil
	}
	switch a.q.foldedKind() {
	case 0:
		if !a.q.From.IsZero() {
			return fmt.Errorf("%w: of days before %s there are sums by image, tenant or node, but not by these together: ask from that day, or by one of them", accel.ErrInvalid, dayText(a.folded))
		}
		a.from = a.folded
	case ofPair:
		begins := from == first || from == monthStart(monthOf(from))
		ends := to == a.folded || to == monthStart(monthOf(to))
		if !begins || !ends {
			return fmt.Errorf("%w: of days before %s there are sums by image and tenant together for whole months only: ask from and to the first of a month", accel.ErrInvalid, dayText(a.folded))
		}
	}
	return nil
}

// foldedDays adds the sums of folded days.
func (a *account) foldedDays() error {
	from, to := a.from, min(a.to, a.folded)
	if from >= to {
		return nil
	}
	kind := a.q.foldedKind()
	if kind == ofPair {
		return a.foldedRows(bucketMonths, ofPair, monthOf(from), monthOf(to-1)+1, func(_ int, of [2]uint32, r *row) error {
			if !a.wants(ofImage, of[0]) || !a.wants(ofTenant, of[1]) {
				return nil
			}
			text := a.texts.of(of[0])
			if a.q.By == ByTenant {
				text = a.texts.of(of[1])
			}
			g, err := a.group(text)
			if err != nil {
				return err
			}
			if err := g.addFolded(r); err != nil {
				return err
			}
			return a.total.addFolded(r)
		})
	}
	type part struct {
		month int
		name  uint32
	}
	parts := map[part][]*group{} // lines that take the percentiles of a name's month
	err := a.foldedRows(bucketFolded, kind, from, to, func(day int, of [2]uint32, r *row) error {
		if !a.wants(kind, of[0]) {
			return nil
		}
		text := dayText(day)
		if a.q.By != ByDay {
			text = a.texts.of(of[0])
		}
		g, err := a.group(text)
		if err != nil {
			return err
		}
		p := part{monthOf(day), of[0]}
		if in := parts[p]; len(in) == 0 || in[len(in)-1] != g {
			parts[p] = append(in, g)
		}
		if err := g.addFolded(r); err != nil {
			return err
		}
		return a.total.addFolded(r)
	})
	if err != nil || kind == ofAll {
		return err
	}
	all := a.q.Image == "" && a.q.Tenant == "" && a.q.Node == ""
	err = a.foldedRows(bucketMonths, kind, monthOf(from), monthOf(to-1)+1, func(month int, of [2]uint32, r *row) error {
		groups := parts[part{month, of[0]}]
		for _, g := range groups {
			if err := g.sketch.merge(r.sketch); err != nil {
				return err
			}
		}
		if all || len(groups) == 0 {
			return nil
		}
		return a.total.sketch.merge(r.sketch)
	})
	if err != nil || !all {
		return err
	}
	return a.foldedRows(bucketFolded, ofAll, from, to, func(_ int, _ [2]uint32, r *row) error {
		return a.total.sketch.merge(r.sketch)
	})
}

// addFolded adds a folded sum.
func (g *group) addFolded(r *row) error {
	g.merge(&r.sums)
	g.settled.merge(&r.sums)
	return g.sketch.merge(r.sketch)
}

// foldedRows calls each for the sums of a kind in [from, to), days or months, with their names.
func (a *account) foldedRows(bucket []byte, k kind, from, to int, each func(period int, of [2]uint32, r *row) error) error {
	c := a.bt.Bucket(bucket).Cursor()
	end := foldedKey(k, to)
	n := 0
	for key, v := c.Seek(foldedKey(k, from)); key != nil && bytes.Compare(key, end) < 0; key, v = c.Next() {
		if n++; n%1000 == 0 && a.ctx.Err() != nil {
			return a.ctx.Err()
		}
		period, names := key[1:], key[min(1+dayBytes, len(key)):]
		if len(names) != nameBytes && (len(names) != 2*nameBytes || k != ofPair) {
			return fmt.Errorf("%w: ledger %s: key %x of a folded sum", ErrDamaged, a.file.Path(), key)
		}
		of := [2]uint32{binary.BigEndian.Uint32(names)}
		if k == ofPair {
			of[1] = binary.BigEndian.Uint32(names[nameBytes:])
		}
		r, err := decodeRow(v)
		if err != nil {
			return fmt.Errorf("ledger %s: folded sum %x: %w", a.file.Path(), key, err)
		}
		if err := each(int(binary.BigEndian.Uint32(period)), of, &r); err != nil {
			return err
		}
	}
	return nil
}
