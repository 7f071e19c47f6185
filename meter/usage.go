package meter

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"accel"

	"go.etcd.io/bbolt"
)

// What usage is added up by.
const (
	ByImage  = "image"
	ByTenant = "tenant"
	ByNode   = "node"
	ByDay    = "day"
)

// Query asks for usage. Days are UTC's, and a pull belongs to the day on which it started.
type Query struct {
	By string // a By constant
	// Only these; empty: all. Image may be a repository, "host/path".
	Image, Tenant, Node string
	// MemoryBytes are those of pulls for which the platform passed none; more than 0.
	MemoryBytes int64
	// From is the first day, zero: the first that is kept. To is the day after the last, zero: after
	// the newest. Both are times of which the day counts; a To within a day takes this day in.
	From, To time.Time
	// Limit bounds the lines; 0: all. Those with most pulls come first, days in their order.
	Limit int
}

// Usage answers a Query.
type Usage struct {
	From, To time.Time // what was looked at, [From, To); zero where there is nothing
	Lines    []UsageLine
	More     int // lines above the limit
	Total    UsageLine
}

// UsageLine adds up the pulls of one image, tenant, node or day.
type UsageLine struct {
	Key                                  string // empty for pulls of no tenant, and for the total
	Pulls, Hits, Partial, Misses, Errors int64
	Lazy                                 int64 // of Pulls
	RegistryBytes, PeerBytes             int64
	CacheBytes                           int64
	// HitRatio is Hits to the pulls that were no error; HitRatioBytes the layer bytes that did not come
	// from the registry to all. 0 where there is nothing to divide by.
	HitRatio, HitRatioBytes float64
	// Seconds of pulls that were no error: their sum, and percentiles within 1 %.
	Seconds       float64
	P50, P90, P99 float64
	// See Billing. NoBaseline counts the pulls for which it is not known what was saved.
	GBSecondsBilled, GBSecondsSaved float64
	NoBaseline                      int64
}

// Usage adds pulls up from the days' roll-ups. accel.ErrInvalid for a query that makes no sense.
func (l *Ledger) Usage(ctx context.Context, q Query) (Usage, error) {
	switch {
	case q.By != ByImage && q.By != ByTenant && q.By != ByNode && q.By != ByDay:
		return Usage{}, fmt.Errorf("%w: by %.20q: want image, tenant, node or day", accel.ErrInvalid, q.By)
	case q.MemoryBytes <= 0 || q.MemoryBytes > maxMemory:
		return Usage{}, fmt.Errorf("%w: memory of %d bytes: want 1 to %d", accel.ErrInvalid, q.MemoryBytes, int64(maxMemory))
	case !q.From.IsZero() && !q.To.IsZero() && !q.To.After(q.From):
		return Usage{}, fmt.Errorf("%w: to is not after from", accel.ErrInvalid)
	}
	var u Usage
	err := l.file.view(func(bt *bbolt.Tx) (err error) {
		a := &account{Ledger: l, ctx: ctx, bt: bt, q: q, groups: map[string]*group{}, images: map[uint32]string{}}
		u, err = a.usage()
		return err
	})
	return u, l.located(err)
}

// account is one query on its way.
type account struct {
	*Ledger
	ctx      context.Context
	bt       *bbolt.Tx
	q        Query
	from, to []byte // keys of days, [from, to)
	groups   map[string]*group
	images   map[uint32]string // texts that were looked up
}

// group is a line on its way. What was saved depends on the image's baseline, so the
// savers' sums are kept for each image.
type group struct {
	sums
	sketch sketch
	images map[uint32]*sums
}

func newGroup() (*group, error) {
	s, err := newSketch()
	return &group{sketch: s, images: map[uint32]*sums{}}, err
}

func (g *group) add(image uint32, r *row) error {
	g.merge(&r.sums)
	if r.savers > 0 {
		if g.images[image] == nil {
			g.images[image] = &sums{}
		}
		g.images[image].merge(&r.sums)
	}
	return g.sketch.merge(r.sketch)
}

