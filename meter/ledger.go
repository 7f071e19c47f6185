package meter

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"accel"
	"accel/internal/boltfile"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
)

// LedgerOptions: zero values take the defaults named.
type LedgerOptions struct {
	// KeepPulls is how long single pulls are kept; 30 days. KeepRollups is how long the days' sums
	// are; 400 days, and never less than KeepPulls. Age counts from now, or from the day after the
	// newest pull where that is earlier, so that a clock that jumped ahead removes nothing.
	KeepPulls, KeepRollups time.Duration
	// KeepDetail is how long a day's roll-ups are kept apart by image, tenant and node; 7 days. Older
	// days are folded: then they can be asked for by one of these only, see Query.
	KeepDetail time.Duration
	// MaxPulls bounds the single pulls that are kept, about 120 bytes each; 2,000,000. The
	// oldest make room. Their sums stay.
	MaxPulls int
	// MaxDayRows bounds a day's roll-ups (one for each image, tenant and node, about 100
	// bytes); 100,000. What comes above that is counted under the image OtherImage, and above
	// a quarter more under the tenant and node Other too.
	MaxDayRows int
	Billing    Billing
	Log        *slog.Logger          // nil: silent
	Registerer prometheus.Registerer // nil: not registered
	Now        func() time.Time      // time.Now
}

// What is counted above MaxDayRows has these names.
const (
	OtherImage = "(other images)"
	Other      = "(other)"
)

const (
	ledgerFormat = "accel ledger 2"
	// oldLedger had no folded days; it is taken over.
	oldLedger  = "accel ledger 1"
	pruneEvery = time.Hour
	// pruneBatch is how much is removed in one transaction, for which others wait.
	pruneBatch = 5000
	dayTime    = 24 * time.Hour
	dayBytes   = 4 // of keys
	nameBytes  = 4
)

// Buckets, with their keys and values. "day" is 4 bytes big-endian, days since 1970 in
// UTC; a name is 4 bytes, zero for the empty one.
var (
	bucketRollups  = []byte("rollups")  // day image tenant node -> row
	bucketBaseline = []byte("baseline") // day image -> sketch of seconds; image zero: sketch of bytes per second
	bucketFolded   = []byte("folded")   // kind day name -> row, see fold.go
	bucketMonths   = []byte("months")   // kind month name, or two -> row
	bucketDays     = []byte("days")     // day -> number of its roll-ups and folded sums
	bucketNames    = []byte("names")    // text -> name
	bucketTexts    = []byte("texts")    // name -> text

	ledgerBuckets = [][]byte{bucketPulls, bucketRollups, bucketFolded, bucketMonths, bucketBaseline, bucketDays, bucketNames, bucketTexts}

	keyCount   = []byte("pulls")   // number of pulls
	keyFolded  = []byte("folded")  // days before this one are folded
	keySweep   = []byte("sweep")   // there: names may be unused
	keyHorizon = []byte("horizon") // pulls up to this id were removed, so that one that comes again cannot be told
)

// noName is the empty text's short form.
var noName = make([]byte, nameBytes)

// Ledger is the server's account of pulls: each once, and the sums of each day for longer. It is safe
// for concurrent use. Errors of its methods that match none of accel's sentinels come
// from the file or from ctx.
type Ledger struct {
	o       LedgerOptions
	file    *boltfile.File
	metrics *ledgerMetrics
	batch   int         // foldBatch, but for tests
	full    atomic.Bool // the last Add found no room

	pruning sync.Mutex // held by Prune
	// sweeping holds the names that were given out since a sweep began; nil: there is none. It belongs
	// to the writing transaction, of which there is one at a time.
	sweeping map[uint32]bool
}

// OpenLedger opens the ledger in the file path, or makes it. ErrLocked when another
// process has it; ErrDamaged when it is no whole ledger.
func OpenLedger(path string, o LedgerOptions) (*Ledger, error) {
	o.KeepPulls = cmp.Or(o.KeepPulls, 30*dayTime)
	o.KeepRollups = max(cmp.Or(o.KeepRollups, 400*dayTime), o.KeepPulls)
	o.KeepDetail = cmp.Or(o.KeepDetail, 7*dayTime)
	o.MaxPulls = cmp.Or(o.MaxPulls, 2_000_000)
	o.MaxDayRows = cmp.Or(o.MaxDayRows, 100_000)
	if o.KeepPulls < 0 || o.KeepDetail < 0 || o.MaxPulls < 0 || o.MaxDayRows < 0 {
		return nil, fmt.Errorf("%w: a bound of the ledger is negative", accel.ErrInvalid)
	}
	if o.Billing.Free == nil {
		o.Billing.Free = []accel.Outcome{accel.OutcomeHit}
	}
	if err := o.Billing.Validate(); err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	l := &Ledger{o: o, batch: foldBatch}
	var err error
	l.file, err = boltfile.Open(path, boltfile.Schema{Format: ledgerFormat, Older: oldLedger, Buckets: ledgerBuckets})
	if errors.Is(err, ErrDamaged) {
		return nil, fmt.Errorf("%w (restore it, or move it away: what it counted is lost then, and nodes report what they still have)", err)
	}
	if err != nil {
		return nil, err
	}
	if l.metrics, err = newLedgerMetrics(o.Registerer, l); err != nil {
		return nil, errors.Join(err, l.file.Close())
	}
	return l, nil
}

