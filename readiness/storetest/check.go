package storetest

import (
	"context"
	"time"

	"accel"
)

var checkTests = map[string]func(*env){
	"ready targets are checked in turn": func(e *env) {
		a := e.makeReady(event("v1", sha("a"), 1))
		time.Sleep(time.Minute)
		b := e.makeReady(event("v2", sha("b"), 1))
		for i, want := range []string{a.ID, b.ID, a.ID} {
			rec, err := e.NextCheck(e.ctx)
			e.ok(err)
			e.equal("checked", rec.ID, want)
			e.equal("at", time.Since(a.UpdatedAt), []time.Duration{time.Hour, time.Hour + time.Minute, 2 * time.Hour}[i])
			e.ok(e.Checked(e.ctx, rec.ID, []string{"y", "x", "y"}))
			rec = e.get(rec.ID)
			e.equal("noted", []any{rec.CheckedAt, rec.Target.Tags}, []any{time.Now().UTC(), []string{"x", "y"}})
		}
		e.is(e.Checked(e.ctx, "unknown", nil), accel.ErrNotFound)
	},
	"a new tag is a check at once": func(e *env) {
		a := e.makeReady(event("v1", sha("a"), 1))
		due := func() {
			e.Helper()
			ctx, cancel := context.WithTimeout(e.ctx, time.Second)
			defer cancel()
			rec, err := e.NextCheck(ctx)
			e.ok(err)
			e.equal("checked", rec.ID, a.ID)
		}
		e.push(event("v2", sha("a"), 1))
		due()
		e.push(event("v3", sha("a"), 1)) // between NextCheck and Checked
		e.ok(e.Checked(e.ctx, a.ID, []string{"v1", "v2"}))
		due()
		e.ok(second(e.Observe(e.ctx, repo, "v4", sha("a"), "")))
		due()
		e.push(event("v5", "", 1))
		_, ok, err := e.Resolve(e.ctx, e.claim(), sha("a"), "")
		e.equal("resolved", []any{ok, err}, []any{false, nil})
		due()
	},
	"a tag that came during the conversion is a check at once": func(e *env) {
		e.push(event("v1", sha("a"), 1))
		w := e.claim()
		a := e.push(event("v2", sha("a"), 1))
		e.finish(w)
		e.equal("due", e.state(a.ID, accel.Ready).DueAt, time.Now().UTC())
	},
	"a target that is gone is made again": func(e *env) {
		a := e.makeReady(event("v1", sha("a"), 1))
		e.ok(second(e.Mapping(e.ctx, repo, sha("a"))))
		e.ok(e.Gone(e.ctx, a.ID, "404"))
		e.equal("reason", e.state(a.ID, accel.Pending).Reason, "404")
		e.is(second(e.Mapping(e.ctx, repo, sha("a"))), accel.ErrNotFound)
		e.is(e.Gone(e.ctx, a.ID, "404"), accel.ErrConflict)
		e.is(e.Checked(e.ctx, a.ID, nil), accel.ErrConflict)
		e.finish(e.claim())
		e.equal("trail", e.trail(a.ID), ">Pending>Converting>Ready>Stale>Pending>Converting>Ready")
		e.ok(second(e.Mapping(e.ctx, "", sha("a"))))
	},
}