func (a *account) usage() (Usage, error) {
	if !a.bound() {
		return Usage{Lines: []UsageLine{}}, nil
	}
	total, err := newGroup()
	if err != nil {
		return Usage{}, err
	}
	if err := a.rows(func(text string, image uint32, r *row) error {
		g := a.groups[text]
		if g == nil {
			if g, err = newGroup(); err != nil {
				return err
			}
			a.groups[text] = g
		}
		return errors.Join(g.add(image, r), total.add(image, r))
	}); err != nil {
		return Usage{}, err
	}
	base, err := a.baselines()
	if err != nil {
		return Usage{}, err
	}
	u := Usage{From: dayTimeOf(int(binary.BigEndian.Uint32(a.from))), To: dayTimeOf(int(binary.BigEndian.Uint32(a.to))), Lines: make([]UsageLine, 0, len(a.groups)), Total: a.line("", total, base)}
	for text, g := range a.groups {
		u.Lines = append(u.Lines, a.line(text, g, base))
	}
	slices.SortFunc(u.Lines, func(x, y UsageLine) int {
		if a.q.By == ByDay {
			return cmp.Compare(x.Key, y.Key)
		}
		return cmp.Or(cmp.Compare(y.Pulls, x.Pulls), cmp.Compare(x.Key, y.Key))
	})
	if a.q.Limit > 0 && len(u.Lines) > a.q.Limit {
		u.More = len(u.Lines) - a.q.Limit
		u.Lines = u.Lines[:a.q.Limit]
	}
	return u, nil
}

// bound finds the days that are looked at; false where there are none.
func (a *account) bound() bool {
	c := a.bt.Bucket(bucketDays).Cursor()
	first, _ := c.First()
	last, _ := c.Last()
	if first == nil {
		return false
	}
	from, to := int(binary.BigEndian.Uint32(first)), int(binary.BigEndian.Uint32(last))+1
	if !a.q.From.IsZero() {
		from = max(0, dayOf(a.q.From))
	}
	if !a.q.To.IsZero() {
		to = max(0, dayOf(a.q.To.Add(dayTime-1)))
	}
	a.from, a.to = dayKey(from), dayKey(to)
	return from < to
}

// rows calls each for every roll-up of the days that is asked for, with the text that it is added up by.
func (a *account) rows(each func(text string, image uint32, r *row) error) error {
	c := a.bt.Bucket(bucketRollups).Cursor()
	n := 0
	for k, v := c.Seek(a.from); k != nil && bytes.Compare(k[:dayBytes], a.to) < 0; k, v = c.Next() {
		if n++; n%1000 == 0 && a.ctx.Err() != nil {
			return a.ctx.Err()
		}
		if len(k) != dayBytes+3*nameBytes {
			return fmt.Errorf("%w: ledger %s: key %x of a roll-up", ErrDamaged, a.file.path, k)
		}
		var names [3]uint32
		for i := range names {
			names[i] = binary.BigEndian.Uint32(k[dayBytes+i*nameBytes:])
		}
		image, tenant, node := names[0], names[1], names[2]
		if a.q.Image != "" && !matchesImage(a.text(image), a.q.Image) || a.q.Tenant != "" && a.text(tenant) != a.q.Tenant || a.q.Node != "" && a.text(node) != a.q.Node {
			continue
		}
		var text string
		switch a.q.By {
		case ByImage:
			text = a.text(image)
		case ByTenant:
			text = a.text(tenant)
		case ByNode:
			text = a.text(node)
		default:
			text = dayTimeOf(int(binary.BigEndian.Uint32(k))).Format(time.DateOnly)
		}
		r, err := decodeRow(v)
		if err != nil {
			return fmt.Errorf("ledger %s: roll-up %x: %w", a.file.path, k, err)
		}
		if err := each(text, image, &r); err != nil {
			return err
		}
	}
	return nil
}

