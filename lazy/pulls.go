package lazy

import (
	"cmp"
	"context"
	"sync"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

const (
	// pullTime is how long a lazy pull is looked at before it is recorded without having been
	// completed, or forgotten without having been mounted.
	pullTime = 2 * time.Minute
	// lookTime is how exact the time of completion is.
	lookTime = 250 * time.Millisecond
	// maxPulls bounds those that are looked at at a time.
	maxPulls = 1024
)

// pulls measures each image from the first layer that containerd asks for until all of its content is
// there. What containerd did before (it reads the manifest and the config) is not in it.
type pulls struct {
	record func(accel.Pull)
	counts func(digest.Digest) counts

	mu    sync.Mutex
	under map[digest.Digest]*pull // by the manifest that was asked for
}

// pull is one image that is being mounted or filled.
type pull struct {
	img     *image
	start   time.Time
	mounted time.Time                // zero: not all of its layers are yet
	answer  time.Time                // of the first read that had to wait; zero: none did
	before  map[digest.Digest]counts // of its layers when it started
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

// asked notes that containerd asks for a layer of an image.
func (p *pulls) asked(img *image) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.under[img.manifest] != nil || len(p.under) >= maxPulls {
		return
	}
	u := &pull{img: img, start: time.Now(), before: map[digest.Digest]counts{}}
	for _, y := range img.layers {
		u.before[y.Digest] = p.counts(y.Digest)
	}
	p.under[img.manifest] = u
}

// mounted notes that a layer was mounted. An image is when its topmost layer is, which containerd asks for
// last.
func (p *pulls) mounted(d digest.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.under {
		if u.mounted.IsZero() && u.img.layers[len(u.img.layers)-1].Digest == d {
			u.mounted = time.Now()
		}
	}
}

// answered notes that a read of a layer which had to wait was answered.
func (p *pulls) answered(d digest.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.under {
		if _, of := u.before[d]; of && u.answer.IsZero() {
			u.answer = time.Now()
		}
	}
}

// look records the pulls that are complete, and those that have been looked at for long enough; all that are
// mounted where the node ends.
func (p *pulls) look(now time.Time, ends bool) {
	var done []accel.Pull
	p.mu.Lock()
	for manifest, u := range p.under {
		result, complete := u.result(now, p.counts)
		switch {
		case u.mounted.IsZero():
			if now.Sub(u.start) > pullTime {
				delete(p.under, manifest) // containerd did not want it after all, or pulled as ever
			}
		case complete, ends, now.Sub(u.start) > pullTime:
			delete(p.under, manifest)
			done = append(done, result)
		}
	}
	p.mu.Unlock()
	for _, r := range done {
		p.record(r)
	}
}

// result is the pull as it stands.
func (u *pull) result(now time.Time, current func(digest.Digest) counts) (_ accel.Pull, complete bool) {
	out := accel.Pull{Image: u.img.name, Digest: u.img.manifest, Mode: accel.PullLazy, Start: u.start.UTC().Round(0)}
	if !u.mounted.IsZero() {
		out.Duration = u.mounted.Sub(u.start)
	}
	if !u.answer.IsZero() {
		out.Lazy.FirstByte = u.answer.Sub(u.start)
	}
	complete = true
	for d, before := range u.before {
		c := current(d)
		complete = complete && c.size > 0 && c.present == c.size
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
