package storetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
)

// model plays registry, senders and workers in random order, keeps its own simple idea
// of where each tag points, and after each step compares.
type model struct {
	*env
	rng      *rand.Rand
	now      int // time of the newest push, in seconds as event wants it
	tags     map[string]*modelTag
	held     []readiness.Work
	accepted map[digest.Digest]bool // digests taken in that nobody has deleted since
	states   map[string]accel.State // by replaying the event log
	replayed uint64
}

// modelTag is where a tag must point.
type modelTag struct {
	d        digest.Digest
	at       int // of the newest event
	observed bool
	moved    time.Time
}

// modelDigests are images, and indexes of three of them each that share members.
var modelDigests, modelIndexes = func() (ds []digest.Digest, indexes map[digest.Digest][]digest.Digest) {
	indexes = map[digest.Digest][]digest.Digest{}
	for i := range 12 {
		ds = append(ds, sha(fmt.Sprint("image ", i)))
	}
	for i := range 4 {
		d := sha(fmt.Sprint("index ", i))
		indexes[d] = slices.Clone(ds[2*i : 2*i+3])
		ds = append(ds, d)
	}
	return ds, indexes
}()

func runModel(t *testing.T, store readiness.Store, seed uint64, steps int) {
	m := &model{
		env: newEnv(t, store, readiness.Options{Params: "p1", MaxAttempts: 4}), rng: rand.New(rand.NewPCG(seed, 1)), now: 1,
		tags: map[string]*modelTag{}, accepted: map[digest.Digest]bool{}, states: map[string]accel.State{},
	}
	ops := []func(){m.pushTagged, m.pushTagged, m.pushTagged, m.pushUntagged, m.pushUntagged, m.pushIntake, m.take, m.take, m.take,
		m.end, m.end, m.end, m.observe, m.remove, m.gone, m.retry, m.pass}
	for step := range steps {
		ops[m.rng.IntN(len(ops))]()
		m.invariants()
		if step%50 == 0 {
			check(t, store)
		}
		if t.Failed() {
			t.Fatalf("at step %d of seed %d", step, seed)
		}
	}
	m.drain()
	m.invariants()
	check(t, store)
}

func (m *model) digest() digest.Digest { return modelDigests[m.rng.IntN(len(modelDigests))] }
func (m *model) tag() string           { return fmt.Sprint("t", m.rng.IntN(4)) }

func (m *model) mediaType(d digest.Digest) string {
	switch {
	case m.rng.IntN(3) == 0:
		return ""
	case modelIndexes[d] != nil:
		return indexType
	default:
		return imageType
	}
}

// pass lets time go by.
func (m *model) pass() { time.Sleep(time.Duration(m.rng.IntN(40)) * time.Second) }

func (m *model) pushTagged() {
	d, tag := m.digest(), m.tag()
	at := m.now - m.rng.IntN(6) // some come late
	if m.rng.IntN(2) == 0 || at < 1 {
		m.now++
		at = m.now
	}
	for range 1 + m.rng.IntN(2) { // and twice
		rec := m.push(ofType(event(tag, d, at), m.mediaType(d)))
		m.equal("digest", rec.Digest, d)
	}
	m.accepted[d] = true
	p := m.tags[tag]
	switch {
	case p == nil:
		m.tags[tag] = &modelTag{d: d, at: at, moved: time.Now()}
	case p.d == d:
		if at > p.at {
			p.at, p.observed = at, false
		}
	case at > p.at || (at == p.at && !p.observed):
		*p = modelTag{d: d, at: at, moved: time.Now()}
	}
}

func (m *model) pushUntagged() {
	d := m.digest()
	m.push(ofType(event("", d, m.now), m.mediaType(d)))
	m.accepted[d] = true
}

func (m *model) pushIntake() { m.push(event(m.tag(), "", 0)) }

func (m *model) observe() {
	tag, d := m.tag(), m.digest()
	if m.rng.IntN(4) == 0 {
		if _, err := m.Observe(m.ctx, repo, tag, "", ""); m.tags[tag] != nil && m.tags[tag].d != "" {
			m.ok(err)
		} else {
			m.is(err, accel.ErrNotFound)
		}
		m.forget(tag)
		return
	}
	m.ok(second(m.Observe(m.ctx, repo, tag, d, m.mediaType(d))))
	m.accepted[d] = true
	m.saw(tag, d)
}