func (a *account) text(name uint32) string {
	if name == 0 {
		return ""
	}
	t, ok := a.images[name]
	if !ok {
		t = string(a.bt.Bucket(bucketTexts).Get(binary.BigEndian.AppendUint32(nil, name)))
		a.images[name] = t
	}
	return t
}

// baselines are what downloads took without accel.
type baselines struct {
	seconds    map[uint32]sketch // by image
	throughput sketch            // bytes per second
}

func (a *account) baselines() (b baselines, err error) {
	b.seconds = map[uint32]sketch{}
	if b.throughput, err = newSketch(); err != nil {
		return b, err
	}
	from := dayKey(int(binary.BigEndian.Uint32(a.from)) - BaselineDays)
	c := a.bt.Bucket(bucketBaseline).Cursor()
	for k, v := c.Seek(from); k != nil && bytes.Compare(k[:dayBytes], a.to) < 0; k, v = c.Next() {
		if len(k) != dayBytes+nameBytes {
			return b, fmt.Errorf("%w: ledger %s: key %x of a baseline", ErrDamaged, a.file.path, k)
		}
		s := b.throughput
		if image := binary.BigEndian.Uint32(k[dayBytes:]); image != 0 {
			var ok bool
			if s, ok = b.seconds[image]; !ok {
				if s, err = newSketch(); err != nil {
					return b, err
				}
				b.seconds[image] = s
			}
		}
		if err := s.merge(v); err != nil {
			return b, err
		}
	}
	return b, nil
}

func (a *account) line(text string, g *group, base baselines) UsageLine {
	l := UsageLine{
		Key: text, RegistryBytes: g.registry.number(), PeerBytes: g.peer.number(), CacheBytes: g.cache.number(),
		Seconds: g.duration.float() / 1e9,
	}
	for i, n := range []*int64{&l.Hits, &l.Partial, &l.Misses, &l.Errors} {
		for _, c := range g.counts[i] {
			*n += c
		}
		l.Pulls += *n
		l.Lazy += g.counts[i][slices.Index(modes, accel.PullLazy)]
	}
	l.HitRatio = ratio(float64(l.Hits), float64(l.Pulls-l.Errors))
	elsewhere := g.peer
	elsewhere.add(g.cache)
	all := elsewhere
	all.add(g.registry)
	l.HitRatioBytes = ratio(elsewhere.float(), all.float())
	l.P50, _ = g.sketch.quantile(0.5)
	l.P90, _ = g.sketch.quantile(0.9)
	l.P99, _ = g.sketch.quantile(0.99)
	memory := float64(a.q.MemoryBytes)
	l.GBSecondsBilled = (g.billedArea.float() + g.billedPlain.float()*memory) / gbSecond
	// In the order of images, so that the sum of floats is always the same.
	for _, image := range slices.Sorted(maps.Keys(g.images)) {
		s := g.images[image]
		nanos, known := a.wouldCost(s, image, base, memory)
		if !known {
			l.NoBaseline += s.savers
			continue
		}
		l.GBSecondsSaved += (nanos - s.saverBilledArea.float() - s.saverBilledPlain.float()*memory) / gbSecond
	}
	return l
}

// wouldCost estimates what savers of an image would have been billed for without accel, in bytes times nanoseconds.
func (a *account) wouldCost(s *sums, image uint32, base baselines, memory float64) (area float64, known bool) {
	if sk, ok := base.seconds[image]; ok {
		if median, ok := sk.quantile(0.5); ok {
			each := float64(a.o.Billing.priced(time.Duration(median * 1e9)))
			return each * (s.saversMemory.float() + float64(s.saversPlain)*memory), true
		}
	}
	if speed, ok := base.throughput.quantile(0.5); ok && speed > 0 {
		return (s.saverBytesArea.float() + s.saverBytesPlain.float()*memory) / speed * 1e9, true
	}
	return 0, false
}

func ratio(part, all float64) float64 {
	if all == 0 {
		return 0
	}
	return part / all
}
