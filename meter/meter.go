package meter

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"accel"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/oklog/ulid/v2"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// Options of a Meter. Node and Spool are required.
type Options struct {
	Node  string
	Spool *Spool
	// Quiet is how long a client must ask for nothing before its pull is over; 5 s. A
	// pull whose layers were all delivered is over at once.
	Quiet      time.Duration
	Log        *slog.Logger          // nil: silent
	Registerer prometheus.Registerer // nil: not registered
	Now        func() time.Time      // time.Now
}

const (
	defaultQuiet = 5 * time.Second
	// maxTalks bounds the clients that are measured at a time, for each repository; the one that is
	// quiet for longest gives way.
	maxTalks = 4096
	// maxPulls bounds the pulls of one such client and repository that are under way.
	maxPulls = 256
	// maxKnown bounds the layers whose image is remembered, about 200 bytes each, for
	// clients that come back for one without asking for the manifest again.
	maxKnown = 16_384
	// maxWaiting bounds finished pulls that the spool could not take, for instance because
	// the disk is full.
	maxWaiting = 10_000
	// spoolBatch is how many pulls are spooled at once, some 150 kB.
	spoolBatch = 500
)

// Meter puts transfers together into pulls. It is safe for concurrent use.
type Meter struct {
	o       Options
	metrics *meterMetrics
	ended   chan struct{} // holds one token when waiting is not empty

	mu      sync.Mutex
	talks   map[talkKey]*talk
	known   *lru.Cache[blobKey, *image]
	waiting []accel.Pull // finished, and not in the spool yet

	stuck bool // Run's: the spool took nothing the last time
}

// talkKey is one client that asks for one repository's content.
type talkKey struct{ client, repository string }

type blobKey struct {
	repository string
	digest     digest.Digest
}

// New returns a Meter; Run makes it work.
func New(o Options) (*Meter, error) {
	o.Quiet = cmp.Or(o.Quiet, defaultQuiet)
	if o.Spool == nil || o.Node == "" || !isName(o.Node, maxNodeBytes) || o.Quiet < 0 {
		return nil, fmt.Errorf("%w: a meter needs a spool, a positive time of quiet, and the node's name of up to %d printable characters without a space, not %.300q", accel.ErrInvalid, maxNodeBytes, o.Node)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	m := &Meter{o: o, ended: make(chan struct{}, 1), talks: map[talkKey]*talk{}}
	var err error
	if m.known, err = lru.New[blobKey, *image](maxKnown); err != nil {
		return nil, err
	}
	if m.metrics, err = newMeterMetrics(o.Registerer, m); err != nil {
		return nil, err
	}
	return m, nil
}

// Begin notes that a client began a request for d of a repository (zero for a tag). The
// returned function is called once, when the request has ended, with what became of it,
// or with nil where it does not belong to a pull. In between a pull that d is a part of
// does not end by quiet.
func (m *Meter) Begin(client, repository string, d digest.Digest) (end func(*accel.Transfer)) {
	began := m.o.Now()
	key := talkKey{client, repository}
	m.mu.Lock()
	t := m.talk(key)
	t.running[d]++
	m.mu.Unlock()
	var once sync.Once
	return func(x *accel.Transfer) {
		once.Do(func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			if t.running[d]--; t.running[d] == 0 {
				delete(t.running, d)
			}
			now := m.o.Now()
			if x != nil {
				t.take(x, began, now)
				for _, p := range t.over() {
					m.finish(p)
				}
			}
			if len(t.running) == 0 && len(t.pulls) == 0 && m.talks[key] == t {
				delete(m.talks, key)
			}
		})
	}
}

// Observe takes a transfer whose beginning was not told.
func (m *Meter) Observe(t accel.Transfer) { m.Begin(t.Client, t.Repository, t.Digest)(&t) }

// talk finds or makes the talk with a client. The caller holds mu.
func (m *Meter) talk(key talkKey) *talk {
	if t := m.talks[key]; t != nil {
		return t
	}
	if len(m.talks) >= maxTalks {
		m.endQuietest()
	}
	t := &talk{m: m, repository: key.repository, running: map[digest.Digest]int{}}
	m.talks[key] = t
	return t
}

