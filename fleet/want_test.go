package fleet_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"accel"
	"accel/fleet"
)

func TestWishIsIdempotent(t *testing.T) {
	b := newBed(t, fleet.Options{})
	b.seen(node("n1"), node("n2"))
	first := b.want(repository+"@"+source("a").String(), "n1")
	if len(first) != 1 || first[0].State != accel.WarmPending || first[0].Digest != source("a") || first[0].Node != "n1" {
		t.Fatalf("the wish is %+v", first)
	}
	// With a tag beside the digest it is the same image.
	if again := b.want(repository+"@"+source("a").String(), "n1", "n1"); len(again) != 1 || again[0] != first[0] {
		t.Errorf("asked again it is %+v, was %+v", again, first)
	}
	fetching := b.report(first[0], accel.WarmFetching)
	if again := b.want(first[0].Image, "n1"); again[0] != fetching {
		t.Errorf("asked again while fetching it is %+v", again)
	}
	b.expect("n1", "")
	for _, end := range []accel.WarmState{accel.WarmDone, accel.WarmFailed} {
		w := b.want(first[0].Image, "n1")[0]
		w.TotalBytes, w.FetchedBytes, w.Reason = 10, 4, "a\nreason"
		w = b.report(w, end)
		if w != b.report(w, end) || w.TotalBytes != 10 || w.FetchedBytes != 4 || w.Reason != "a reason" {
			t.Errorf("reported as %s it is %+v", end, w)
		}
		b.clock.pass(time.Second)
		now := b.want(first[0].Image, "n1")[0] // the node may have evicted it
		if now.State != accel.WarmPending || now.Reason != "" || now.TotalBytes != 0 || now.ID != w.ID || !now.CreatedAt.After(w.CreatedAt) {
			t.Errorf("asked again after %s it is %+v", end, now)
		}
		b.expect("n1", "a")
	}
	if all := b.want(repository + ":v1"); len(all) != 2 || all[0].Node != "n1" || all[1].Node != "n2" || all[0].Digest != "" {
		t.Errorf("without names: %+v", all)
	}
	b.expect("n2", ":v1")
}

func TestWishForNobody(t *testing.T) {
	b := newBed(t, fleet.Options{})
	for _, nodes := range [][]string{nil, {"n1"}} {
		if _, err := b.Want(t.Context(), ref(t, repository), nodes); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("nodes %v: %v", nodes, err)
		}
	}
	b.seen(node("n1"))
	if _, err := b.Want(t.Context(), ref(t, repository), []string{"n1", "n2"}); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("one of two is unknown: %v", err)
	}
	b.expect("n1", "") // nothing of a wish that failed stays
}

func TestReportIsJudged(t *testing.T) {
	b := newBed(t, fleet.Options{})
	b.seen(node("n1"))
	w := b.want(repository+":v1", "n1")[0]
	for name, c := range map[string]struct {
		change func(*accel.Warm)
		want   error
	}{
		"pending":       {func(w *accel.Warm) { w.State = accel.WarmPending }, accel.ErrInvalid},
		"no state":      {func(w *accel.Warm) { w.State = "" }, accel.ErrInvalid},
		"bad digest":    {func(w *accel.Warm) { w.Digest = "sha256:x" }, accel.ErrInvalid},
		"negative":      {func(w *accel.Warm) { w.FetchedBytes = -1 }, accel.ErrInvalid},
		"other node":    {func(w *accel.Warm) { w.Node = "n2" }, accel.ErrInvalid},
		"unknown":       {func(w *accel.Warm) { w.ID = "x" }, accel.ErrNotFound},
		"no id":         {func(w *accel.Warm) { w.ID = "" }, accel.ErrNotFound},
		"node left out": {func(w *accel.Warm) { w.Node = "" }, nil},
		"other image":   {func(w *accel.Warm) { w.Image, w.Rule, w.CreatedAt = "x", "y", time.Time{} }, nil},
	} {
		given := w
		given.State = accel.WarmFetching
		c.change(&given)
		got, err := b.Report(t.Context(), given)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err == nil && (got.Image != w.Image || got.Rule != w.Rule || !got.CreatedAt.Equal(w.CreatedAt) || got.Node != w.Node) {
			t.Errorf("%s: a report changed what was asked for: %+v", name, got)
		}
	}
	w.Digest = source("a")
	w = b.report(w, accel.WarmDone)
	w.State = accel.WarmFetching
	if _, err := b.Report(t.Context(), w); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("Fetching after the end: %v", err)
	}
	// By digest it is found, though it was asked for by tag.
	if got := b.states(fleet.Filter{Images: []accel.Reference{ref(t, repository+"@"+source("a").String())}}); got != "n1 Warm" {
		t.Errorf("by digest: %q", got)
	}
	if w = b.report(w, accel.WarmFailed); w.Reason == "" {
		t.Error("a failure without a reason has none")
	}
}

