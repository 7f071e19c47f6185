package meter

import (
	"errors"
	"iter"
	"maps"
	"slices"
	"time"

	"accel"
	"accel/internal/boltfile"

	"go.etcd.io/bbolt"
)

// What the tests of rows and sums look at.
var (
	EncodePull = encodePull
	DecodeRow  = decodeRow
)

func DecodePull(key, b []byte) (accel.Pull, error) { return decodePull(key, b, nil) }

// KeepPull is what a pull is after it was kept in a ledger that knows some names.
func KeepPull(p accel.Pull, known ...string) (accel.Pull, error) {
	key, err := idKey(p.ID)
	if err != nil {
		return p, err
	}
	b, err := encodeKept(&p, func(text string) ([]byte, error) {
		if i := slices.Index(known, text); i >= 0 {
			return []byte{0, 0, 0, byte(i)}, nil
		}
		return nil, nil
	})
	if err != nil {
		return p, err
	}
	return decodePull(key, b, func(name uint32) string { return known[name] })
}

type Total = total

func (r *row) Encode() []byte               { return r.encode() }
func (t *Total) AddProduct(a, b int64)      { t.addProduct(a, b) }
func (t Total) Encode() []byte              { return t.encode() }
func (t Total) Parts() (hi, lo uint64)      { return t.hi, t.lo }
func DecodeTotal(b []byte) (Total, error)   { return decodeTotal(b) }
func (l *Ledger) Names() (n int, err error) { return l.rowsOf(bucketNames) }
func (l *Ledger) Rows() (n int, err error)  { return l.rowsOf(bucketRollups) }
func (l *Ledger) Bases() (n int, err error) { return l.rowsOf(bucketBaseline) }

// FoldBy makes l fold so many roll-ups in a transaction.
func (l *Ledger) FoldBy(n int) { l.batch = n }

func (l *Ledger) rowsOf(bucket []byte) (n int, err error) {
	err = l.file.View(func(bt *bbolt.Tx) error {
		n = bt.Bucket(bucket).Stats().KeyN
		return nil
	})
	return n, err
}

// Sizes are the rows and MB of each table.
func (l *Ledger) Sizes() (map[string][2]int, error) {
	sizes := map[string][2]int{}
	return sizes, l.file.View(func(bt *bbolt.Tx) error {
		for _, name := range ledgerBuckets {
			s := bt.Bucket(name).Stats()
			sizes[string(name)] = [2]int{s.KeyN, (s.LeafAlloc + s.BranchAlloc) >> 20}
		}
		sizes["free"] = [2]int{0, bt.DB().Stats().FreeAlloc >> 20}
		return nil
	})
}

// Day is what a day's pulls make of a ledger, but for the single pulls.
type Day struct {
	rows     map[[3]string][]byte
	baseline map[string][]byte // by image; empty: bytes per second
}

// DayOf adds a day's pulls up.
func DayOf(pulls iter.Seq[accel.Pull]) (*Day, error) {
	rows, baseline := map[[3]string]*row{}, map[string]sketch{}
	for p := range pulls {
		key := [3]string{p.Image, p.Tenant, p.Node}
		if rows[key] == nil {
			rows[key] = &row{}
		}
		if err := rows[key].add(&p, Billing{Free: []accel.Outcome{accel.OutcomeHit}}); err != nil {
			return nil, err
		}
		if !isBaseline(&p) {
			continue
		}
		for of, x := range map[string]float64{p.Image: p.Duration.Seconds(), "": float64(p.RegistryBytes) / p.Duration.Seconds()} {
			s, ok := baseline[of]
			if !ok {
				var err error
				if s, err = newSketch(); err != nil {
					return nil, err
				}
				baseline[of] = s
			}
			if err := s.add(x); err != nil {
				return nil, err
			}
		}
	}
	d := &Day{map[[3]string][]byte{}, map[string][]byte{}}
	for key, r := range rows {
		d.rows[key] = r.encode()
	}
	for image, s := range baseline {
		d.baseline[image] = s.encode()
	}
	return d, nil
}

// PutDay writes a day as if its pulls had been added.
func (l *Ledger) PutDay(at time.Time, d *Day) error {
	return l.file.Update(func(bt *bbolt.Tx) error {
		e := &entry{Ledger: l, bt: bt}
		day := dayKey(dayOf(at))
		known := map[string][]byte{}
		key := func(texts ...string) (string, error) {
			k := slices.Clone(day)
			for _, text := range texts {
				if known[text] == nil {
					n, err := e.name(text, true)
					if err != nil {
						return "", err
					}
					known[text] = slices.Clone(n)
				}
				k = append(k, known[text]...)
			}
			return string(k), nil
		}
		rows := map[string][]byte{}
		for texts, r := range d.rows {
			k, err := key(texts[:]...)
			if err != nil {
				return err
			}
			rows[k] = r
		}
		b := bt.Bucket(bucketRollups)
		b.FillPercent = 0.7 // as full as they get where rows come in any order
		for _, k := range slices.Sorted(maps.Keys(rows)) {
			if err := b.Put([]byte(k), rows[k]); err != nil {
				return err
			}
		}
		for image, s := range d.baseline {
			k, err := key(image)
			if err != nil {
				return err
			}
			if err := bt.Bucket(bucketBaseline).Put([]byte(k), s); err != nil {
				return err
			}
		}
		return addRows(bt, day, len(rows))
	})
}

// MakeOld makes the ledger in a file, which has nothing folded, one of the older format.
func MakeOld(path string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	return errors.Join(db.Update(func(bt *bbolt.Tx) error {
		return errors.Join(bt.DeleteBucket(bucketFolded), bt.DeleteBucket(bucketMonths), bt.Bucket(boltfile.Meta).Put(boltfile.Format, []byte(oldLedger)))
	}), db.Close())
}
