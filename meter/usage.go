package meter

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
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
//
// Of folded days (see LedgerOptions.KeepDetail) there are sums by image, by tenant and by node, but not by node
// and another of them together; those by image and tenant together are of whole months. Where a query asks for
// what there is not, a From that is zero is the first day for which there is, and any other is an error.
// Percentiles of folded days are those of their months, but for those of all pulls.
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
	err := l.file.View(func(bt *bbolt.Tx) (err error) {
		a := &account{Ledger: l, ctx: ctx, bt: bt, q: q, groups: map[string]*group{}, texts: texts{bt: bt, known: map[uint32]string{}}}
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
	from, to int // days, [from, to)
	folded   int // days before this one are folded
	groups   map[string]*group
	total    *group
	texts    texts
}

// group is a line on its way. What was saved depends on the image's baseline, so the savers' sums are kept
// for each image; those of folded days are settled.
type group struct {
	sums
	sketch  sketch
	images  map[uint32]*sums // of savers of days that are not folded
	settled sums             // of folded days
}

func newGroup() (*group, error) {
	s, err := newSketch()
	return &group{sketch: s}, err
}

func (g *group) add(image uint32, r *row) error {
	g.merge(&r.sums)
	if r.savers > 0 {
		if g.images == nil {
			g.images = map[uint32]*sums{}
		}
		if g.images[image] == nil {
			g.images[image] = &sums{}
		}
		g.images[image].merge(&r.sums)
	}
	return g.sketch.merge(r.sketch)
}

func (a *account) usage() (u Usage, err error) {
	if any, err := a.bound(); err != nil || !any {
		return Usage{Lines: []UsageLine{}}, err
	}
	if a.total, err = newGroup(); err != nil {
		return u, err
	}
	if err := errors.Join(a.foldedDays(), a.rows()); err != nil {
		return u, err
	}
	base, err := a.baselinesOf(a.bt, max(a.from, a.folded)-BaselineDays, a.to)
	if err != nil {
		return u, err
	}
	u = Usage{From: dayTimeOf(a.from), To: dayTimeOf(a.to), Lines: make([]UsageLine, 0, len(a.groups)), Total: a.line("", a.total, base)}
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
func (a *account) bound() (any bool, err error) {
	c := a.bt.Bucket(bucketDays).Cursor()
	k, _ := c.First()
	if k == nil {
		return false, nil
	}
	first := int(binary.BigEndian.Uint32(k))
	k, _ = c.Last()
	a.from, a.to, a.folded = first, int(binary.BigEndian.Uint32(k))+1, foldedBefore(a.bt)
	if !a.q.From.IsZero() {
		a.from = max(0, dayOf(a.q.From))
	}
	if !a.q.To.IsZero() {
		a.to = max(0, dayOf(a.q.To.Add(dayTime-1)))
	}
	if err := a.answerable(first); err != nil {
		return false, err
	}
	return a.from < a.to, nil
}

// group finds or makes the line of a text.
func (a *account) group(text string) (g *group, err error) {
	if g = a.groups[text]; g == nil {
		if g, err = newGroup(); err == nil {
			a.groups[text] = g
		}
	}
	return g, err
}

// rows adds the roll-ups of days that are not folded, or not wholly.
func (a *account) rows() error {
	c := a.bt.Bucket(bucketRollups).Cursor()
	end := dayKey(a.to)
	n := 0
	for k, v := c.Seek(dayKey(a.from)); k != nil && bytes.Compare(k[:dayBytes], end) < 0; k, v = c.Next() {
		if n++; n%1000 == 0 && a.ctx.Err() != nil {
			return a.ctx.Err()
		}
		of, err := namesOf(k)
		if err != nil {
			return fmt.Errorf("ledger %s: %w", a.file.Path(), err)
		}
		if !a.wants(ofImage, of.image) || !a.wants(ofTenant, of.tenant) || !a.wants(ofNode, of.node) {
			continue
		}
		var text string
		switch a.q.By {
		case ByImage:
			text = a.texts.of(of.image)
		case ByTenant:
			text = a.texts.of(of.tenant)
		case ByNode:
			text = a.texts.of(of.node)
		default:
			text = dayText(int(binary.BigEndian.Uint32(k)))
		}
		r, err := decodeRow(v)
		if err != nil {
			return fmt.Errorf("ledger %s: roll-up %x: %w", a.file.Path(), k, err)
		}
		g, err := a.group(text)
		if err != nil {
			return err
		}
		if err := errors.Join(g.add(of.image, &r), a.total.add(of.image, &r)); err != nil {
			return err
		}
	}
	return nil
}

// wants reports whether the query selects what has a name.
func (a *account) wants(k kind, name uint32) bool {
	switch k {
	case ofImage:
		return a.q.Image == "" || matchesImage(a.texts.of(name), a.q.Image)
	case ofTenant:
		return a.q.Tenant == "" || a.texts.of(name) == a.q.Tenant
	case ofNode:
		return a.q.Node == "" || a.texts.of(name) == a.q.Node
	}
	return true
}

func dayText(day int) string { return dayTimeOf(day).Format(time.DateOnly) }

func (a *account) line(text string, g *group, base *baselines) UsageLine {
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
	saved := g.settled
	for image, s := range g.images {
		known := *s
		known.settle(base.of(image))
		saved.merge(&known)
	}
	l.NoBaseline = saved.noBaseline
	l.GBSecondsSaved = (saved.wouldArea.float() - saved.saverBilledArea.float() + (saved.wouldPlain.float()-saved.saverBilledPlain.float())*memory) / gbSecond
	return l
}

func ratio(part, all float64) float64 {
	if all == 0 {
		return 0
	}
	return part / all
}
