package lazy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/profile"
	"accel/trust"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
)

func TestWarmsThatStallEnd(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	s := stall{limit: time.Minute}
	for i := range 10 { // a part every 59 s
		if err := s.look(100-i, now.Add(time.Duration(i)*59*time.Second)); err != nil {
			t.Fatalf("part %d: %v", i, err)
		}
	}
	now = now.Add(9 * 59 * time.Second)
	if err := s.look(91, now.Add(time.Minute)); err != nil {
		t.Error("at the limit:", err)
	}
	if err := s.look(91, now.Add(time.Minute+1)); !errors.Is(err, ErrStalled) {
		t.Errorf("above the limit: %v", err)
	}
}

// TestPlansWaitForTheirTurn: a hundred images that are asked for at once are not planned for at once.
func TestPlansWaitForTheirTurn(t *testing.T) {
	b := newBed(t)
	for range plannings {
		b.lazy.plans <- struct{}{}
	}
	img := b.push("team/app", true, b.layerWith("file", []byte("content")))
	_, err := b.lazy.profiles.add(profile.Report{
		ID: strings.Repeat("0", 32), Node: "n1", Manifest: img.manifest, StartedAt: time.Unix(1_700_000_000, 0).UTC(), Complete: true, End: profile.EndAnswered,
		Items: []accel.ProfileItem{{Path: "file", Bytes: 7}},
	})
	must(t, err)
	must(t, b.ask(img))
	if b.lazy.AheadOf(img.manifest) != nil {
		t.Error("planned out of turn")
	}
	<-b.lazy.plans
	b.until("it is planned", func() bool { return b.lazy.AheadOf(img.manifest) != nil })
}

// TestStuckReportsBlockNoOthers: those that the server never takes are passed over in the next round.
func TestStuckReportsBlockNoOthers(t *testing.T) {
	var mu sync.Mutex
	stuck, came := map[string]bool{}, 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		for manifest := range stuck {
			if strings.Contains(r.URL.Path, manifest) {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
		}
		came++
		fmt.Fprint(w, `{"wantMore": true}`)
	}))
	defer server.Close()
	l := recorder(t, server.URL)
	for i := range 8 {
		app := named(fmt.Sprint("app", i))
		if i < 2*maxRefused-1 {
			stuck[app.String()] = true
		}
		must(t, l.keepStart(reportOn(app, i, "bin/app")))
	}
	for range 3 {
		if err := l.reportAll(t.Context()); err == nil {
			t.Error("some are stuck, and nobody is told")
		}
	}
	files, err := filesIn(l.reports.dir)
	must(t, err)
	if len(files) != len(stuck) || came != 8-len(stuck) {
		t.Errorf("%d reports came, %d wait; want all but %d to come", came, len(files), len(stuck))
	}
}

// TestUnreadableMappingIsPassedOver: whoever may push can attach one that cannot be read, before the service's.
func TestUnreadableMappingIsPassedOver(t *testing.T) {
	ring, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	b := newBed(t)
	b.start(func(o *Options) {
		v, err := trust.NewVerifier(ring.Export())
		must(t, err)
		o.Keys.trusted = []*trust.Verifier{v}
	})
	img := b.push("team/app", true, b.layerWith("file", []byte("content")))
	m := accel.Mapping{
		SourceRepository: b.host + "/team/app", SourceManifest: img.manifest, Platform: "linux/amd64",
		TargetRepository: b.host + "/team/app", TargetManifest: digest.FromString("t"), Params: "p",
	}
	envelope, err := ring.Sign(t.Context(), m)
	must(t, err)
	for i := range 3 {
		b.attach("team/app", img.manifest, accel.MediaTypeMapping, map[string]string{"n": fmt.Sprint(i)}) // no envelope
	}
	b.attach("team/app", img.manifest, accel.MediaTypeMapping, map[string]string{accel.AnnotationMapping: string(envelope)})
	source, err := b.lazy.o.Registry.Source(b.host+"/team/app", "")
	must(t, err)
	look := func() (accel.Mapping, error) {
		got, err := b.lazy.mapping(t.Context(), b.lazy.attachedTo(t.Context(), source, img.manifest))
		b.lazy.work.Wait()
		return got, err
	}
	bad := map[string]bool{}
	listed, err := source.Referrers(t.Context(), img.manifest, "")
	must(t, err)
	for _, d := range listed {
		m, err := artifactOf(t.Context(), source, digest.Digest(d.Digest.String()))
		must(t, err)
		if m.Annotations[accel.AnnotationMapping] == "" {
			bad["/v2/team/app/manifests/"+d.Digest.String()] = true
		}
	}
	if len(bad) != 3 {
		t.Fatalf("%d of %d have no envelope", len(bad), len(listed))
	}
	for _, code := range []int{http.StatusNotFound, http.StatusForbidden, http.StatusServiceUnavailable} {
		b.answerWith(code, func(r *http.Request) bool { return r.Method == http.MethodGet && bad[r.URL.Path] })
		for range 10 { // the registry lists them in no order
			if got, err := look(); err != nil || got.TargetManifest != m.TargetManifest {
				t.Errorf("behind those that are answered with %d: %v", code, err)
			}
		}
	}
}

