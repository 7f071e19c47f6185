package lazy

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"accel"
	"accel/snapshot"

	"github.com/opencontainers/go-digest"
)

const (
	// pullTime is how long a lazy pull is looked at before it is recorded without having been
	// completed, and how long one is remembered of which containerd downloads layers.
	pullTime = 2 * time.Minute
	// quietTime is how long containerd must ask for nothing of an image before its pull is over although its topmost
	// layer was not asked for; longer than a layer may take (snapshot.Options.Limit), and the same as package meter's.
	quietTime = 5 * time.Second
	// lookTime is how exact the time of completion is.
	lookTime = 250 * time.Millisecond
	// maxPulls bounds those that are looked at at a time.
	maxPulls = 1024
)

// pulls measures each image from the first layer that containerd asks for until all of its content is
// there. What containerd did before (it reads the manifest and the config) is not in it.
//
// containerd asks for a pull's layers one after the other, the topmost last, and only for those that it lacks in the pull's
// namespace. The answer to each, mounted now or there already, is what is told of the pull. So no other image's layers
// say anything of it, and where the topmost comes into the namespace by another pull meanwhile, nothing is told at all.
type pulls struct {
	record func(accel.Pull)
	counts func(digest.Digest) counts

	mu    sync.Mutex
	under []*pull // in the order of their starts
}

// pull is one image that is being mounted or filled.
type pull struct {
	img       *image
	name      string // as it was asked for
	namespace string // containerd's
	start     time.Time
	asked     int       // the index of the layer that was asked for last
	pending   bool      // it was not answered yet
	touched   time.Time // by a question or an answer
	there     time.Time // of the last answer that a layer is there; zero: none was
	mounted   time.Time // when all layers were, or the last that is known of; zero: it goes on
	declined  bool      // containerd downloads layers of it, so that package meter counts it
	answer    time.Time // of the first read that had to wait; zero: none did
	followed  bool      // by a further pull of the image
	// Of its layers: when it started, and when a further pull with the layer did, whose bytes are those that come from then on.
	before, after map[digest.Digest]counts
}

// counts are what a layer has had done to it, and what it has.
type counts struct {
	fetched, copied int64 // bytes of the blob that came over the network, and that other layers had
	present, size   int64 // bytes of the blob, the present ones estimated by the share of its chunks
	misses          int64
	missBytes       int64 // of content that they waited for
	demanded        int64 // bytes of the blob that came because they did, and not ahead
	waited          time.Duration
}

// asked notes that containerd asks for a layer of an image, since a time.
func (p *pulls) asked(img *image, r snapshot.Request, since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.quiet(since)
	i := img.chains[r.Chain]
	u := p.goesOn(r, i)
	if u == nil {
		if len(p.under) >= maxPulls {
			return
		}
		u = &pull{img: img, name: r.Reference, namespace: r.Namespace, start: since, before: map[digest.Digest]counts{}, after: map[digest.Digest]counts{}}
		for _, y := range img.layers {
			u.before[y.Digest] = p.counts(y.Digest)
		}
		for _, earlier := range p.under {
			earlier.followed = earlier.followed || earlier.img.manifest == img.manifest
			earlier.passTo(u)
		}
		p.under = append(p.under, u)
	}
	u.asked, u.pending, u.touched = i, true, now
}

// passTo leaves what comes of the layers that both have to a later pull, so that nothing is counted twice.
func (u *pull) passTo(later *pull) {
	for d, c := range later.before {
		_, of := u.before[d]
		if _, passed := u.after[d]; of && !passed {
			u.after[d] = c
		}
	}
}

// goesOn finds the pull that comes to a layer now; nil: a new one begins. Where several clients pull the image at once, it is the one
// that has the layer before, or the latest that has not asked for it. p.mu is held.
func (p *pulls) goesOn(r snapshot.Request, i int) (found *pull) {
	for _, u := range p.under {
		if u.of(r) && u.asked < i && !u.pending && (found == nil || u.asked == i-1 || found.asked != i-1) {
			found = u
		}
	}
	return found
}

// of reports whether what is told of a layer may be told of the pull.
func (u *pull) of(r snapshot.Request) bool {
	return u.mounted.IsZero() && u.img.manifest == r.Manifest && u.name == r.Reference && u.namespace == r.Namespace
}

// told notes what became of a layer that containerd asks for.
func (p *pulls) told(e snapshot.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.concerned(e)
	if u == nil {
		return
	}
	u.pending, u.touched = false, time.Now()
	if e.Kind == snapshot.KindDeclined {
		u.declined = true
	} else {
		u.there = u.touched
	}
	if u.asked == len(u.img.layers)-1 {
		u.mounted = u.touched
	}
}