// Close waits for running calls and closes the file. A second Close is no error.
func (l *Ledger) Close() error { return l.file.Close() }

// Receipt says what became of reported pulls.
type Receipt struct {
	Accepted   int `json:"accepted" doc:"counted now"`
	Duplicates int `json:"duplicates" doc:"counted before"`
	Late       int `json:"late" doc:"older than what is kept, so that it cannot be told whether they were counted; they are not"`
}

// Add counts pulls that were not counted before; when it returns nil that is on disk. Pulls
// may come in any order and many times. An accel.ErrInvalid names the first that cannot
// be; then none is counted. ErrFull: none could be, for there is no room.
func (l *Ledger) Add(ctx context.Context, pulls []accel.Pull) (Receipt, error) {
	if err := ctx.Err(); err != nil {
		return Receipt{}, err
	}
	now := l.o.Now()
	for i := range pulls {
		if err := Validate(pulls[i], now); err != nil {
			l.metrics.results.WithLabelValues("invalid").Add(float64(len(pulls)))
			return Receipt{}, err
		}
	}
	var e *entry
	err := l.file.Update(func(bt *bbolt.Tx) error {
		e = &entry{Ledger: l, bt: bt}
		for i := range pulls {
			if err := e.add(&pulls[i]); err != nil {
				return err
			}
		}
		if e.folding != nil {
			if err := e.folding.write(bt); err != nil {
				return err
			}
		}
		return e.makeRoom()
	})
	l.noteRoom(err)
	if err != nil {
		return Receipt{}, l.located(err)
	}
	l.metrics.added(e, pulls)
	return e.receipt, nil
}

// noteRoom logs when the disk becomes full and when it is no more, not each failure.
func (l *Ledger) noteRoom(err error) {
	switch full := errors.Is(err, ErrFull); {
	case full && !l.full.Swap(true):
		l.o.Log.Error("the ledger's disk is full: reported pulls are not taken, and wait on their nodes", "file", l.file.Path(), "error", err)
	case err == nil && l.full.Swap(false):
		l.o.Log.Info("the ledger takes pulls again", "file", l.file.Path())
	}
}

// located adds the file's name to errors of bbolt.
func (l *Ledger) located(err error) error {
	if err == nil || errors.Is(err, accel.ErrInvalid) || errors.Is(err, ErrDamaged) || errors.Is(err, ErrClosed) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("ledger %s: %w", l.file.Path(), err)
}

// entry is one transaction that adds pulls.
type entry struct {
	*Ledger
	bt      *bbolt.Tx
	receipt Receipt
	counted []int // places of the accepted ones
	place   int

	folding *folding           // of pulls of folded days; nil: none
	bases   map[int]*baselines // of folded days
}

func (e *entry) add(p *accel.Pull) error {
	place := e.place
	e.place++
	key, err := idKey(p.ID)
	if err != nil {
		return err
	}
	b := e.bt.Bucket(bucketPulls)
	switch {
	case b.Get(key) != nil:
		e.receipt.Duplicates++
		return nil
	case bytes.Compare(key, e.bt.Bucket(boltfile.Meta).Get(keyHorizon)) <= 0:
		e.receipt.Late++
		return nil
	}
	e.receipt.Accepted++
	e.counted = append(e.counted, place)
	if err := e.count(1); err != nil {
		return err
	}
	count := e.rollUp
	if dayOf(p.Start) < foldedBefore(e.bt) {
		count = e.addFolded
	}
	if err := count(p); err != nil {
		return err
	}
	// Now it has its names, or is counted among others.
	raw, err := encodeKept(p, func(text string) ([]byte, error) { return e.name(text, false) })
	if err != nil {
		return err
	}
	b.FillPercent = 0.9 // ids come nearly in order
	if err := b.Put(key, raw); err != nil {
		return err
	}
	return e.baseline(p)
}

func (e *entry) rollUp(p *accel.Pull) error {
	key, old, err := e.rollupKey(p)
	if err != nil {
		return err
	}
	r, err := decodeRow(old)
	if err != nil {
		return err
	}
	if err := r.add(p, e.o.Billing); err != nil {
		return err
	}
	return e.bt.Bucket(bucketRollups).Put(key, r.encode())
}