// TestKeysOfAServerInTrouble: each envelope that nobody knows would have it asked.
func TestKeysOfAServerInTrouble(t *testing.T) {
	k := &Keys{}
	now := time.Now()
	asked := 0
	k.ask = func(context.Context) ([]byte, error) {
		asked++
		return nil, errors.New("in trouble")
	}
	for range 5 {
		k.refresh(t.Context())
	}
	if asked != 1 || k.again.Before(now.Add(keysRetry)) {
		t.Errorf("asked %d times at once, again after %s", asked, k.again.Sub(now))
	}
	for range 10 {
		k.again = time.Time{}
		k.refresh(t.Context())
	}
	if k.pause != keysAgain {
		t.Errorf("after many failures it is left alone for %s", k.pause)
	}
}

// TestNothingAheadForAWhile: a comparison that is broken off leaves no image slow for good.
func TestNothingAheadForAWhile(t *testing.T) {
	s := startsOf(t)
	now := time.Unix(1_700_000_000, 0)
	s.setPlain(named("a"), false, now)
	if !s.isPlain(named("a"), now.Add(PlainTime-1)) || s.isPlain(named("a"), now.Add(PlainTime)) || s.isPlain(named("b"), now) {
		t.Error("it does not count for its time and its image")
	}
	s.setPlain(named("a"), true, now)
	if s.isPlain(named("a"), now) {
		t.Error("it cannot be taken back")
	}
	for i := range 2 * maxAnswers {
		s.setPlain(named(fmt.Sprint(i)), false, now)
		if !s.isPlain(named(fmt.Sprint(i)), now) {
			t.Fatalf("image %d is not taken", i)
		}
	}
	if len(s.plain) > maxAnswers {
		t.Errorf("%d images are remembered", len(s.plain))
	}
}

// TestTOCsTakeTurns: those of the largest size are unpacked one after the other.
func TestTOCsTakeTurns(t *testing.T) {
	all := semaphore.NewWeighted(accel.MaxTOCBytes)
	one, two := &tocMemory{all: all}, &tocMemory{all: all}
	must(t, one.take(t.Context(), accel.MaxTOCBytes))
	must(t, one.take(t.Context(), accel.MaxTOCBytes)) // of another repository
	now, cancel := context.WithCancel(t.Context())
	cancel()
	if err := two.take(now, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("taken twice: %v", err)
	}
	two.release()
	one.release()
	one.release()
	must(t, two.take(t.Context(), accel.MaxTOCBytes))
	two.release()
}

// TestPullsAreMeasuredWhileOriginsGrow: for the race detector.
func TestPullsAreMeasuredWhileOriginsGrow(t *testing.T) {
	b := newBed(t)
	layer := b.layerWith("file", []byte("content"))
	must(t, b.ask(b.push("team/app", true, layer)))
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			default:
				b.lazy.counts(layer.digest)
			}
		}
	}()
	for i := range 10 {
		must(t, b.ask(b.push(fmt.Sprint("team/app", i), true, layer)))
	}
	close(end)
	<-ended
}
