package storetest

import (
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 678_000, time.UTC)

func entry(id string, state accel.State) readiness.Entry {
	return readiness.Entry{Record: accel.Record{ID: id, Repository: repo, Digest: sha(id), Params: "p", Origin: "hook", State: state, CreatedAt: epoch, UpdatedAt: epoch}}
}

func update(t *testing.T, s readiness.Store, fn func(readiness.Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), fn); err != nil {
		t.Fatalf("update: %v", err)
	}
}

func view(t *testing.T, s readiness.Store, fn func(readiness.Tx) error) {
	t.Helper()
	if err := s.View(t.Context(), fn); err != nil {
		t.Fatalf("view: %v", err)
	}
}

func put(t *testing.T, s readiness.Store, es ...readiness.Entry) {
	t.Helper()
	update(t, s, func(tx readiness.Tx) error {
		for _, e := range es {
			if err := tx.Put(e); err != nil {
				return err
			}
		}
		return nil
	})
}

func want(what string, got, want any) error {
	if !reflect.DeepEqual(got, want) {
		return fmt.Errorf("%s: %+v, want %+v", what, got, want)
	}
	return nil
}

func missing(what string, err error) error {
	if !errors.Is(err, accel.ErrNotFound) {
		return fmt.Errorf("%s: error %w, want not found", what, err)
	}
	return nil
}

func ids(es []readiness.Entry) string {
	s := ""
	for _, e := range es {
		s += e.ID + " "
	}
	return s
}

func testRecords(t *testing.T, s readiness.Store) {
	full := entry("full", accel.Ready)
	full.Tags, full.MediaType, full.Reason, full.Rule = []string{"a", "b"}, imageType, "r", "rule"
	full.Attempts, full.SuccessorID, full.Lease = 3, "other", 1<<63+1
	full.DueAt, full.CheckedAt = epoch.Add(time.Hour), epoch.Add(time.Minute)
	full.Target = accel.Target{Repository: "t/r", Digest: "sha512:" + digest.Digest(fmt.Sprintf("%0128d", 7)), Tags: []string{"x"}}
	full.Result = accel.Result{SourceBytes: 1, TargetBytes: -2, UncompressedBytes: 3, Queued: 4, Convert: 5, Push: 6, Verify: 7, Total: 8, Platforms: []string{"linux/amd64"}, Notes: []string{"", "n"}}
	full.Asked, full.Again, full.Folded = true, true, true
	full.Children, full.Aliases = []digest.Digest{sha("c1"), sha("c2")}, []string{"old"}
	bare := entry("bare", accel.Pending)
	bare.Digest = ""
	put(t, s, full, bare)
	view(t, s, func(tx readiness.Tx) error {
		got, err := tx.Get("full")
		other, err2 := tx.Get("bare")
		_, none := tx.Get("none")
		if got.Seq >= other.Seq {
			err = errors.Join(err, fmt.Errorf("number %d of the first record, %d of the second", got.Seq, other.Seq))
		}
		full.Seq, bare.Seq = got.Seq, other.Seq
		return errors.Join(err, err2, want("full record", got, full), want("bare record", other, bare), missing("unknown id", none))
	})
	changed := full
	changed.State, changed.Tags, changed.Seq, changed.Children = accel.Failed, nil, 99, nil
	changed.Aliases = nil
	put(t, s, changed)
	update(t, s, func(tx readiness.Tx) error {
		got, err := tx.Get("full")
		changed.Seq = full.Seq
		return errors.Join(err, want("changed record keeps its number", got, changed), tx.Delete("bare"), missing("second delete", tx.Delete("bare")))
	})
	view(t, s, func(tx readiness.Tx) error {
		_, err := tx.Get("bare")
		return missing("deleted record", err)
	})
}

