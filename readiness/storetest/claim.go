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

var claimTests = map[string]func(*env){
	"the longest due comes first": func(e *env) {
		for _, name := range []string{"a", "b", "c"} {
			e.push(event(name, sha(name), 1))
			time.Sleep(time.Second)
		}
		for _, name := range []string{"a", "b", "c"} {
			w := e.claim()
			e.equal("claimed", w.Digest, sha(name))
			e.equal("attempts", w.Attempts, 1)
			e.equal("lease ends", w.DueAt.Sub(w.UpdatedAt), 30*time.Second)
		}
		e.idle()
	},
	"a claim waits for a push": func(e *env) {
		var w readiness.Work
		var wg sync.WaitGroup
		wg.Go(func() { w, _ = e.Claim(e.ctx) })
		synctest.Wait()
		start := time.Now()
		rec := e.push(event("v1", sha("a"), 1))
		wg.Wait()
		e.equal("claimed", w.ID, rec.ID)
		e.equal("waited", time.Since(start), time.Duration(0))
	},
	"a claim waits for what falls due": func(e *env) {
		e.push(event("", sha("a"), 0))
		start := time.Now()
		e.ok(second(e.Claim(e.ctx)))
		e.equal("waited", time.Since(start), 10*time.Second)
	},
	"a claim sees what another process pushed": func(e *env) {
		other := newEnv(e.T, e.store, readiness.Options{Params: "p1"})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := e.Claim(e.ctx); err != nil {
				e.Error(err)
			}
		})
		synctest.Wait()
		other.push(event("v1", sha("a"), 1))
		wg.Wait()
	},
	"many workers take each record once": func(e *env) {
		const workers, records = 8, 100
		ctx, cancel := context.WithCancel(e.ctx)
		var mu sync.Mutex
		seen := map[string]int{}
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for {
					w, err := e.Claim(ctx)
					if err != nil {
						if !errors.Is(err, context.Canceled) {
							e.Error(err)
						}
						return
					}
					mu.Lock()
					seen[w.ID]++
					mu.Unlock()
					if err := e.Finish(ctx, w, accel.Target{Repository: repo, Digest: sha("t")}, accel.Result{}, nil); err != nil {
						e.Error(err)
					}
				}
			})
		}
		for i := range records {
			e.push(event(fmt.Sprint("t", i), sha(fmt.Sprint(i)), 1))
		}
		time.Sleep(time.Second) // until nobody has anything to do
		cancel()
		wg.Wait()
		e.equal("records", len(seen), records)
		for id, n := range seen {
			if n != 1 {
				e.Errorf("record %s was claimed %d times", id, n)
			}
		}
	},
	"a lease that is renewed holds, one that runs out does not": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		w := e.claim()
		for range 5 {
			time.Sleep(20 * time.Second)
			e.ok(e.Renew(e.ctx, w))
			e.idle()
		}
		time.Sleep(30 * time.Second)
		e.ok(e.Renew(e.ctx, w)) // late, but nobody else has it
		time.Sleep(31 * time.Second)
		w2 := e.claim()
		e.equal("claimed again", []any{w2.ID, w2.Attempts}, []any{a.ID, 2})
		e.is(e.Renew(e.ctx, w), accel.ErrLeaseLost)
		e.is(e.Defer(e.ctx, w, 0, ""), accel.ErrLeaseLost)
		e.is(e.Drop(e.ctx, w, ""), accel.ErrLeaseLost)
		e.finish(w2)
		e.equal("trail", e.trail(a.ID), ">Pending>Converting>Pending>Converting>Ready")
	},
	"leases of a dead process": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		e.push(event("v2", sha("b"), 1))
		w := e.claim()
		time.Sleep(time.Second)
		n, err := e.ExpireLeases(e.ctx)
		e.equal("expired", []any{n, err}, []any{1, nil})
		e.equal("the other first", e.claim().Digest, sha("b"))
		e.equal("then the dead one's", []any{e.claim().Attempts, e.get(a.ID).State}, []any{2, accel.Converting})
		e.is(e.Renew(e.ctx, w), accel.ErrLeaseLost)
	},
	"workers that die are counted": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		for range 8 {
			e.claim()
			time.Sleep(30 * time.Second)
		}
		e.idle()
		e.equal("final", e.state(a.ID, accel.Failed).Final(), true)
	},
	"a poisoned record does not starve others": func(e *env) {
		poison := e.push(event("poison", sha("poison"), 1))
		for i := range 20 {
			e.push(event(fmt.Sprint(i), sha(fmt.Sprint(i)), 1))
		}
		done, tries := 0, 0
		for {
			ctx, cancel := context.WithTimeout(e.ctx, 20*time.Minute)
			w, err := e.Claim(ctx)
			cancel()
			if err != nil {
				break
			}
			if w.ID != poison.ID {
				done++
				e.finish(w)
				continue
			}
			tries++
			e.ok(e.Fail(e.ctx, w, errors.New("always")))
			if tries == 2 && done < 20 {
				e.Fatalf("second try after %d of the others", done)
			}
		}
		e.equal("done, tries", []int{done, tries}, []int{20, 8})
		e.equal("final", e.state(poison.ID, accel.Failed).Final(), true)
	},
	"backoff": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		upper := 2 * time.Second
		for range 7 {
			upper = min(2*upper, 10*time.Minute)
			w, err := e.Claim(e.ctx)
			e.ok(err)
			e.ok(e.Fail(e.ctx, w, fmt.Errorf("no\nconnection %s", string([]byte{0xff}))))
			f := e.state(a.ID, accel.Failed)
			if pause := f.DueAt.Sub(f.UpdatedAt); pause < 2*time.Second || pause > upper {
				e.Fatalf("pause %s after attempt %d, want 2s to %s", pause, f.Attempts, upper)
			}
			e.equal("reason", f.Reason, "no connection \uFFFD")
		}
		r, err := e.Retry(e.ctx, a.ID)
		e.ok(err)
		e.equal("retried", []any{r.State, r.Attempts}, []any{accel.Pending, 0})
		e.ok(e.Fail(e.ctx, e.claim(), accel.WithRetryAfter(errors.New("429"), time.Hour)))
		f := e.get(a.ID)
		if pause := f.DueAt.Sub(f.UpdatedAt); pause < time.Hour {
			e.Fatalf("pause %s, want what the registry asked for", pause)
		}
		e.is(e.Fail(e.ctx, readiness.Work{}, nil), accel.ErrInvalid)
	},
	"defer counts no attempt": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		w := e.claim()
		w.MediaType = imageType
		e.ok(e.Defer(e.ctx, w, time.Minute, "waits"))
		r := e.state(a.ID, accel.Pending)
		e.equal("deferred", []any{r.Attempts, time.Until(r.DueAt), r.Reason, r.MediaType}, []any{0, time.Minute, "waits", imageType})
		e.idle()
	},
	"drop": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		e.ok(e.Drop(e.ctx, e.claim(), "a signature"))
		e.is(second(e.Get(e.ctx, a.ID)), accel.ErrNotFound)
		e.is(second(e.Holder(e.ctx, repo, "v1")), accel.ErrNotFound)
	},
	"retry": func(e *env) {
		e.is(second(e.Retry(e.ctx, "unknown")), accel.ErrNotFound)
		a := e.push(event("v1", sha("a"), 1))
		e.claim()
		e.is(second(e.Retry(e.ctx, a.ID)), accel.ErrConflict)
		e.push(event("v1", sha("b"), 2))
		r, err := e.Retry(e.ctx, a.ID) // Superseded, but somebody wants it
		e.ok(err)
		e.equal("state", string(r.State)+r.SuccessorID, "Pending")
		held := e.push(event("", sha("c"), 0))
		r, err = e.Retry(e.ctx, held.ID)
		e.ok(err)
		e.equal("due", r.DueAt, time.Now().UTC())
		w := e.claim()
		e.finish(w)
		e.is(second(e.Retry(e.ctx, w.ID)), accel.ErrConflict)
	},
	"finish checks what it is given": func(e *env) {
		e.push(event("v1", sha("a"), 1))
		w := e.claim()
		for _, target := range []accel.Target{{}, {Repository: repo}, {Repository: repo, Digest: "x"}} {
			e.is(e.Finish(e.ctx, w, target, accel.Result{}, nil), accel.ErrInvalid)
		}
		big := map[digest.Digest][]byte{sha("a"): make([]byte, 2<<20)}
		e.is(e.Finish(e.ctx, w, accel.Target{Repository: repo, Digest: sha("t")}, accel.Result{}, big), accel.ErrInvalid)
		e.finish(w)
		e.is(e.Finish(e.ctx, w, accel.Target{Repository: repo, Digest: sha("t")}, accel.Result{}, nil), accel.ErrLeaseLost)
	},
}
