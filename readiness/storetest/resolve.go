package storetest

import (
	"errors"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

var intakeTests = map[string]func(*env){
	"a push without a digest is resolved": func(e *env) {
		in := e.push(event("v1", "", 1))
		e.equal("intake row", []any{in.State, in.Digest, in.Tags, in.Image()}, []any{accel.Pending, "", []string{"v1"}, repo + ":v1"})
		e.equal("again", e.push(event("v1", "", 2)).ID, in.ID)
		time.Sleep(time.Second)
		w := e.claim()
		next, ok, err := e.Resolve(e.ctx, w, sha("a"), imageType)
		e.ok(err)
		e.equal("work", []any{ok, next.Digest, next.MediaType, next.State, next.CreatedAt}, []any{true, sha("a"), imageType, accel.Converting, in.CreatedAt})
		e.is(e.Renew(e.ctx, w), accel.ErrLeaseLost)
		e.ok(e.Renew(e.ctx, next))
		e.equal("old id", e.get(in.ID).ID, next.ID)
		e.holds("v1", sha("a"))
		e.finish(next)
		e.idle()
		e.ok(second(e.Delete(e.ctx, in.ID))) // through the old id
		e.is(second(e.Get(e.ctx, in.ID)), accel.ErrNotFound)
	},
	"a repeat without a digest disturbs nobody": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		w := e.claim()
		in := e.push(event("v1", "", 1))
		e.ok(e.Renew(e.ctx, w))
		e.holds("v1", sha("a"))
		_, ok, err := e.Resolve(e.ctx, e.claim(), sha("a"), "")
		e.equal("resolved to what is in work", []any{ok, err}, []any{false, nil})
		e.ok(e.Renew(e.ctx, w))
		e.equal("old id", e.get(in.ID).ID, a.ID)
		e.finish(w)
		e.push(event("v1", "", 2))
		_, ok, err = e.Resolve(e.ctx, e.claim(), sha("a"), "")
		e.equal("resolved to what is ready", []any{ok, err}, []any{false, nil})
		e.state(a.ID, accel.Ready)
		e.idle()
	},
	"resolving moves the tag": func(e *env) {
		a := e.push(event("v1", sha("a"), 1))
		e.claim()
		e.push(event("v1", "", 2))
		next, ok, err := e.Resolve(e.ctx, e.claim(), sha("b"), "")
		e.ok(err)
		e.equal("ok", ok, true)
		e.equal("successor", e.state(a.ID, accel.Superseded).SuccessorID, next.ID)
		e.push(event("v1", sha("a"), 1)) // late
		e.holds("v1", sha("b"))
	},
	"a push while the tag is looked up is looked up again": func(e *env) {
		in := e.push(event("v1", "", 1))
		w := e.claim()
		e.push(event("v1", "", 2))
		next, ok, err := e.Resolve(e.ctx, w, sha("a"), "")
		e.ok(err)
		e.equal("ok", ok, true)
		again := e.claim()
		e.equal("intake row", again.ID, in.ID)
		b, ok, err := e.Resolve(e.ctx, again, sha("b"), "")
		e.ok(err)
		e.equal("ok", ok, true)
		e.is(e.Renew(e.ctx, next), accel.ErrLeaseLost)
		e.holds("v1", b.Digest)

		e.push(event("v2", "", 1))
		w = e.claim()
		e.push(event("v2", "", 2))
		e.ok(e.Drop(e.ctx, w, "the tag is gone"))
		w = e.claim()
		e.push(event("v2", "", 3))
		e.ok(e.Fail(e.ctx, w, accel.Permanent(errors.New("broken"))))
		e.equal("pushed again", e.claim().Tags, []string{"v2"})
	},
	"an answer that an event overtook is asked for again": func(e *env) {
		in := e.push(event("v1", "", 1))
		w := e.claim()
		time.Sleep(time.Second)
		b := e.push(event("v1", sha("b"), 3))
		_, ok, err := e.Resolve(e.ctx, w, sha("a"), "")
		e.equal("resolved", []any{ok, err}, []any{false, nil})
		e.state(b.ID, accel.Pending)
		e.holds("v1", sha("b"))
		e.state(in.ID, accel.Pending)
		_, ok, err = e.Resolve(e.ctx, e.claim(), sha("b"), "")
		e.equal("resolved", []any{ok, err}, []any{true, nil})
		e.idle()
		e.equal("old id", e.get(in.ID).ID, b.ID)
	},
	"an intake row that failed does not hide the tag": func(e *env) {
		in := e.push(event("v1", "", 1))
		e.ok(e.Fail(e.ctx, e.claim(), accel.Permanent(errors.New("no such host"))))
		st, err := e.Find(e.ctx, reference("v1", ""))
		e.ok(err)
		e.equal("state", st.State, accel.Failed)
		a := e.push(event("v1", sha("a"), 2))
		st, err = e.Find(e.ctx, reference("v1", ""))
		e.ok(err)
		e.equal("found", st.ID, a.ID)
		e.equal("old id", e.get(in.ID).ID, a.ID)
	},
	"resolving to what was rejected": func(e *env) {
		e.push(event("v1", sha("a"), 1))
		e.ok(e.Fail(e.ctx, e.claim(), &accel.Rejection{Rule: "r", Detail: "d"}))
		e.push(event("v2", "", 1))
		_, ok, err := e.Resolve(e.ctx, e.claim(), sha("a"), "")
		e.equal("by a webhook", []any{ok, err}, []any{false, nil})
		e.push(from(accel.OriginAPI, event("v3", "", 0)))
		_, ok, err = e.Resolve(e.ctx, e.claim(), sha("a"), "")
		e.equal("by the API", []any{ok, err}, []any{true, nil})
	},
	"resolve checks what it is given": func(e *env) {
		e.push(event("v1", "", 1))
		w := e.claim()
		_, _, err := e.Resolve(e.ctx, w, "", "")
		e.is(err, accel.ErrInvalid)
		e.is(e.Finish(e.ctx, w, accel.Target{Repository: repo, Digest: sha("t")}, accel.Result{}, nil), accel.ErrConflict)
		w, _, err = e.Resolve(e.ctx, w, sha("a"), "")
		e.ok(err)
		w, ok, err := e.Resolve(e.ctx, w, sha("a"), imageType) // notes the media type
		e.equal("again", []any{ok, err, w.MediaType}, []any{true, nil, imageType})
		_, _, err = e.Resolve(e.ctx, w, sha("b"), "")
		e.is(err, accel.ErrInvalid)
	},
}

