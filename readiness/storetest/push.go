package storetest

import (
	"errors"
	"strings"
	"time"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
)

var pushTests = map[string]func(*env){
	"a repeated push is one record": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		e.equal("state", a.State, accel.Pending)
		e.equal("again", e.push(event("v1", sha("a"), 1)), a)
		e.equal("later", e.push(event("v1", sha("a"), 9)), a)
		w := e.claim()
		e.equal("while converting", e.push(event("v1", sha("a"), 1)).Lease, w.Lease)
		e.finish(w)
		for range 3 {
			e.equal("when ready", e.push(event("v1", sha("a"), 10)).State, accel.Ready)
		}
		e.idle()
		e.equal("trail", e.trail(a.ID), ">Pending>Converting>Ready")
	},
	"two tags on one digest": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		a2 := e.push(event("latest", sha("a"), 1))
		e.equal("id", a2.ID, a.ID)
		e.equal("tags", a2.Tags, []string{"latest", "v1"})
		e.push(event("v1", sha("b"), 2)) // one tag is left
		e.equal("tags left", e.state(a.ID, accel.Pending).Tags, []string{"latest"})
		b := e.push(event("latest", sha("b"), 2))
		s := e.state(a.ID, accel.Superseded)
		e.equal("successor", s.SuccessorID, b.ID)
		e.equal("tags", len(s.Tags), 0)
	},
	"a newer push supersedes what is in work, and its lease is lost": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		w := e.claim()
		b := e.push(event("v1", sha("b"), 2))
		e.equal("successor", e.state(a.ID, accel.Superseded).SuccessorID, b.ID)
		e.is(e.Renew(e.ctx, w), accel.ErrLeaseLost)
		e.is(e.Finish(e.ctx, w, accel.Target{Repository: repo, Digest: sha("t")}, accel.Result{}, nil), accel.ErrLeaseLost)
		e.is(e.Fail(e.ctx, w, errors.New("x")), accel.ErrLeaseLost)
		e.is(e.Announce(e.ctx, w, sha("t")), accel.ErrLeaseLost)
		e.holds("v1", sha("b"))
		e.push(event("v1", sha("a"), 3)) // pushed again: wanted again
		e.state(a.ID, accel.Pending)
		e.state(b.ID, accel.Superseded)
		e.equal("claimed", e.claim().ID, a.ID)
		e.is(e.Renew(e.ctx, w), accel.ErrLeaseLost)
	},
	"a ready record that loses its tags stays ready": func(e *env) {
		a := e.makeReady(event("v1", sha("a"), 1))
		e.push(event("v1", sha("b"), 2))
		e.state(a.ID, accel.Ready)
		e.push(event("v1", sha("a"), 3)) // a roll-back needs no work
		e.state(a.ID, accel.Ready)
		e.idle()
	},
	"reordered events": func(e *env) {
		b := e.push(event("v1", sha("b"), 2))
		a := e.push(event("v1", sha("a"), 1))
		e.equal("state of the older", a.State, accel.Superseded)
		e.equal("successor", a.SuccessorID, b.ID)
		e.holds("v1", sha("b"))
		e.equal("repeated", e.push(event("v1", sha("a"), 1)).State, accel.Superseded)
		e.state(b.ID, accel.Pending)
		c := e.push(event("v2", sha("c"), 1)) // has another tag: goes on
		e.push(event("v1", sha("c"), 1))
		e.equal("tags", e.state(c.ID, accel.Pending).Tags, []string{"v2"})
		e.push(event("v1", sha("d"), 0)) // without a time: the newest
		e.holds("v1", sha("d"))
		e.push(event("v1", sha("e"), 2)) // of the same instant: the order of arrival
		e.holds("v1", sha("e"))
	},
	"a clock that is ahead does not freeze the tag": func(e *env) {
		ev := event("v1", sha("a"), 0)
		ev.OccurredAt = time.Now().Add(1000 * time.Hour)
		e.push(ev)
		time.Sleep(time.Second)
		ev = event("v1", sha("b"), 0)
		ev.OccurredAt = time.Now()
		e.push(ev)
		e.holds("v1", sha("b"))
	},
	"failed records come back, rejected ones only when asked": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		e.ok(e.Fail(e.ctx, e.claim(), accel.Permanent(errors.New("broken"))))
		e.equal("given up", e.state(a.ID, accel.Failed).DueAt.IsZero(), true)
		a = e.push(event("v1", sha("a"), 2))
		e.equal("state and attempts", []any{a.State, a.Attempts}, []any{accel.Pending, 0})
		e.ok(e.Fail(e.ctx, e.claim(), &accel.Rejection{Rule: "policy.size", Detail: "12 GB"}))
		r := e.state(a.ID, accel.Rejected)
		e.equal("rule and reason", r.Rule+" "+r.Reason, "policy.size 12 GB")
		e.equal("pushed again", e.push(event("v1", sha("a"), 3)).State, accel.Rejected)
		r = e.push(from(accel.OriginAPI, event("v1", sha("a"), 0)))
		e.equal("asked for", string(r.State)+r.Rule, "Pending")
		e.claim()
	},
	"an untagged manifest waits for its index": func(e *env) {
		a := e.push(event("", sha("a"), 0))
		e.equal("hold", a.DueAt.Sub(a.CreatedAt), 10*time.Second)
		e.idle()
		time.Sleep(4 * time.Second)
		e.push(event("", sha("a"), 0)) // does not wait longer
		time.Sleep(6 * time.Second)
		e.equal("claimed", e.claim().ID, a.ID)

		e.push(event("", sha("b"), 0))
		e.idle()
		e.push(event("v1", sha("b"), 0)) // a tag makes it an image of its own
		e.equal("tagged", e.claim().Digest, sha("b"))
		e.push(ofType(event("", sha("c"), 0), indexType))
		e.equal("index", e.claim().Digest, sha("c"))
		e.push(event("", sha("d"), 0))
		e.push(from(accel.OriginAPI, event("", sha("d"), 0)))
		e.equal("asked for", e.claim().Digest, sha("d"))
	},
	"what the API asked for by digest is not superseded": func(e *env) {
		a := e.push(from(accel.OriginAPI, event("", sha("a"), 0)))
		e.push(event("v1", sha("a"), 1))
		e.push(event("v1", sha("b"), 2))
		e.state(a.ID, accel.Pending)
	},
	"observations win over events": func(e *env) {
		a := e.push(event("v1", sha("a"), 5))
		rec, err := e.Observe(e.ctx, repo, "v1", sha("b"), imageType)
		e.ok(err)
		e.equal("origin", rec.Origin+" "+rec.MediaType, accel.OriginReconcile+" "+imageType)
		e.equal("successor", e.state(a.ID, accel.Superseded).SuccessorID, rec.ID)
		e.push(event("v1", sha("a"), 5)) // the same event once more
		e.holds("v1", sha("b"))
		e.push(event("v1", sha("c"), 6))
		e.holds("v1", sha("c"))
		e.state(rec.ID, accel.Superseded)

		e.is(second(e.Observe(e.ctx, repo, "unknown", "", "")), accel.ErrNotFound)
		gone, err := e.Observe(e.ctx, repo, "v1", "", "")
		e.ok(err)
		e.equal("gone", string(gone.State)+gone.SuccessorID, "Superseded")
		e.is(second(e.Holder(e.ctx, repo, "v1")), accel.ErrNotFound)
	},
	"a look is no push": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		e.ok(e.Fail(e.ctx, e.claim(), accel.Permanent(errors.New("broken"))))
		e.ok(second(e.Observe(e.ctx, repo, "v1", sha("a"), "")))
		e.state(a.ID, accel.Failed)
		e.ok(second(e.Observe(e.ctx, repo, "v2", sha("a"), ""))) // it gained a tag: that is one
		e.state(a.ID, accel.Pending)
	},
	"an observation that was overtaken changes nothing": func(e *env) {
		e.push(event("v1", sha("a"), 1))
		asked := time.Now()
		time.Sleep(time.Second)
		b := e.push(event("v1", sha("b"), 2))
		rec, err := e.ObserveAt(e.ctx, asked, repo, "v1", sha("a"), "")
		e.ok(err)
		e.equal("holder", rec.ID, b.ID)
		e.state(b.ID, accel.Pending)
		e.ok(second(e.ObserveAt(e.ctx, time.Now(), repo, "v1", sha("a"), "")))
		e.holds("v1", sha("a"))
	},
	"a slice is one transaction": func(e *env) {
		recs, err := e.Push(e.ctx, event("v1", sha("a"), 1), event("v1", sha("b"), 2), event("v1", sha("a"), 1))
		e.ok(err)
		e.equal("states", []any{recs[0].State, recs[1].State, recs[2].ID}, []any{accel.Superseded, accel.Pending, recs[0].ID})
		e.is(second(e.Push(e.ctx, event("v2", sha("c"), 1), event("bad tag", sha("d"), 1))), accel.ErrInvalid)
		e.is(second(e.Holder(e.ctx, repo, "v2")), accel.ErrNotFound)
		recs, err = e.Push(e.ctx)
		e.equal("none", []any{len(recs), err}, []any{0, nil})
	},
	"malformed events": func(e *env) {
		for name, ev := range map[string]accel.PushEvent{
			"neither": event("", "", 0), "tag": event("a b", sha("a"), 0), "long tag": event(strings.Repeat("a", 129), "", 0),
			"digest": event("v1", "sha256:abc", 0), "empty": {}, "media type": ofType(event("v1", sha("a"), 0), strings.Repeat("m", 256)),
			"repository":      {Registry: "r.example", Repository: "UPPER", Tag: "v1"},
			"long repository": {Registry: "r.example", Repository: strings.Repeat("a", 256), Tag: "v1"},
			"algorithm":       event("v1", digest.Digest("md5:"+strings.Repeat("0", 32)), 0),
		} {
			if _, err := e.Push(e.ctx, ev); !errors.Is(err, accel.ErrInvalid) {
				e.Errorf("%s: error %v, want ErrInvalid", name, err)
			}
		}
		if _, err := e.Push(e.ctx, make([]accel.PushEvent, 1001)...); !errors.Is(err, accel.ErrInvalid) {
			e.Errorf("too many: error %v, want ErrInvalid", err)
		}
	},
	"announced digests outlive their record": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		e.ok(e.Announce(e.ctx, e.claim(), sha("t1"), sha("t2")))
		e.ok(second(e.Delete(e.ctx, a.ID)))
		for d, want := range map[digest.Digest]bool{sha("t1"): true, sha("t2"): true, sha("a"): false, "": false} {
			got, err := e.Ours(e.ctx, repo, d)
			e.ok(err)
			e.equal("ours", got, want)
		}
	},
	"delete": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		w := e.claim()
		del, err := e.Delete(e.ctx, a.ID)
		e.ok(err)
		e.equal("deleted", del.ID+string(del.State), a.ID+string(accel.Converting))
		e.is(e.Renew(e.ctx, w), accel.ErrLeaseLost)
		for _, err := range []error{second(e.Get(e.ctx, a.ID)), second(e.Delete(e.ctx, a.ID)), second(e.Holder(e.ctx, repo, "v1")), second(e.Find(e.ctx, reference("", sha("a"))))} {
			e.is(err, accel.ErrNotFound)
		}
		e.push(event("v1", sha("a"), 1))
		if w2 := e.claim(); w2.ID != w.ID || w2.Lease == w.Lease {
			e.Fatalf("lease %d of the record made anew, %d of the old one", w2.Lease, w.Lease)
		}
		e.is(e.Renew(e.ctx, w), accel.ErrLeaseLost)
	},
	"new parameters are a new record": func(e *env) {
		old := e.makeReady(event("v1", sha("a"), 1))
		unfinished := e.push(event("v2", sha("b"), 1))
		next := newEnv(e.T, e.store, readiness.Options{Params: "p2"})
		n := next.push(event("v1", sha("a"), 2))
		if n.ID == old.ID || n.Params != "p2" {
			e.Fatalf("record %s with parameters %s", n.ID, n.Params)
		}
		next.state(old.ID, accel.Ready)
		for range 2 { // what waits under the old parameters is converted under the new ones
			if w := next.claim(); w.Params != "p2" {
				e.Fatalf("claimed %s with parameters %s", w.Image(), w.Params)
			}
		}
		next.idle()
		m := next.state(unfinished.ID, accel.Converting) // the old id leads on
		e.equal("tags", m.Tags, []string{"v2"})
		next.holds("v2", sha("b"))
	},
}
