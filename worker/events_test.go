package worker_test

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/readiness"
	"accel/registry"
	"accel/worker"
)

func TestDuplicateAndReorderedEvents(t *testing.T) {
	b := newBed(t)
	older := b.upload("app:v1", image(t, 1, "amd64"))
	newer := b.upload("app:v1", image(t, 2, "amd64"))
	at := time.Now().Add(-time.Minute)
	first := b.tell("app:v1", newer, at.Add(time.Second), ociManifest)
	b.tell("app:v1", older, at, ociManifest) // late
	if again := b.tell("app:v1", newer, at.Add(time.Second), ociManifest); again.ID != first.ID {
		t.Errorf("a repeated event made record %s beside %s", again.ID, first.ID)
	}
	rec := b.wait("app:v1", accel.Ready)
	if rec.Digest != newer {
		t.Errorf("tag is ready as %s, want the newer %s", rec.Digest, newer)
	}
	if n := slices.Index(b.history(rec.ID), accel.Ready); n < 0 || slices.Contains(b.history(rec.ID)[n+1:], accel.Ready) {
		t.Errorf("Ready not exactly once: %v", b.history(rec.ID))
	}
	s, err := b.tracker.Find(b.ctx, b.ref("app@"+older.String()))
	must(t, err)
	if s.State != accel.Superseded {
		t.Errorf("the older push is %s, want Superseded", s.State)
	}
}

func TestTagPushedAgainDuringConversion(t *testing.T) {
	b := newBed(t)
	reached, release := make(chan struct{}), make(chan struct{})
	b.board.set(times(1, blobUpload, func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		close(reached)
		select {
		case <-release:
		case <-r.Context().Done():
		}
		return false
	}))
	older := b.upload("app:v1", image(t, 1, "amd64"))
	b.tell("app:v1", older, time.Now().Add(-time.Second), ociManifest)
	<-reached
	newer := b.upload("app:v1", image(t, 2, "amd64"))
	b.tell("app:v1", newer, time.Now(), ociManifest)
	rec := b.wait("app:v1", accel.Ready)
	close(release)
	if rec.Digest != newer {
		t.Fatalf("ready as %s, want %s", rec.Digest, newer)
	}
	waited := b.wait("app@"+older.String(), accel.Ready) // follows the successor
	if waited.ID != rec.ID {
		t.Errorf("a waiter on the older digest got %s, want its successor %s", waited.ID, rec.ID)
	}
	b.stopWork()
	if got := b.standing("app", "v1-esgz"); got != rec.Target.Digest {
		t.Errorf("target tag went back to %s, want %s", got, rec.Target.Digest)
	}
	if h := b.history(func() string {
		s, err := b.tracker.Find(b.ctx, b.ref("app@"+older.String()))
		must(t, err)
		return s.ID
	}()); h[len(h)-1] != accel.Superseded {
		t.Errorf("the older push went %v, want Superseded at the end", h)
	}
	puts := 0
	for _, p := range b.board.manifestPuts() {
		if strings.HasSuffix(p, "/manifests/v1-esgz") {
			puts++
		}
	}
	if puts != 1 {
		t.Errorf("the target tag was written %d times, want once, by the newer push", puts)
	}
}

func TestTwoTagsOneDigest(t *testing.T) {
	b := newBed(t)
	img := image(t, 1, "amd64")
	d := b.upload("app:v1", img)
	b.tell("app:v1", d, time.Now(), ociManifest)
	rec := b.wait("app:v1", accel.Ready)
	b.upload("app:latest", img)
	if other := b.tell("app:latest", d, time.Now(), ociManifest); other.ID != rec.ID {
		t.Errorf("second tag made record %s beside %s", other.ID, rec.ID)
	}
	b.wait("app:latest", accel.Ready)
	b.eventually("the second target tag stands and is told", func() bool {
		got, err := b.tracker.Get(b.ctx, rec.ID)
		must(t, err)
		return b.standing("app", "latest-esgz") == rec.Target.Digest && slices.Equal(got.Target.Tags, []string{"latest-esgz", "v1-esgz"})
	})
	if h := b.history(rec.ID); len(h) != 3 {
		t.Errorf("converted again for a tag: %v", h)
	}
}

// Registries may tell of a push before they move the tag: what they answer meanwhile is no newer push.
func TestEventBeforeItsTag(t *testing.T) {
	b := newBed(t)
	at := time.Now().Add(-time.Minute)
	b.tell("app:v1", b.upload("app:v1", image(t, 1, "amd64")), at, ociManifest)
	former := b.wait("app:v1", accel.Ready)
	two := image(t, 2, "amd64")
	d := b.upload("app:other", two)
	asked := make(chan struct{}, 100)
	b.board.set(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if r.Method == http.MethodHead && strings.HasSuffix(r.URL.Path, "/app/manifests/v1") {
			asked <- struct{}{}
		}
		return false
	})
	pushed := b.tell("app:v1", d, at.Add(time.Second), ociManifest)
	<-asked
	<-asked // it was answered with the former digest, and asks again
	b.upload("app:v1", two)
	if rec := b.wait("app:v1", accel.Ready); rec.Digest != d || slices.Contains(b.history(pushed.ID), accel.Superseded) {
		t.Errorf("the tag is %s, want %s: %v", rec.Digest, d, b.history(pushed.ID))
	}
	if standing := b.standing("app", "v1-esgz"); standing == former.Target.Digest {
		t.Error("the target tag did not follow")
	}

	// One whose tag does not come is out of date.
	three := b.upload("app:other", image(t, 3, "amd64"))
	late := b.tell("app:v1", three, at.Add(2*time.Second), ociManifest)
	b.eventually("what the registry says at last counts", func() bool { return slices.Contains(b.history(late.ID), accel.Superseded) })
	if rec := b.wait("app:v1", accel.Ready); rec.Digest != d {
		t.Errorf("the tag is %s, want %s", rec.Digest, d)
	}
}