// saw: the registry said so.
func (m *model) saw(tag string, d digest.Digest) {
	p := m.tags[tag]
	if p == nil {
		p = &modelTag{}
		m.tags[tag] = p
	}
	if p.d != d {
		p.d, p.observed, p.moved = d, true, time.Now()
	}
}

// forget: nothing is known of the tag any more, but for the time of its newest event
// where an intake row keeps the pointer.
func (m *model) forget(tag string) {
	at := 0
	if p := m.tags[tag]; p != nil {
		at = p.at
	}
	delete(m.tags, tag)
	if _, err := m.Holder(m.ctx, repo, tag); err == nil && at > 0 {
		// The row will resolve; until then events older than at do not count.
		m.tags[tag] = &modelTag{at: at}
	}
}

func (m *model) take() {
	if w, ok := m.try(); ok {
		m.held = append(m.held, w)
	}
}

// end brings one claimed record on, maybe one that was lost long ago.
func (m *model) end() {
	if len(m.held) == 0 {
		return
	}
	i := m.rng.IntN(len(m.held))
	w := m.held[i]
	m.held = slices.Delete(m.held, i, i+1)
	if m.rng.IntN(8) == 0 {
		return // it died
	}
	m.work(w, m.rng.IntN(10))
}

func (m *model) work(w readiness.Work, how int) {
	if w.Digest == "" {
		var ok bool
		if w, ok = m.resolve(w); !ok {
			return
		}
	}
	if children := modelIndexes[w.Digest]; children != nil {
		if err := m.Fold(m.ctx, w, indexType, children); err != nil {
			m.is(err, accel.ErrLeaseLost)
			return
		}
	}
	var err error
	switch how {
	case 0:
		err = m.Fail(m.ctx, w, errors.New("transient"))
	case 1:
		err = m.Fail(m.ctx, w, accel.Permanent(errors.New("permanent")))
	case 2:
		err = m.Defer(m.ctx, w, time.Second, "later")
	case 3:
		err = m.Fail(m.ctx, w, &accel.Rejection{Rule: "r", Detail: "d"})
	default:
		target := accel.Target{Repository: repo, Digest: sha("target of " + w.Digest.String())}
		err = m.Finish(m.ctx, w, target, accel.Result{}, map[digest.Digest][]byte{w.Digest: []byte(w.ID)})
	}
	if err != nil {
		m.is(err, accel.ErrLeaseLost)
	}
}

func (m *model) resolve(w readiness.Work) (readiness.Work, bool) {
	d, tag, claimed := m.digest(), w.Tags[0], w.UpdatedAt
	next, ok, err := m.Resolve(m.ctx, w, d, m.mediaType(d))
	if err != nil {
		m.is(err, accel.ErrLeaseLost)
		return next, false
	}
	if p := m.tags[tag]; p != nil && p.d != "" && p.d != d && p.moved.After(claimed) {
		m.equal("resolved although the tag moved since", ok, false)
		return next, false
	}
	m.accepted[d] = true
	m.saw(tag, d)
	return next, ok
}

func (m *model) anyRecord() (accel.Record, bool) {
	page, err := m.List(m.ctx, readiness.Filter{Limit: 500})
	m.ok(err)
	if len(page.Records) == 0 {
		return accel.Record{}, false
	}
	return page.Records[m.rng.IntN(len(page.Records))], true
}

func (m *model) remove() {
	rec, ok := m.anyRecord()
	if !ok || m.rng.IntN(3) != 0 {
		return
	}
	m.ok(second(m.Delete(m.ctx, rec.ID)))
	if rec.Digest == "" { // an intake row: the pointer goes where it held nothing else
		if p := m.tags[rec.Tags[0]]; p != nil && p.d == "" {
			delete(m.tags, rec.Tags[0])
		}
		return
	}
	for tag, p := range m.tags {
		if p.d == rec.Digest {
			m.forget(tag)
		}
	}
	delete(m.accepted, rec.Digest)
	for _, child := range modelIndexes[rec.Digest] {
		delete(m.accepted, child)
	}
}