func testQueues(t *testing.T, s readiness.Store) {
	due := func(id string, state accel.State, at time.Duration) readiness.Entry {
		e := entry(id, state)
		e.DueAt = epoch.Add(at * time.Second)
		return e
	}
	view(t, s, func(tx readiness.Tx) error {
		_, err := tx.Next(readiness.WorkQueue)
		return missing("empty queue", err)
	})
	put(t, s, due("late", accel.Pending, 3), due("lease", accel.Converting, 2), due("retry", accel.Failed, 1), due("retry2", accel.Failed, 1),
		entry("given up", accel.Failed), due("check", accel.Ready, 0), entry("never", accel.Ready), entry("over", accel.Superseded))
	for _, id := range []string{"retry", "retry2", "lease", "late"} {
		update(t, s, func(tx readiness.Tx) error {
			e, err := tx.Next(readiness.WorkQueue)
			return errors.Join(err, want("next", e.ID, id), tx.Delete(e.ID))
		})
	}
	update(t, s, func(tx readiness.Tx) error {
		_, none := tx.Next(readiness.WorkQueue)
		e, err := tx.Next(readiness.CheckQueue)
		e.DueAt = time.Time{}
		err = errors.Join(err, missing("drained queue", none), want("next check", e.ID, "check"), tx.Put(e))
		_, none = tx.Next(readiness.CheckQueue)
		return errors.Join(err, missing("no check", none))
	})
	view(t, s, func(tx readiness.Tx) error {
		got, err := tx.Counts()
		return errors.Join(err, want("counts", got, map[accel.State]readiness.StateCount{
			accel.Failed: {Count: 1, Oldest: epoch}, accel.Ready: {Count: 2, Oldest: epoch}, accel.Superseded: {Count: 1, Oldest: epoch},
		}))
	})
	younger := entry("young", accel.Failed)
	younger.UpdatedAt = epoch.Add(time.Hour)
	put(t, s, younger)
	update(t, s, func(tx readiness.Tx) error { return tx.Delete("given up") })
	view(t, s, func(tx readiness.Tx) error {
		got, err := tx.Counts()
		return errors.Join(err, want("oldest", got[accel.Failed], readiness.StateCount{Count: 1, Oldest: younger.UpdatedAt}))
	})
}

func testDigests(t *testing.T, s readiness.Store) {
	index := entry("index", accel.Converting)
	index.Children = []digest.Digest{sha("amd64"), sha("arm64")}
	other := entry("other", accel.Ready)
	other.Children = []digest.Digest{sha("arm64")}
	own := entry("own", accel.Ready)
	own.Digest = sha("arm64")
	elsewhere := own
	elsewhere.ID, elsewhere.Repository = "elsewhere", "registry.example/else"
	put(t, s, own, index, other, elsewhere)
	lookup := func(d digest.Digest, limit int, wanted string) {
		t.Helper()
		view(t, s, func(tx readiness.Tx) error {
			es, err := tx.ByDigest(repo, d, limit)
			return errors.Join(err, want("by digest", ids(es), wanted))
		})
	}
	lookup(sha("arm64"), 10, "other index own ")
	lookup(sha("arm64"), 2, "other index ")
	lookup(sha("amd64"), 10, "index ")
	lookup(sha("index"), 10, "index ")
	lookup(sha("unknown"), 10, "")
	index.Children = nil
	put(t, s, index)
	lookup(sha("arm64"), 10, "other own ")
	update(t, s, func(tx readiness.Tx) error { return tx.Delete("other") })
	lookup(sha("arm64"), 10, "own ")

	unfolded := func(change func(), wanted bool) {
		t.Helper()
		change()
		put(t, s, index)
		view(t, s, func(tx readiness.Tx) error {
			got, err := tx.Unfolded(repo)
			return errors.Join(err, want("unfolded", got, wanted))
		})
	}
	unfolded(func() {}, false)
	unfolded(func() { index.MediaType = indexType }, true)
	unfolded(func() { index.Folded = true }, false)
	unfolded(func() { index.Folded, index.MediaType, index.Tags = false, "", []string{"v1"} }, true)
	unfolded(func() { index.State, index.Tags = accel.Ready, nil }, false)
}

