package lazy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/snapshot"

	"github.com/opencontainers/go-digest"
)

func named(name string) digest.Digest { return digest.FromString(name) }

// imageWith is an image with layers of these names, the lowest first, of which something was missing when it was looked at.
func imageWith(name string, layers ...string) *image {
	img := &image{name: "registry.example/" + name + ":v1", repository: "registry.example/" + name, manifest: named(name), cold: true}
	for _, l := range layers {
		img.layers = append(img.layers, layer{Digest: named(l)})
	}
	return img
}

// prepared is what the snapshotter tells when a container is about to start on an image.
func prepared(img *image) snapshot.Event {
	e := snapshot.Event{Kind: snapshot.KindPrepared, Key: "ns/1/" + img.name, Began: time.Now()}
	for _, y := range slices.Backward(img.layers) {
		e.Layers = append(e.Layers, y.Digest)
	}
	return e
}

func startsOf(t *testing.T, images ...*image) *starts {
	t.Helper()
	s, err := newStarts()
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range images {
		s.asked(img)
	}
	return s
}

// mount mounts an image's layers anew, and reports whether they are watched.
func (s *starts) mount(img *image) (watched bool) {
	watched = true
	for _, y := range img.layers {
		if !s.mounting(y.Digest) {
			watched = false
			continue
		}
		s.mounted(y.Digest, true)
	}
	return watched
}

func TestFirstStartsAreRecordedOnce(t *testing.T) {
	img := imageWith("app", "base", "app")
	s := startsOf(t, img)
	if !s.mount(img) {
		t.Fatal("a cold image's layers are not watched")
	}
	if !s.holds(named("app")) {
		t.Error("a layer that is complete early is turned to the plain file before the start")
	}
	r := s.begin(prepared(img), "n1")
	if r == nil || len(r.layers) != 2 {
		t.Fatalf("a first start is recorded as %+v", r)
	}
	if again := s.begin(prepared(img), "n1"); again != nil {
		t.Error("a second container of the same image has a recording of its own")
	}
	if !s.holds(named("app")) {
		t.Error("a layer is turned to the plain file in the middle of a recording")
	}
	s.end(r)
	if s.holds(named("app")) || s.holds(named("base")) {
		t.Error("layers stay with the holder when the recording is over")
	}
	if again := s.begin(prepared(img), "n1"); again != nil {
		t.Error("a start whose reads are in the kernel's cache is recorded")
	}
	if s.mount(img); s.begin(prepared(img), "n1") == nil {
		t.Error("the first start after another mount is not recorded")
	}
}

func TestWhatIsNotRecorded(t *testing.T) {
	img, other := imageWith("app", "base", "app"), imageWith("other", "base", "app", "more")
	s := startsOf(t, img)
	s.mount(img)
	if s.begin(prepared(other), "n1") != nil {
		t.Error("an image that nobody has looked at is recorded")
	}
	if s.begin(snapshot.Event{Kind: snapshot.KindPrepared, Layers: []digest.Digest{named("app")}}, "n1") != nil {
		t.Error("a part of an image is recorded")
	}
	s = startsOf(t, img)
	s.more(img.manifest, false)
	if s.mount(img) || s.begin(prepared(img), "n1") != nil {
		t.Error("an image of which there is enough is recorded")
	}
	s.more(img.manifest, true)
	if !s.mount(img) || s.begin(prepared(img), "n1") == nil {
		t.Error("an image of which more is wanted again is not recorded")
	}
	img.cold = false
	if startsOf(t, img).mount(img) {
		t.Error("a warm image is mounted through the holder")
	}
}

// TestWantedStartsAreRecorded: once, by the name that is pulled, with enough recordings, and of an image that is all here.
func TestWantedStartsAreRecorded(t *testing.T) {
	img := imageWith("app", "base", "app")
	img.cold = false
	s := startsOf(t, img)
	l := &Lazy{starts: s}
	s.more(img.manifest, false)
	s.want(img.name, time.Now())
	if s.askedAs("registry.example/app:other", img); s.mount(img) {
		t.Fatal("another name of it is wanted")
	}
	s.askedAs(img.name, img)
	if !s.mount(img) {
		t.Fatal("its layers are not watched")
	}
	r := s.begin(prepared(img), "n1")
	if r == nil {
		t.Fatal("it is not recorded")
	}
	again := prepared(img)
	again.Key = "ns/2/second"
	if s.begin(again, "n1") != nil {
		t.Error("a second start at the same time is recorded")
	}
	notRecorded := func(container, why string) {
		t.Helper()
		if err := l.Answered(container, false); !errors.Is(err, accel.ErrNotFound) || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want the reason: %s", container, err, why)
		}
	}
	notRecorded("second", "by container ns/1/registry.example/app:v1, is being recorded")
	s.end(r)
	s.askedAs(img.name, img)
	again.Key = "ns/3/third"
	if s.mount(img) || s.begin(again, "n1") != nil {
		t.Error("one more is recorded than was wanted")
	}
	notRecorded("third", "enough for now")
	s.more(img.manifest, true)
	again.Key = "ns/4/fourth"
	s.begin(again, "n1")
	notRecorded("fourth", "mounted before")
	notRecorded("fifth", "mounted lazily")

	s.want(img.name, time.Now().Add(-WantedTime))
	if s.askedAs(img.name, img); s.mount(img) {
		t.Error("it is wanted for ever")
	}
	for i := range 2 * maxWanted {
		s.want(fmt.Sprint("registry.example/app:", i), time.Now())
		s.skip(again, "")
	}
	s.skip(again, "")
	if len(s.wanted) > maxWanted || len(s.skipped) > maxStarts {
		t.Errorf("%d wanted, %d skipped", len(s.wanted), len(s.skipped))
	}
}