func (m *model) gone() {
	rec, ok := m.anyRecord()
	if !ok {
		return
	}
	if err := m.Gone(m.ctx, rec.ID, "gone"); rec.State == accel.Ready {
		m.ok(err)
	} else {
		m.is(err, accel.ErrConflict)
	}
}

func (m *model) retry() {
	rec, ok := m.anyRecord()
	if !ok {
		return
	}
	if _, err := m.Retry(m.ctx, rec.ID); rec.State == accel.Ready || rec.State == accel.Converting {
		m.is(err, accel.ErrConflict)
	} else {
		m.ok(err)
	}
}

// drain lets workers that never fail finish all there is.
func (m *model) drain() {
	m.held = nil
	for rounds := 0; ; rounds++ {
		page, err := m.List(m.ctx, readiness.Filter{Limit: 500})
		m.ok(err)
		left := false
		for _, rec := range page.Records {
			switch {
			case rec.State == accel.Rejected || rec.State == accel.Failed:
				m.ok(second(m.Retry(m.ctx, rec.ID)))
				left = true
			case !rec.Final():
				left = true
			}
		}
		if !left {
			break
		}
		if rounds > 100 {
			m.Fatal("the work does not come to an end")
		}
		time.Sleep(time.Minute)
		for w, ok := m.try(); ok; w, ok = m.try() {
			m.work(w, 9)
			m.invariants()
		}
	}
	for d := range m.accepted {
		st, err := m.Find(m.ctx, reference("", d))
		m.ok(err)
		if st.State != accel.Ready && st.State != accel.Superseded {
			m.Errorf("accepted digest %s ended %s", d, st.State)
		}
	}
}

func (m *model) invariants() {
	m.Helper()
	time.Sleep(time.Millisecond) // no two steps happen at the same instant
	page, err := m.List(m.ctx, readiness.Filter{Limit: 500})
	m.ok(err)
	seen := map[digest.Digest]string{}
	tagged := map[string]digest.Digest{}
	for _, rec := range page.Records {
		if (rec.Lease != 0) != (rec.State == accel.Converting) {
			m.Errorf("%s is %s with lease %d", rec.Image(), rec.State, rec.Lease)
		}
		if rec.Digest == "" {
			continue
		}
		if other, twice := seen[rec.Digest]; twice {
			m.Errorf("records %s and %s are both of %s", rec.ID, other, rec.Digest)
		}
		seen[rec.Digest] = rec.ID
		for _, tag := range rec.Tags {
			if other, twice := tagged[tag]; twice {
				m.Errorf("%s and %s both hold tag %s", rec.Digest, other, tag)
			}
			tagged[tag] = rec.Digest
		}
		if rec.State == accel.Superseded && len(rec.Tags) > 0 {
			m.Errorf("%s is Superseded and holds %v", rec.Digest, rec.Tags)
		}
	}
	for i := range 4 {
		tag := fmt.Sprint("t", i)
		var want digest.Digest
		if p := m.tags[tag]; p != nil {
			want = p.d
		}
		if tagged[tag] != want {
			m.Errorf("tag %s is held by %q, want %q", tag, tagged[tag], want)
		}
	}
	for d := range m.accepted {
		if _, err := m.Find(m.ctx, reference("", d)); err != nil {
			m.Errorf("accepted digest: %v", err)
		}
	}
	m.replay(page.Records)
}

// replay checks that the event log tells each change once: following it leads to the
// states that the records have.
func (m *model) replay(records []accel.Record) {
	m.Helper()
	for {
		evs, _, err := m.Events(m.ctx, m.replayed, 0)
		m.ok(err)
		if len(evs) == 0 {
			break
		}
		for _, ev := range evs {
			if m.states[ev.ID] != ev.From {
				m.Errorf("event %d says %s was %q, but it was %q", ev.Seq, ev.ID, ev.From, m.states[ev.ID])
			}
			m.states[ev.ID] = ev.To
			if ev.To == "" {
				delete(m.states, ev.ID)
			}
			m.replayed = ev.Seq
		}
	}
	m.equal("records by the event log", len(m.states), len(records))
	for _, rec := range records {
		if m.states[rec.ID] != rec.State {
			m.Errorf("%s is %s, by the event log %s", rec.ID, rec.State, m.states[rec.ID])
		}
	}
}