func TestTagMovedBack(t *testing.T) {
	b := newBed(t)
	one, two := image(t, 1, "amd64"), image(t, 2, "amd64")
	at := time.Now().Add(-time.Minute)
	d1 := b.upload("app:v1", one)
	b.tell("app:v1", d1, at, ociManifest)
	first := b.wait("app:v1", accel.Ready)
	d2 := b.upload("app:v1", two)
	b.tell("app:v1", d2, at.Add(time.Second), ociManifest)
	b.wait("app:v1", accel.Ready)
	b.upload("app:v1", one)
	b.tell("app:v1", d1, at.Add(2*time.Second), ociManifest)
	b.eventually("the target tag follows back", func() bool { return b.standing("app", "v1-esgz") == first.Target.Digest })
}

func TestIntakeWithoutDigestIsResolved(t *testing.T) {
	b := newBed(t)
	d := b.upload("app:v1", image(t, 1, "amd64"))
	row := b.tell("app:v1", "", time.Time{}, "")
	rec := b.wait("app:v1", accel.Ready)
	if rec.Digest != d {
		t.Errorf("resolved to %s, want %s", rec.Digest, d)
	}
	if got, err := b.tracker.Get(b.ctx, row.ID); err != nil || got.ID != rec.ID {
		t.Errorf("the intake row's id leads to %s, %v; want %s", got.ID, err, rec.ID)
	}
}

func TestReconcileFindsLostPushes(t *testing.T) {
	b := newBed(t)
	b.upload("team/app:v1", image(t, 1, "amd64"))
	b.upload("other/app:v1", image(t, 2, "amd64"))
	ctx, cancel := context.WithCancel(b.ctx)
	r := worker.NewReconciler(worker.ReconcileOptions{Tracker: b.tracker, Registry: b.client, Repositories: []string{b.host + "/team/*"}, Interval: 20 * time.Millisecond, Log: b.options.Log})
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	rec := b.wait("team/app:v1", accel.Ready)
	seen := len(b.history(rec.ID))
	for range 3 { // passes over our own output and what is known
		time.Sleep(30 * time.Millisecond)
	}
	cancel()
	must(t, <-done)
	page, err := b.tracker.List(b.ctx, readiness.Filter{})
	must(t, err)
	if len(page.Records) != 1 || len(b.history(rec.ID)) != seen {
		t.Errorf("reconcile made %d records, want the one of the configured repositories: %v", len(page.Records), b.history(rec.ID))
	}
}

func TestDeleteTargetAndGC(t *testing.T) {
	b := newBed(t)
	d := b.upload("app:v1", index(t, image(t, 1, "amd64"), image(t, 2, "arm64")))
	b.tell("app:v1", d, time.Now(), ociIndex)
	rec := b.wait("app:v1", accel.Ready)
	l := worker.Lifecycle{Tracker: b.tracker, Registry: b.client}
	orphans, err := l.GC(b.ctx, false)
	must(t, err)
	if len(orphans) != 0 {
		t.Fatalf("nothing is orphaned, but: %v", orphans)
	}
	must(t, b.client.Delete(b.ctx, rec.Repository, d))
	orphans, err = l.GC(b.ctx, true)
	must(t, err)
	if len(orphans) != 1 || orphans[0].Removed || b.standing("app", rec.Target.Digest.String()) == "" {
		t.Fatalf("dry run: %+v", orphans)
	}
	orphans, err = l.GC(b.ctx, false)
	must(t, err)
	if len(orphans) != 1 || !orphans[0].Removed || orphans[0].Error != "" {
		t.Fatalf("gc: %+v", orphans)
	}
	if b.standing("app", rec.Target.Digest.String()) != "" {
		t.Error("the target is still there")
	}
	if _, err := b.tracker.Get(b.ctx, rec.ID); err == nil {
		t.Error("the record is still there")
	}
}

func TestSourceGoneTakesTheTargetAlong(t *testing.T) {
	b := newBed(t, func(_ *bed, ro *readiness.Options, _ *registry.Options, wo *worker.Options) {
		ro.CheckInterval, wo.DeleteTargets = 50*time.Millisecond, true
	})
	d := b.upload("app:v1", image(t, 1, "amd64"))
	b.tell("app:v1", d, time.Now(), ociManifest)
	rec := b.wait("app:v1", accel.Ready)
	must(t, b.client.Delete(b.ctx, rec.Repository, d))
	b.eventually("target and record are removed", func() bool {
		_, err := b.tracker.Get(b.ctx, rec.ID)
		return err != nil && b.standing("app", rec.Target.Digest.String()) == ""
	})
}