// rollupKey finds the roll-up of p, which is a wider one where the day has too many.
func (e *entry) rollupKey(p *accel.Pull) (key, old []byte, err error) {
	b, days := e.bt.Bucket(bucketRollups), e.bt.Bucket(bucketDays)
	day := dayKey(dayOf(p.Start))
	rows := number(days.Get(day))
	for _, wider := range []struct {
		names [3]string
		full  bool
	}{
		{[3]string{p.Image, p.Tenant, p.Node}, rows >= uint64(e.o.MaxDayRows)},
		{[3]string{OtherImage, p.Tenant, p.Node}, rows >= uint64(e.o.MaxDayRows+e.o.MaxDayRows/4)},
		{[3]string{OtherImage, Other, Other}, false},
	} {
		key, known := bytes.Clone(day), true
		for _, text := range wider.names {
			name, err := e.name(text, !wider.full)
			if err != nil {
				return nil, nil, err
			}
			known = known && name != nil
			key = append(key, name...)
		}
		if !known {
			continue
		}
		if old = b.Get(key); old != nil {
			return key, old, nil
		}
		if !wider.full {
			return key, nil, days.Put(day, numberKey(rows+1))
		}
	}
	return nil, nil, errors.New("no roll-up for a pull") // the last one always is
}

// name is the short form of a text; nil where there is none and it is not to be made.
func (e *entry) name(text string, create bool) ([]byte, error) {
	if text == "" {
		return noName, nil
	}
	names := e.bt.Bucket(bucketNames)
	if n := names.Get([]byte(text)); n != nil || !create {
		if n != nil && e.sweeping != nil {
			e.sweeping[binary.BigEndian.Uint32(n)] = true
		}
		return n, nil
	}
	texts := e.bt.Bucket(bucketTexts)
	seq, err := texts.NextSequence()
	if err != nil {
		return nil, err
	}
	if e.sweeping != nil {
		e.sweeping[uint32(seq)] = true
	}
	if seq > 1<<32-1 {
		return nil, fmt.Errorf("ledger %s: it has seen 2^32 names; move it away and begin a new one", e.file.Path())
	}
	n := binary.BigEndian.AppendUint32(nil, uint32(seq))
	return n, errors.Join(names.Put([]byte(text), n), texts.Put(n, []byte(text)))
}

// baseline keeps what a download from the registry shows.
func (e *entry) baseline(p *accel.Pull) error {
	if !isBaseline(p) || p.Duration <= 0 {
		return nil
	}
	day := dayKey(dayOf(p.Start))
	image, err := e.name(p.Image, false) // it has one, or is counted among others
	if err != nil {
		return err
	}
	if image != nil && !bytes.Equal(image, noName) {
		if err := e.sketch(slices.Concat(day, image), p.Duration.Seconds()); err != nil {
			return err
		}
	}
	if p.RegistryBytes == 0 {
		return nil
	}
	return e.sketch(slices.Concat(day, noName), float64(p.RegistryBytes)/p.Duration.Seconds())
}

func (e *entry) sketch(key []byte, value float64) error {
	b := e.bt.Bucket(bucketBaseline)
	s, err := sketchOf(b.Get(key), value)
	if err != nil {
		return err
	}
	return b.Put(key, s)
}

func (e *entry) count(n int) error {
	m := e.bt.Bucket(boltfile.Meta)
	return m.Put(keyCount, numberKey(uint64(int64(number(m.Get(keyCount)))+int64(n))))
}

// makeRoom removes the oldest pulls above the bound.
func (e *entry) makeRoom() error {
	over := int(number(e.bt.Bucket(boltfile.Meta).Get(keyCount))) - e.o.MaxPulls
	if over <= 0 {
		return nil
	}
	_, err := e.removePulls(min(over, pruneBatch), nil)
	return err
}

// removePulls removes up to n of the oldest pulls that are less than end (nil: all), and
// moves the horizon past them.
func (e *entry) removePulls(n int, end []byte) (removed int, err error) {
	b := e.bt.Bucket(bucketPulls)
	c := b.Cursor()
	var keys [][]byte
	for k, _ := c.First(); k != nil && len(keys) < n && (end == nil || bytes.Compare(k, end) < 0); k, _ = c.Next() {
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return 0, nil
	}
	horizon := bytes.Clone(keys[len(keys)-1])
	for _, k := range keys {
		if err := b.Delete(bytes.Clone(k)); err != nil {
			return 0, err
		}
	}
	if err := e.count(-len(keys)); err != nil {
		return 0, err
	}
	return len(keys), e.bt.Bucket(boltfile.Meta).Put(keyHorizon, horizon)
}

func dayOf(t time.Time) int { return int(t.Unix() / int64(dayTime/time.Second)) }

func dayKey(day int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(max(0, day))) }

func dayTimeOf(day int) time.Time { return time.Unix(int64(day)*int64(dayTime/time.Second), 0).UTC() }

func numberKey(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func number(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}