func (m *Meter) endQuietest() {
	var quietest *talk
	var at talkKey
	for k, t := range m.talks {
		if len(t.running) == 0 && (quietest == nil || t.last().Before(quietest.last())) {
			quietest, at = t, k
		}
	}
	if quietest != nil { // else all are running, as many as there are connections
		for _, p := range quietest.pulls {
			m.finish(p)
		}
		delete(m.talks, at)
	}
}

// Record takes a pull that was measured elsewhere on the node, and gives it the id and the node's name.
func (m *Meter) Record(p accel.Pull) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.record(p)
}

// finish ends the measurement of a pull. The caller holds mu.
func (m *Meter) finish(p *pull) {
	if out, is := p.result(); is {
		m.record(out)
	}
}

// record hands a pull over to Run. The caller holds mu.
func (m *Meter) record(out accel.Pull) {
	id, err := ulid.New(uint64(max(0, out.Start.UnixMilli())), rand.Reader)
	if err == nil {
		out.ID, out.Node = id.String(), m.o.Node
		err = Validate(out, m.o.Now())
	}
	if err != nil {
		m.o.Log.Error("a pull cannot be recorded", "image", out.Image, "error", err)
		return
	}
	m.metrics.pull(out)
	if len(m.waiting) == maxWaiting {
		m.waiting = m.waiting[1:]
		m.o.Spool.lost(1)
	}
	m.waiting = append(m.waiting, out)
	select {
	case m.ended <- struct{}{}:
	default:
	}
}

// Run ends pulls by quiet and spools those that ended, until ctx ends; then it ends all.
func (m *Meter) Run(ctx context.Context) error {
	tick := time.NewTicker(max(m.o.Quiet/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-m.ended:
			_ = m.spool() // it is logged, and tried again
		case <-tick.C:
			m.endQuiet(m.o.Now().Add(-m.o.Quiet))
			_ = m.spool()
		case <-ctx.Done():
			m.endAll()
			return m.spoolLast()
		}
	}
}

// endQuiet ends the pulls of clients that asked for nothing since.
func (m *Meter) endQuiet(since time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, t := range m.talks {
		rest := t.pulls[:0]
		for _, p := range t.pulls {
			if p.touched.After(since) || t.held(p) {
				rest = append(rest, p)
			} else {
				m.finish(p)
			}
		}
		clear(t.pulls[len(rest):])
		if t.pulls = rest; len(rest) == 0 && len(t.running) == 0 {
			delete(m.talks, key)
		}
	}
}

func (m *Meter) endAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, t := range m.talks {
		for _, p := range t.pulls {
			if t.held(p) {
				p.cut("the node stopped")
			}
			m.finish(p)
		}
		t.pulls = nil
		delete(m.talks, key)
	}
}

// spoolLast is the last spool. What it cannot bring to disk is lost.
func (m *Meter) spoolLast() error {
	err := m.spool()
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.waiting); err != nil && n > 0 {
		m.o.Spool.lost(n)
		m.waiting = nil
		m.o.Log.Error("the node stops with pulls that cannot be spooled; they are dropped", "dropped", n, "error", err)
	}
	return err
}

// spool brings what waits to disk. Where that fails, it waits on.
func (m *Meter) spool() error {
	m.mu.Lock()
	pulls := m.waiting
	m.waiting = nil
	m.mu.Unlock()
	var err error
	for len(pulls) > 0 && err == nil { // in parts, for which there may be room
		n := min(len(pulls), spoolBatch)
		if err = m.o.Spool.Add(pulls[:n]...); err == nil {
			pulls = pulls[n:]
		}
	}
	switch {
	case err == nil && m.stuck:
		m.stuck = false
		m.o.Log.Info("pulls are spooled again")
		fallthrough
	case err == nil:
		return nil
	case !m.stuck: // once, not with each try
		m.stuck = true
		m.o.Log.Error("pulls cannot be spooled; they wait in memory, and the oldest are dropped", "waiting", len(pulls), "most", maxWaiting, "error", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting = append(pulls, m.waiting...)
	if over := len(m.waiting) - maxWaiting; over > 0 {
		m.waiting = m.waiting[over:]
		m.o.Spool.lost(over)
	}
	return err
}