func testLists(t *testing.T, s readiness.Store) {
	const other = "registry.example/other"
	for i := range 10 {
		e := entry(fmt.Sprint(i), []accel.State{accel.Pending, accel.Ready}[i%2])
		if i%3 == 0 {
			e.Repository = other
		}
		put(t, s, e)
	}
	for _, c := range []struct {
		state      accel.State
		repository string
		limit      int
		want       string
	}{
		{"", "", 100, "9 8 7 6 5 4 3 2 1 0 "},
		{"", "", 3, "9 8 7 "},
		{accel.Ready, "", 100, "9 7 5 3 1 "},
		{"", other, 100, "9 6 3 0 "},
		{accel.Pending, other, 100, "6 0 "},
		{accel.Pending, other, 1, "6 "},
		{accel.Stale, "", 100, ""},
		{"", "registry.example/none", 100, ""},
	} {
		view(t, s, func(tx readiness.Tx) error {
			es, err := tx.List(c.state, c.repository, 0, c.limit)
			err = errors.Join(err, want(fmt.Sprintf("list %q of %q", c.state, c.repository), ids(es), c.want))
			if c.limit < 100 || len(es) < 2 {
				return err
			}
			rest, err2 := tx.List(c.state, c.repository, es[1].Seq, 100)
			return errors.Join(err, err2, want("rest of the list", ids(rest), c.want[4:]))
		})
	}
}

func testTagsAliases(t *testing.T, s readiness.Store) {
	p := readiness.TagPointer{ID: "id", At: epoch, MovedAt: epoch.Add(time.Millisecond), Observed: true, ReadyID: "r", IntakeID: "i"}
	put(t, s, entry("id", accel.Ready))
	update(t, s, func(tx readiness.Tx) error {
		_, none := tx.Tag(repo, "v1")
		_, noAlias := tx.Alias("old")
		return errors.Join(missing("unknown tag", none), missing("unknown alias", noAlias),
			tx.PutTag(repo, "v1", p), tx.PutTag(repo, "v2", readiness.TagPointer{}), tx.DeleteTag(repo, "unknown"),
			tx.PutAlias("old", "id"), tx.PutAlias("older", "id"), tx.PutAlias("unknown", ""))
	})
	update(t, s, func(tx readiness.Tx) error {
		got, err := tx.Tag(repo, "v1")
		zero, err2 := tx.Tag(repo, "v2")
		_, none := tx.Tag(repo+"/v1", "v1")
		heir, err3 := tx.Alias("old")
		return errors.Join(err, err2, err3, missing("another repository", none), want("pointer", got, p), want("zero pointer", zero, readiness.TagPointer{}),
			want("alias", heir, "id"), tx.PutAlias("old", ""), tx.DeleteTag(repo, "v1"), tx.DeleteTag(repo, "v2"))
	})
	update(t, s, func(tx readiness.Tx) error {
		_, none := tx.Tag(repo, "v1")
		_, noAlias := tx.Alias("old")
		return errors.Join(missing("deleted tag", none), missing("removed alias", noAlias), tx.PutAlias("older", ""))
	})
}

func testEventLog(t *testing.T, s readiness.Store) {
	view(t, s, func(tx readiness.Tx) error {
		evs, first, err := tx.Events(0, 10)
		return errors.Join(err, want("events of an empty log", len(evs), 0), want("first", first, uint64(0)))
	})
	const more = 50
	var last uint64
	for range 10 {
		update(t, s, func(tx readiness.Tx) error {
			at := last
			for range (readiness.EventsKept + more) / 10 {
				seq, err := tx.AppendEvent(readiness.Event{At: epoch, ID: "id", Repository: repo, To: accel.Pending, Tags: []string{"t"}})
				if err != nil || seq <= at {
					return fmt.Errorf("number %d after %d: %w", seq, at, err)
				}
				at = seq
			}
			last = at
			return nil
		})
	}
	view(t, s, func(tx readiness.Tx) error {
		evs, first, err := tx.Events(0, 2)
		if err != nil || len(evs) != 2 || evs[0].Seq != first {
			return fmt.Errorf("%d events from %d: %w", len(evs), first, err)
		}
		wanted := readiness.Event{Seq: first, At: epoch, ID: "id", Repository: repo, To: accel.Pending, Tags: []string{"t"}}
		all, _, err := tx.Events(0, 2*readiness.EventsKept)
		next, _, err2 := tx.Events(evs[0].Seq, 1)
		end, first2, err3 := tx.Events(last, 10)
		beyond, _, err4 := tx.Events(^uint64(0), 10)
		return errors.Join(err, err2, err3, err4, want("event", evs[0], wanted), want("events kept", len(all), readiness.EventsKept),
			want("after the first", next, evs[1:]), want("after the last", len(end)+len(beyond), 0), want("first", first2, first))
	})
}