func TestNextWaits(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything()})
	type answer struct {
		warms []accel.Warm
		err   error
	}
	poll := func(ctx context.Context, name string) <-chan answer {
		got := make(chan answer, 1)
		go func() {
			warms, err := b.Next(ctx, name, time.Hour)
			got <- answer{warms, err}
		}()
		return got
	}
	early := poll(t.Context(), "n1") // before anybody has heard of it
	b.ready("a", "v1")
	b.seen(node("n1"))
	got := <-early
	must(t, got.err)
	if said(got.warms, "a") != "a" {
		t.Errorf("a node that is new is given %+v", got.warms)
	}
	b.report(got.warms[0], accel.WarmFetching)
	one, two := poll(t.Context(), "n1"), poll(t.Context(), "n1")
	b.want(repository+":v2", "n1")
	for _, c := range []<-chan answer{one, two} {
		if got := <-c; got.err != nil || said(got.warms) != ":v2" {
			t.Errorf("woken with %+v", got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := poll(ctx, "n2")
	cancel()
	if got := <-ended; !errors.Is(got.err, context.Canceled) {
		t.Errorf("a poll that was given up: %+v", got)
	}
	if warms, err := b.Next(t.Context(), "n2", time.Millisecond); err != nil || len(warms) != 0 {
		t.Errorf("nothing to do: %v, %v", warms, err)
	}
}

func TestNextIsBoundedAndInOrder(t *testing.T) {
	b := newBed(t, fleet.Options{})
	b.seen(node("n1"))
	for i := range 120 {
		b.want(fmt.Sprintf("%s:v%03d", repository, i), "n1")
		b.clock.pass(time.Second)
	}
	for at := 0; at < 120; {
		warms, err := b.Next(t.Context(), "n1", 0)
		must(t, err)
		if len(warms) == 0 || len(warms) > 50 {
			t.Fatalf("%d at once", len(warms))
		}
		for _, w := range warms {
			if want := fmt.Sprintf("%s:v%03d", repository, at); w.Image != want {
				t.Fatalf("got %s, want %s", w.Image, want)
			}
			b.report(w, accel.WarmFetching)
			at++
		}
	}
}

func TestPages(t *testing.T) {
	b := newBed(t, fleet.Options{})
	b.seen(node("n1"), node("n2"))
	for i := range 5 {
		b.want(fmt.Sprint(repository, ":v", i))
		b.clock.pass(time.Second)
	}
	both := []accel.Reference{ref(t, repository+":v1"), ref(t, repository+":v3"), ref(t, repository+":v1")}
	for name, c := range map[string]struct {
		sel  fleet.Filter
		want int
	}{
		"all": {fleet.Filter{}, 10}, "node": {fleet.Filter{Node: "n2"}, 5}, "images": {fleet.Filter{Images: both}, 4},
		"image and node": {fleet.Filter{Node: "n1", Images: both}, 2}, "nobody": {fleet.Filter{Node: "n3"}, 0},
	} {
		for limit := 1; limit < 12; limit++ {
			c.sel.Cursor, c.sel.Limit = "", limit
			seen := map[string]bool{}
			var last time.Time
			for {
				page, err := b.Warms(t.Context(), c.sel)
				must(t, err)
				if len(page.Warms) > limit {
					t.Fatalf("%s: %d on a page of %d", name, len(page.Warms), limit)
				}
				for _, w := range page.Warms {
					if seen[w.ID] || (!last.IsZero() && w.CreatedAt.After(last)) {
						t.Fatalf("%s by %d: %s is twice there or out of order", name, limit, w.Image)
					}
					seen[w.ID], last = true, w.CreatedAt
				}
				if c.sel.Cursor = page.Next; c.sel.Cursor == "" {
					break
				}
			}
			if len(seen) != c.want {
				t.Errorf("%s by %d: %d warms, want %d", name, limit, len(seen), c.want)
			}
		}
	}
	for _, bad := range []string{"x", "!", "QUJD"} {
		if _, err := b.Warms(t.Context(), fleet.Filter{Cursor: bad}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("cursor %q: %v", bad, err)
		}
	}
}
