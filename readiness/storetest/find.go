package storetest

import (
	"fmt"

	"accel"
	"accel/readiness"
)

var findTests = map[string]func(*env){
	"find": func(e *env) {
		for _, ref := range []accel.Reference{reference("v1", ""), reference("", sha("a"))} {
			e.is(second(e.Find(e.ctx, ref)), accel.ErrNotFound)
		}
		a := e.makeReady(event("v1", sha("a"), 1))
		for _, ref := range []accel.Reference{reference("v1", ""), reference("", sha("a")), reference("else", sha("a"))} {
			st, err := e.Find(e.ctx, ref)
			e.ok(err)
			e.equal("found", []any{st.ID, st.Previous == nil}, []any{a.ID, true})
		}
	},
	"the previous ready record": func(e *env) {
		a := e.makeReady(event("v1", sha("a"), 1))
		previous := func(state accel.State, want string) {
			e.Helper()
			st, err := e.Find(e.ctx, reference("v1", ""))
			e.ok(err)
			got := ""
			if st.Previous != nil {
				got = st.Previous.ID
			}
			e.equal("state, previous", []any{st.State, got}, []any{state, want})
		}
		e.push(event("v1", "", 0)) // nobody knows yet what it is
		previous(accel.Pending, a.ID)
		e.push(event("v1", sha("b"), 2))
		e.push(event("v1", sha("c"), 3))
		previous(accel.Pending, a.ID)
		w, ok, err := e.Resolve(e.ctx, e.claim(), sha("c"), "")
		e.equal("resolved", []any{ok, err}, []any{true, nil})
		previous(accel.Converting, a.ID)
		e.finish(w)
		previous(accel.Ready, "")
		e.ok(second(e.Delete(e.ctx, a.ID)))
		e.push(event("v1", sha("d"), 4))
		previous(accel.Pending, w.ID)
	},
	"list": func(e *env) {
		var want []string
		for i := range 7 {
			want = append([]string{e.push(event(fmt.Sprint(i), sha(fmt.Sprint(i)), 1)).ID}, want...)
		}
		var got []string
		f := readiness.Filter{State: accel.Pending, Repository: repo, Limit: 3}
		for pages := 1; ; pages++ {
			page, err := e.List(e.ctx, f)
			e.ok(err)
			for _, r := range page.Records {
				got = append(got, r.ID)
			}
			if f.Cursor = page.Next; f.Cursor == "" {
				e.equal("pages", pages, 3)
				break
			}
		}
		e.equal("listed", got, want)
		for _, f := range []readiness.Filter{{State: "Odd"}, {Cursor: "-"}, {Cursor: "0"}} {
			e.is(second(e.List(e.ctx, f)), accel.ErrInvalid)
		}
		counts, err := e.Counts(e.ctx)
		e.ok(err)
		e.equal("counts", []int{len(counts), counts[accel.Pending].Count, counts[accel.Ready].Count}, []int{7, 7, 0})
	},
	"events": func(e *env) {
		evs, first, err := e.Events(e.ctx, 0, 10)
		e.equal("no events", []any{len(evs), first, err}, []any{0, 0, nil})
		a := e.push(event("v1", sha("a"), 1))
		e.push(event("v1", sha("b"), 2))
		e.ok(second(e.Delete(e.ctx, a.ID)))
		evs, first, err = e.Events(e.ctx, 0, 10)
		e.ok(err)
		got := ""
		for i, ev := range evs {
			got += fmt.Sprintf("%s:%s>%s ", ev.Tags, ev.From, ev.To)
			if i > 0 && ev.Seq <= evs[i-1].Seq {
				e.Fatalf("event %d after %d", ev.Seq, evs[i-1].Seq)
			}
		}
		e.equal("first", first, evs[0].Seq)
		e.equal("events", got, "[v1]:>Pending [v1]:>Pending [v1]:Pending>Superseded []:Superseded> ")
		rest, _, err := e.Events(e.ctx, evs[1].Seq, 1)
		e.equal("rest", []any{len(rest), rest[0].Seq, err}, []any{1, evs[2].Seq, nil})
	},
	"memo": func(e *env) {
		e.is(second(e.Memo(e.ctx, "k")), accel.ErrNotFound)
		e.ok(e.Remember(e.ctx, "k", []byte("v")))
		e.ok(e.Remember(e.ctx, "k", []byte("v")))
		v, err := e.Memo(e.ctx, "k")
		e.equal("memo", []any{string(v), err}, []any{"v", nil})
		e.is(e.Remember(e.ctx, "", nil), accel.ErrInvalid)
		e.is(e.Remember(e.ctx, "k", make([]byte, 65<<10)), accel.ErrInvalid)
	},
}