// Two images that share a layer: the holder cannot tell who reads it, so it belongs to who came first, until another comes.
func TestSharedLayersAreCutOff(t *testing.T) {
	a, b := imageWith("a", "base", "a"), imageWith("b", "base", "b")
	s := startsOf(t, a, b)
	s.mount(a)
	s.mount(b)
	first := s.begin(prepared(a), "n1")
	if first == nil {
		t.Fatal("the first is not recorded")
	}
	if _, cut := first.until(named("base")); cut {
		t.Error("cut off before anybody else came")
	}
	second := s.begin(prepared(b), "n1")
	if second == nil || second.layers[named("base")] || !second.layers[named("b")] {
		t.Fatalf("the second is recorded as %+v", second)
	}
	if at, cut := first.until(named("base")); !cut || at.IsZero() {
		t.Error("the first goes on with a layer that the second reads")
	}
	if _, cut := first.until(named("a")); cut {
		t.Error("a layer that nobody else has is cut off")
	}
	s.end(first)
	s.end(second)
	if n := len(s.under); n > 0 || s.count != 0 {
		t.Errorf("%d layers, %d recordings are left", n, s.count)
	}
}

// Two images that have the same layers and another command each: which one a container is of is not known.
func TestImagesThatDifferInTheirConfig(t *testing.T) {
	a, b := imageWith("a", "base", "app"), imageWith("b", "base", "app")
	s := startsOf(t, a, b)
	s.mount(a)
	first := s.begin(prepared(a), "n1")
	if first == nil {
		t.Fatal("the first is not recorded")
	}
	if s.begin(prepared(b), "n1") != nil {
		t.Error("the second is recorded too")
	}
	for _, d := range []string{"base", "app"} {
		if _, cut := first.until(named(d)); !cut {
			t.Errorf("what the second reads of %s counts for the first", d)
		}
	}
}

func TestRecordingsAreBounded(t *testing.T) {
	var images []*image
	for i := range 2 * maxStarts {
		images = append(images, imageWith(fmt.Sprint("app", i), fmt.Sprint("layer", i)))
	}
	s := startsOf(t, images...)
	var under []*recording
	for _, img := range images {
		s.mount(img)
		if r := s.begin(prepared(img), "n1"); r != nil {
			under = append(under, r)
		}
	}
	if len(under) != maxStarts {
		t.Errorf("%d recordings at a time", len(under))
	}
	for _, r := range under {
		s.end(r)
	}
	for range 3 * maxStarts {
		s.mount(images[0])
		s.end(s.begin(prepared(images[0]), "n1"))
	}
	if len(s.past) != maxStarts {
		t.Errorf("%d are remembered", len(s.past))
	}
}

func TestAnsweredFindsItsContainer(t *testing.T) {
	img := imageWith("app", "app")
	s := startsOf(t, img)
	l := &Lazy{starts: s}
	s.mount(img)
	e := prepared(img)
	e.Key = "k8s.io/17/web"
	r := s.begin(e, "n1")
	for _, stranger := range []string{"eb", "other", "17"} {
		if err := l.Answered(stranger, false); err == nil {
			t.Errorf("%q is taken for %s", stranger, e.Key)
		}
	}
	if err := l.Answered("web", true); err != nil || !r.failed {
		t.Errorf("failed: %v, %v", r.failed, err)
	}
	r.recorder.Wait(t.Context()) // returns at once
	if rep := r.recorder.Report(nil); rep.End != "answered" || !rep.Complete {
		t.Errorf("report %+v", rep)
	}
	if got := l.Starts(); len(got) != 1 || got[0].Container != e.Key || got[0].End != "" {
		t.Errorf("starts %+v", got)
	}
}

func TestOverdueLayersAreReleased(t *testing.T) {
	img := imageWith("app", "a", "b")
	s := startsOf(t, img)
	s.mount(img)
	s.held[named("a")] = time.Now().Add(-time.Second)
	if got := s.overdue(); !slices.Equal(got, []digest.Digest{named("a")}) || s.holds(named("a")) || !s.holds(named("b")) {
		t.Errorf("released %v", got)
	}
	if s.closed(named("b")); s.holds(named("b")) {
		t.Error("a closed layer is held")
	}
}