func testMappings(t *testing.T, s readiness.Store) {
	m := sha("manifest")
	elsewhere := entry("elsewhere", accel.Ready)
	elsewhere.Repository = "registry.example/else"
	put(t, s, entry("a", accel.Ready), entry("b", accel.Ready), elsewhere)
	update(t, s, func(tx readiness.Tx) error {
		return errors.Join(tx.PutMapping("a", m, []byte("old")), tx.PutMapping("a", m, []byte("of a")), tx.PutMapping("b", m, []byte("of b")),
			tx.PutMapping("a", sha("second"), []byte("second of a")), tx.PutMapping("elsewhere", m, []byte("else")), missing("unknown record", tx.PutMapping("none", m, nil)))
	})
	lookup := func(repository string, manifest digest.Digest, wanted string) {
		t.Helper()
		view(t, s, func(tx readiness.Tx) error {
			got, err := tx.Mapping(repository, manifest)
			if wanted == "" {
				return missing("mapping", err)
			}
			return errors.Join(err, want("mapping", string(got), wanted))
		})
	}
	lookup(repo, m, "of b")
	lookup("", m, "else")
	lookup("registry.example/none", m, "")
	update(t, s, func(tx readiness.Tx) error { return tx.MoveMappings("b", "") })
	lookup(repo, m, "of a")
	update(t, s, func(tx readiness.Tx) error { return tx.MoveMappings("a", "b") })
	lookup(repo, sha("second"), "second of a")
	update(t, s, func(tx readiness.Tx) error { return errors.Join(tx.Delete("b"), tx.Delete("elsewhere")) })
	lookup("", m, "")
	lookup("", sha("second"), "")
}

func testAnnouncedMemos(t *testing.T, s readiness.Store) {
	update(t, s, func(tx readiness.Tx) error {
		before, err := tx.Announced(sha("x"))
		empty, err2 := tx.Announced("")
		_, none := tx.Memo("k")
		return errors.Join(err, err2, want("announced before", before || empty, false), missing("unknown memo", none),
			tx.Announce(sha("x")), tx.Announce(sha("x")), tx.PutMemo("k", []byte("1")), tx.PutMemo("k", []byte("2")), tx.PutMemo("empty", nil))
	})
	view(t, s, func(tx readiness.Tx) error {
		after, err := tx.Announced(sha("x"))
		v, err2 := tx.Memo("k")
		e, err3 := tx.Memo("empty")
		return errors.Join(err, err2, err3, want("announced", after, true), want("memo", string(v), "2"), want("empty memo", len(e), 0))
	})
	// The oldest are forgotten; what was announced again is not old.
	const batch = 20_000
	for n := 0; n < readiness.AnnouncedKept; n += batch {
		update(t, s, func(tx readiness.Tx) error {
			for i := range batch {
				if err := tx.Announce(sha(fmt.Sprint(n + i))); err != nil {
					return err
				}
			}
			if n+batch < readiness.AnnouncedKept {
				return nil
			}
			return tx.Announce(sha("0"))
		})
	}
	view(t, s, func(tx readiness.Tx) error {
		old, err := tx.Announced(sha("x"))
		again, err2 := tx.Announced(sha("0"))
		young, err3 := tx.Announced(sha(fmt.Sprint(readiness.AnnouncedKept - 1)))
		return errors.Join(err, err2, err3, want("the oldest", old, false), want("announced again", again, true), want("the newest", young, true))
	})
}