// concerned finds the pull that an event tells of; nil: none that is known. Of a layer that was declined because of its image
// nobody was told that it was asked for. p.mu is held.
func (p *pulls) concerned(e snapshot.Event) *pull {
	at := -1
	for _, u := range p.under {
		i, known := u.img.chains[e.Request.Chain]
		if !known || !u.of(e.Request) {
			continue
		}
		if u.pending && u.asked == i {
			return u
		}
		at = i
	}
	if e.Kind != snapshot.KindDeclined || at < 0 {
		return nil
	}
	u := p.goesOn(e.Request, at)
	if u != nil {
		u.asked = at
	}
	return u
}

// quiet ends the pulls of which nothing was told for a while, as of when something was. p.mu is held.
func (p *pulls) quiet(now time.Time) {
	for _, u := range p.under {
		if u.mounted.IsZero() && !u.declined && now.Sub(u.touched) > quietTime {
			u.mounted = cmp.Or(u.there, u.touched)
		}
	}
}

// answered notes that a read of a layer which had to wait was answered.
func (p *pulls) answered(d digest.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.under {
		_, of := u.before[d]
		if _, passed := u.after[d]; of && !passed && u.answer.IsZero() {
			u.answer = time.Now()
		}
	}
}

// look records the pulls that are complete, and those that have been looked at for long enough or of whose image
// a further pull has begun; all of which anything is there where the node ends.
func (p *pulls) look(now time.Time, ends bool) {
	var done []accel.Pull
	p.mu.Lock()
	p.quiet(now)
	p.under = slices.DeleteFunc(p.under, func(u *pull) bool {
		result, complete := u.result(now, p.counts)
		if u.declined {
			return !u.mounted.IsZero() || now.Sub(u.touched) > pullTime
		}
		if u.mounted.IsZero() && !ends {
			return false
		}
		if u.there.IsZero() {
			return true // containerd did not want it after all
		}
		if !complete && !ends && !u.followed && now.Sub(u.start) <= pullTime {
			return false
		}
		done = append(done, result)
		return true
	})
	p.mu.Unlock()
	for _, r := range done {
		p.record(r)
	}
}

// result is the pull as it stands.
func (u *pull) result(now time.Time, current func(digest.Digest) counts) (_ accel.Pull, complete bool) {
	out := accel.Pull{Image: u.name, Digest: u.img.manifest, Mode: accel.PullLazy, Start: u.start.UTC().Round(0)}
	if end := cmp.Or(u.mounted, u.there); !end.IsZero() {
		out.Duration = max(0, end.Sub(u.start))
	}
	if !u.answer.IsZero() {
		out.Lazy.FirstByte = u.answer.Sub(u.start)
	}
	complete = true
	for d, before := range u.before {
		c := current(d)
		complete = complete && c.size > 0 && c.present == c.size
		if then, passed := u.after[d]; passed {
			c = then
		}
		out.RegistryBytes += max(0, c.fetched-before.fetched)
		out.CacheBytes += before.present + max(0, c.copied-before.copied)
		out.Lazy.Misses += max(0, c.misses-before.misses)
		out.Lazy.Waited += max(0, c.waited-before.waited)
	}
	if complete {
		out.Lazy.Complete = max(now.Sub(u.start), out.Duration)
	}
	out.Outcome = accel.OutcomePartial
	switch {
	case out.RegistryBytes == 0 && complete:
		out.Outcome = accel.OutcomeHit
	case out.CacheBytes == 0:
		out.Outcome = accel.OutcomeMiss
	}
	return out, complete
}

// measure looks at lazy pulls until ctx ends.
func (l *Lazy) measure(ctx context.Context) error {
	tick := time.NewTicker(lookTime)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			l.pulls.look(now, false)
			l.rates.look(now, l.fetched())
		case <-ctx.Done():
			l.pulls.look(time.Now(), true)
			return nil
		}
	}
}

// counts of a layer; zero where it is not open.
func (l *Lazy) counts(d digest.Digest) counts {
	l.mu.Lock()
	y := l.open[d]
	var size int64
	if y != nil {
		size = y.origin.SizeBytes // under the lock: what is known of the origin grows
	}
	l.mu.Unlock()
	if y == nil {
		return counts{}
	}
	s := l.filler.Stats(d)
	there := int64(y.Len() - y.Left())
	return counts{
		fetched: s.FetchedBytes, copied: s.CopiedBytes, misses: s.Misses, missBytes: s.MissBytes, demanded: s.DemandBytes, waited: s.Waited,
		size: size, present: int64(float64(size) * float64(there) / float64(cmp.Or(y.Len(), 1))),
	}
}