var foldTests = map[string]func(*env){
	"children are folded into their index": func(e *env) {
		e.push(ofType(event("", sha("amd64"), 1), imageType))
		arm := e.push(ofType(event("", sha("arm64"), 1), imageType))
		tagged := e.push(event("v1-s390x", sha("s390x"), 1))
		asked := e.push(from(accel.OriginAPI, event("", sha("riscv"), 0)))
		e.claim()
		e.claim()
		time.Sleep(10 * time.Second)
		e.claim() // a child that is in somebody's hands, beside one that is not
		index := e.push(ofType(event("v1", sha("index"), 1), indexType))
		inWork, err := e.IndexInWork(e.ctx, repo)
		e.equal("index in work", []any{inWork, err}, []any{true, nil})
		w := e.claim()
		for w.ID != index.ID {
			w = e.claim()
		}
		children := []digest.Digest{sha("amd64"), sha("arm64"), sha("s390x"), sha("riscv"), sha("never seen")}
		for range 2 { // as often as one likes
			e.ok(e.Fold(e.ctx, w, indexType, children))
		}
		inWork, err = e.IndexInWork(e.ctx, repo)
		e.equal("index in work", []any{inWork, err}, []any{true, nil}) // the tagged one of unknown kind
		e.equal("old id", e.get(arm.ID).ID, index.ID)
		e.state(tagged.ID, accel.Converting)
		e.state(asked.ID, accel.Converting)
		for _, d := range []digest.Digest{sha("amd64"), sha("arm64"), sha("never seen")} {
			st, err := e.Find(e.ctx, reference("", d))
			e.ok(err)
			e.equal("found", st.ID, index.ID)
			e.equal("late event", e.push(event("", d, 1)).ID, index.ID)
		}
		e.finish(w)
		e.equal("late event when ready", e.push(event("", sha("arm64"), 1)).State, accel.Ready)
		own := e.push(event("v1-arm64", sha("arm64"), 2)) // a tag of its own: a record of its own
		e.equal("id", own.ID, arm.ID)
		e.equal("by id", e.get(arm.ID).Digest, sha("arm64"))
		st, err := e.Find(e.ctx, reference("", sha("arm64")))
		e.ok(err)
		e.equal("in work", st.ID, own.ID)
	},
	"a folded child's worker has lost it, its mapping stays": func(e *env) {
		e.push(event("", sha("a"), 0))
		time.Sleep(time.Second)
		e.push(event("", sha("b"), 0))
		time.Sleep(time.Minute)
		e.finish(e.claim())
		b := e.claim()
		e.push(ofType(event("v1", sha("index"), 1), indexType))
		w := e.claim()
		e.ok(e.Fold(e.ctx, w, indexType, []digest.Digest{sha("a"), sha("b")}))
		e.is(e.Renew(e.ctx, b), accel.ErrLeaseLost)
		e.ok(second(e.Mapping(e.ctx, repo, sha("a"))))
		e.ok(e.Finish(e.ctx, w, accel.Target{Repository: repo, Digest: sha("t")}, accel.Result{}, map[digest.Digest][]byte{sha("b"): []byte("new")}))
		e.is(second(e.Mapping(e.ctx, repo, sha("a"))), accel.ErrNotFound)
		m, err := e.Mapping(e.ctx, repo, sha("b"))
		e.equal("mapping", []any{string(m), err}, []any{"new", nil})
		e.is(second(e.Mapping(e.ctx, "registry.example/other", sha("b"))), accel.ErrNotFound)
	},
	"a child of an index that was given up is an image of its own": func(e *env) {
		index := e.push(ofType(event("v1", sha("index"), 1), indexType))
		e.ok(e.Fold(e.ctx, e.claim(), "", []digest.Digest{sha("a")}))
		e.push(event("v1", sha("other"), 2))
		e.state(index.ID, accel.Superseded)
		a := e.push(event("", sha("a"), 3))
		e.equal("record", []any{a.Digest, a.State}, []any{sha("a"), accel.Pending})
		st, err := e.Find(e.ctx, reference("", sha("a")))
		e.ok(err)
		e.equal("found", st.ID, a.ID)
	},
	"a nested index": func(e *env) {
		e.push(ofType(event("", sha("inner"), 1), indexType))
		e.ok(e.Fold(e.ctx, e.claim(), "", []digest.Digest{sha("a")}))
		outer := e.push(ofType(event("v1", sha("outer"), 1), indexType))
		e.ok(e.Fold(e.ctx, e.claim(), "", []digest.Digest{sha("inner"), sha("outer")}))
		for _, d := range []digest.Digest{sha("a"), sha("inner"), sha("outer")} {
			st, err := e.Find(e.ctx, reference("", d))
			e.ok(err)
			e.equal("found", st.ID, outer.ID)
		}
	},
	"kinds that are not known": func(e *env) {
		inWork := func(want bool) {
			e.Helper()
			got, err := e.IndexInWork(e.ctx, repo)
			e.equal("index in work", []any{got, err}, []any{want, nil})
		}
		for _, name := range []string{"a", "b"} { // two children do not wait for each other
			e.push(event("", sha(name), 0))
		}
		inWork(false)
		e.push(event("v1", sha("c"), 0))
		inWork(true)
		e.ok(e.Fold(e.ctx, e.claim(), imageType, nil)) // it turned out to be an image
		inWork(false)
		e.push(event("v2", "", 0))
		inWork(true)
		e.is(e.Fold(e.ctx, e.claim(), "", []digest.Digest{"x"}), accel.ErrInvalid)
	},
}
