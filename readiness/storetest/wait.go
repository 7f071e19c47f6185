package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing/synctest"
	"time"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
)

// waited begins a Wait and returns how to see its end.
func (e *env) waited(ref accel.Reference) func() (readiness.Status, error) {
	var st readiness.Status
	var err error
	var wg sync.WaitGroup
	wg.Go(func() {
		ctx, cancel := context.WithTimeout(e.ctx, time.Hour)
		defer cancel()
		st, err = e.Wait(ctx, ref)
	})
	synctest.Wait()
	return func() (readiness.Status, error) {
		wg.Wait()
		return st, err
	}
}

var waitTests = map[string]func(*env){
	"wait for what is not there yet": func(e *env) {
		byTag, byDigest := e.waited(reference("v1", "")), e.waited(reference("", sha("a")))
		start := time.Now()
		a := e.makeReady(event("v1", sha("a"), 1))
		for _, end := range []func() (readiness.Status, error){byTag, byDigest} {
			st, err := end()
			e.equal("answer", []any{st.ID, st.State, err}, []any{a.ID, accel.Ready, nil})
		}
		if waited := time.Since(start); waited > time.Millisecond { // only claim's nanosecond
			e.Fatalf("the answer came %s later", waited)
		}
	},
	"wait ends with its context": func(e *env) {
		ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
		defer cancel()
		_, err := e.Wait(ctx, reference("v1", ""))
		e.is(err, accel.ErrNotFound)
		e.is(err, context.DeadlineExceeded)
		a := e.push(event("v1", sha("a"), 1))
		ctx, cancel = context.WithTimeout(e.ctx, time.Minute)
		defer cancel()
		st, err := e.Wait(ctx, reference("v1", ""))
		e.is(err, context.DeadlineExceeded)
		e.equal("latest answer", []any{st.ID, errors.Is(err, accel.ErrNotFound)}, []any{a.ID, false})
	},
	"wait follows the successor": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		end := e.waited(reference("", sha("a")))
		e.push(event("v1", sha("b"), 2))
		c := e.push(event("v1", sha("c"), 3))
		synctest.Wait()
		e.state(a.ID, accel.Superseded)
		e.finish(e.claim())
		st, err := end()
		e.equal("answer", []any{st.ID, st.State, err}, []any{c.ID, accel.Ready, nil})
		e.ok(second(e.Delete(e.ctx, c.ID))) // then the last Superseded one is all there is
		st, err = e.Wait(e.ctx, reference("", sha("a")))
		e.equal("answer", []any{st.State, err}, []any{accel.Superseded, nil})
	},
	"wait goes on through failures that are tried again": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		end := e.waited(reference("v1", ""))
		e.ok(e.Fail(e.ctx, e.claim(), errors.New("reset")))
		synctest.Wait()
		w, err := e.Claim(e.ctx)
		e.ok(err)
		e.ok(e.Fail(e.ctx, w, &accel.Rejection{Rule: "r", Detail: "d"}))
		st, err := end()
		e.equal("answer", []any{st.ID, st.State, err}, []any{a.ID, accel.Rejected, nil})
	},
	"wait through an intake row and a fold": func(e *env) {
		byTag, byChild := e.waited(reference("v1", "")), e.waited(reference("", sha("child")))
		e.push(event("", sha("child"), 0))
		e.push(event("v1", "", 0))
		w, _, err := e.Resolve(e.ctx, e.claim(), sha("index"), indexType)
		e.ok(err)
		e.ok(e.Fold(e.ctx, w, "", []digest.Digest{sha("child")}))
		e.finish(w)
		for _, end := range []func() (readiness.Status, error){byTag, byChild} {
			st, err := end()
			e.equal("answer", []any{st.ID, st.State, err}, []any{w.ID, accel.Ready, nil})
		}
	},
	"thousands wait": func(e *env) {
		var wg sync.WaitGroup
		for i := range 2000 {
			wg.Go(func() {
				st, err := e.Wait(e.ctx, reference(fmt.Sprint("t", i%5), ""))
				if err != nil || st.State != accel.Ready {
					e.Errorf("waiter %d: %s, %v", i, st.State, err)
				}
			})
		}
		synctest.Wait()
		for i := range 5 {
			e.makeReady(event(fmt.Sprint("t", i), sha(fmt.Sprint(i)), 1))
		}
		wg.Wait()
	},
	"wait for events": func(e *env) {
		ctx, cancel := context.WithTimeout(e.ctx, time.Minute)
		_, _, err := e.NextEvents(ctx, 0, 10)
		cancel()
		e.is(err, context.DeadlineExceeded)
		var wg sync.WaitGroup
		var seen []readiness.Event
		wg.Go(func() {
			var after uint64
			for len(seen) < 3 {
				evs, _, err := e.NextEvents(e.ctx, after, 1)
				if err != nil {
					e.Error(err)
					return
				}
				seen = append(seen, evs...)
				after = evs[len(evs)-1].Seq
			}
		})
		synctest.Wait()
		e.makeReady(event("v1", sha("a"), 1))
		wg.Wait()
		e.equal("last", seen[2].To, accel.Ready)
	},
}
