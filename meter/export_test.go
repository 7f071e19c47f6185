package meter

import "go.etcd.io/bbolt"

// What the tests of rows and sums look at.
var (
	EncodePull = encodePull
	DecodePull = decodePull
	DecodeRow  = decodeRow
)

type Total = total

func (r *row) Encode() []byte               { return r.encode() }
func (t *Total) AddProduct(a, b int64)      { t.addProduct(a, b) }
func (t Total) Encode() []byte              { return t.encode() }
func (t Total) Parts() (hi, lo uint64)      { return t.hi, t.lo }
func DecodeTotal(b []byte) (Total, error)   { return decodeTotal(b) }
func (l *Ledger) Names() (n int, err error) { return l.rowsOf(bucketNames) }
func (l *Ledger) Rows() (n int, err error)  { return l.rowsOf(bucketRollups) }
func (l *Ledger) Bases() (n int, err error) { return l.rowsOf(bucketBaseline) }

func (l *Ledger) rowsOf(bucket []byte) (n int, err error) {
	err = l.file.view(func(bt *bbolt.Tx) error {
		n = bt.Bucket(bucket).Stats().KeyN
		return nil
	})
	return n, err
}
