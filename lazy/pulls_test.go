package lazy

import (
	"maps"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/snapshot"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// measuring is what containerd does with images, and what is recorded of it.
type measuring struct {
	t   *testing.T
	p   pulls
	now map[digest.Digest]counts
	got []accel.Pull
}

func newMeasuring(t *testing.T) *measuring {
	m := &measuring{t: t, now: map[digest.Digest]counts{}}
	m.p = pulls{record: func(x accel.Pull) { m.got = append(m.got, x) }, counts: func(d digest.Digest) counts { return m.now[d] }}
	return m
}

// image has layers of 100 bytes, all of which are here.
func (m *measuring) image(name string, layers ...string) *image {
	img := &image{name: "registry.test/" + name, manifest: digest.FromString(name)}
	var diffIDs []digest.Digest
	for _, n := range layers {
		d := digest.FromString(n)
		img.layers = append(img.layers, layer{Digest: d})
		diffIDs = append(diffIDs, d)
		m.now[d] = counts{size: 100, present: 100}
	}
	img.chain(diffIDs)
	return img
}

// request is containerd's for one of an image's layers.
func request(img *image, i int) snapshot.Request {
	for chain, at := range img.chains {
		if at == i {
			return snapshot.Request{Namespace: "k8s.io", Reference: img.name, Manifest: img.manifest, Chain: chain}
		}
	}
	panic("no such layer")
}

func (m *measuring) asks(img *image, i int) { m.p.asked(img, request(img, i), time.Now()) }

func (m *measuring) told(img *image, i int, kind snapshot.Kind) {
	m.p.told(snapshot.Event{Kind: kind, Request: request(img, i)})
}

// gets is a question and its answer, for each of the layers.
func (m *measuring) gets(img *image, kind snapshot.Kind, layers ...int) {
	for _, i := range layers {
		m.asks(img, i)
		m.told(img, i, kind)
	}
}

// pass lets time pass, as far as the pulls can tell.
func (m *measuring) pass(d time.Duration) {
	for _, u := range m.p.under {
		for _, at := range []*time.Time{&u.start, &u.touched, &u.there, &u.mounted, &u.answer} {
			if !at.IsZero() {
				*at = at.Add(-d)
			}
		}
	}
}

// recorded are those since the last time; open is how many must be under way still.
func (m *measuring) recorded(open int, images ...*image) []accel.Pull {
	m.t.Helper()
	m.p.look(time.Now(), false)
	got := m.got
	m.got = nil
	if len(got) != len(images) || len(m.p.under) != open {
		m.t.Fatalf("recorded, with %d under way instead of %d: %+v", len(m.p.under), open, got)
	}
	for i, r := range got {
		if r.Digest != images[i].manifest || r.Image != images[i].name || r.Mode != accel.PullLazy {
			m.t.Errorf("recorded %+v", r)
		}
	}
	return got
}

// within wants a duration that the times of pass make up but for what the test itself takes.
func (m *measuring) within(r accel.Pull, want time.Duration) {
	m.t.Helper()
	if r.Duration < want || r.Duration > want+patience/60 {
		m.t.Errorf("a pull of %v has a duration of %v", want, r.Duration)
	}
}

func TestLazyPullsAreMeasured(t *testing.T) {
	m := newMeasuring(t)
	img := m.image("a:v1", "bottom", "top")
	top := img.layers[1].Digest
	m.now[top] = counts{size: 50}
	m.gets(img, snapshot.KindMounted, 0)
	m.recorded(1)
	m.asks(img, 1)
	m.pass(2 * time.Second)
	m.told(img, 1, snapshot.KindMounted)
	m.now[top] = counts{size: 50, present: 20, fetched: 20, misses: 3, waited: time.Second}
	m.p.answered(top)
	m.recorded(1) // not complete
	m.pass(time.Minute)
	m.now[top] = counts{size: 50, present: 50, fetched: 55, misses: 4, waited: 2 * time.Second}
	r := m.recorded(0, img)[0]
	m.within(r, 2*time.Second)
	if r.RegistryBytes != 55 || r.CacheBytes != 100 || r.Outcome != accel.OutcomePartial || r.Lazy.Misses != 4 || r.Lazy.Waited != 2*time.Second ||
		r.Lazy.Complete < time.Minute || r.Lazy.FirstByte < 2*time.Second {
		t.Errorf("recorded %+v", r)
	}

	m.gets(img, snapshot.KindMounted, 0, 1) // again, all is here
	if r := m.recorded(0, img)[0]; r.Outcome != accel.OutcomeHit || r.RegistryBytes != 0 {
		t.Errorf("a pull of what is here: %+v", r)
	}

	m.asks(img, 0) // and containerd gives up
	m.pass(quietTime + time.Second)
	m.recorded(0)

	m.now[top] = counts{size: 50}
	m.gets(img, snapshot.KindMounted, 0, 1) // the node ends in the middle
	m.p.look(time.Now(), true)
	if len(m.got) != 1 || m.got[0].Lazy.Complete != 0 || len(m.p.under) != 0 {
		t.Errorf("of a node that ended: %+v", m.got)
	}
}

// TestPullsOfImagesThatShareAllLayers: what is there already ends a pull as what is mounted does, and another image's pull
// says nothing of it.
func TestPullsOfImagesThatShareAllLayers(t *testing.T) {
	m := newMeasuring(t)
	one, two := m.image("one:v1", "bottom", "top"), m.image("two:v1", "bottom", "top")
	m.asks(one, 0)
	m.pass(time.Second)
	m.told(one, 0, snapshot.KindMounted)
	m.gets(one, snapshot.KindMounted, 1)
	m.within(m.recorded(0, one)[0], time.Second)
	m.asks(two, 0)
	m.pass(3 * time.Second)
	m.told(two, 0, snapshot.KindShared)
	m.gets(two, snapshot.KindShared, 1)
	m.within(m.recorded(0, two)[0], 3*time.Second)

	top := one.layers[1].Digest // what comes counts once
	m.now[top] = counts{size: 100}
	m.gets(one, snapshot.KindMounted, 0, 1)
	m.now[top] = counts{size: 100, fetched: 30, present: 30}
	m.gets(two, snapshot.KindShared, 0, 1)
	m.recorded(2)
	m.now[top] = counts{size: 100, fetched: 100, present: 100}
	if got := m.recorded(0, one, two); got[0].RegistryBytes != 30 || got[1].RegistryBytes != 70 || got[0].Lazy.Complete == 0 {
		t.Errorf("recorded %+v", got)
	}

	m.gets(one, snapshot.KindShared, 0) // both at once
	m.gets(two, snapshot.KindShared, 0, 1)
	m.within(m.recorded(1, two)[0], 0)
	m.pass(time.Second)
	m.gets(one, snapshot.KindShared, 1)
	m.within(m.recorded(0, one)[0], time.Second)
}

func TestPullsOfOneImageInARow(t *testing.T) {
	m := newMeasuring(t)
	img := m.image("a:v1", "bottom", "top")
	top := img.layers[1].Digest
	m.now[top] = counts{size: 100}
	for i := range 3 {
		m.gets(img, snapshot.KindMounted, 0, 1)
		m.pass(time.Second)
		m.now[top] = counts{size: 100, fetched: int64(10 * (i + 1)), present: int64(10 * (i + 1))}
	}
	// The two that were followed by a further one ended with what they had.
	for _, r := range m.recorded(1, img, img) {
		m.within(r, 0)
		if r.RegistryBytes != 10 || r.Lazy.Complete != 0 {
			t.Errorf("recorded %+v", r)
		}
	}
	m.now[top] = counts{size: 100, fetched: 100, present: 100}
	if r := m.recorded(0, img)[0]; r.RegistryBytes != 80 || r.Lazy.Complete < time.Second {
		t.Errorf("recorded %+v", r)
	}

	m.gets(img, snapshot.KindMounted, 0) // broken off, and begun again
	m.pass(time.Second)
	m.gets(img, snapshot.KindShared, 0, 1)
	m.recorded(1, img)
	m.pass(quietTime)
	m.within(m.recorded(0, img)[0], 0)
}

// TestPullsOfSeveralClients: each counts once, whoever asks for the next layer.
func TestPullsOfSeveralClients(t *testing.T) {
	m := newMeasuring(t)
	img := m.image("a:v1", "bottom", "middle", "top")
	for _, order := range [][]int{{0, 0, 1, 1, 2, 2}, {0, 1, 0, 2, 1, 2}, {0, 1, 0, 1, 2, 2}} {
		m.gets(img, snapshot.KindShared, order...)
		m.recorded(0, img, img)
	}
	m.asks(img, 0) // before the first is answered
	m.asks(img, 0)
	m.told(img, 0, snapshot.KindMounted)
	m.told(img, 0, snapshot.KindShared)
	m.gets(img, snapshot.KindShared, 1, 2, 1, 2)
	m.recorded(0, img, img)
}

// TestPullsWhoseTopmostLayerIsThere: of the layer, under another chain ID, which is another snapshot; and of the snapshot, by another
// pull in the same namespace, whereupon containerd asks for nothing.
func TestPullsWhoseTopmostLayerIsThere(t *testing.T) {
	m := newMeasuring(t)
	img, other := m.image("a:v1", "bottom", "middle", "top"), m.image("b:v1", "other", "top")
	if identity.ChainID([]digest.Digest{other.layers[0].Digest, other.layers[1].Digest}) != request(other, 1).Chain {
		t.Fatal("no chain IDs")
	}
	m.gets(img, snapshot.KindMounted, 0)
	m.gets(other, snapshot.KindMounted, 0, 1)
	m.recorded(1, other)
	m.pass(time.Second)
	m.gets(img, snapshot.KindMounted, 1, 2)
	m.within(m.recorded(0, img)[0], time.Second)

	m.asks(img, 0)
	m.pass(2 * time.Second)
	m.told(img, 0, snapshot.KindMounted)
	m.pass(quietTime - time.Second)
	m.recorded(1)
	m.pass(2 * time.Second)
	m.gets(other, snapshot.KindMounted, 0, 1)
	got := m.recorded(0, img, other)
	m.within(got[0], 2*time.Second)
	m.within(got[1], 0)

	m.gets(img, snapshot.KindMounted, 2) // those below are another image's too
	m.within(m.recorded(0, img)[0], 0)
}

// TestPullsOfWhichLayersAreDownloaded are the mirror's to measure.
func TestPullsOfWhichLayersAreDownloaded(t *testing.T) {
	m := newMeasuring(t)
	img := m.image("a:v1", "bottom", "middle", "top")
	m.gets(img, snapshot.KindMounted, 0)
	m.gets(img, snapshot.KindDeclined, 1)
	m.pass(time.Minute)
	m.recorded(1)
	m.gets(img, snapshot.KindMounted, 2)
	m.recorded(0)

	m.gets(img, snapshot.KindDeclined, 0)
	m.pass(pullTime + time.Second)
	m.recorded(0)

	m.gets(img, snapshot.KindMounted, 0)
	m.told(img, 1, snapshot.KindDeclined) // because of the image, so that it was no layer of one that is mounted
	m.pass(time.Minute)
	m.gets(img, snapshot.KindMounted, 2)
	m.recorded(0)
	m.told(img, 0, snapshot.KindDeclined) // of an image that is not mounted at all
	m.recorded(0)
}

func TestPullsAreBounded(t *testing.T) {
	m := newMeasuring(t)
	img := m.image("a:v1", "bottom", "top")
	for range maxPulls + 10 {
		m.gets(img, snapshot.KindMounted, 0)
	}
	if len(m.p.under) != maxPulls {
		t.Errorf("%d are looked at", len(m.p.under))
	}
}

// TestPullsAreMeasuredByWhatContainerdAsks: through what package snapshot calls.
func TestPullsAreMeasuredByWhatContainerdAsks(t *testing.T) {
	b := newBed(t)
	var mu sync.Mutex
	var got []accel.Pull
	b.start(func(o *Options) {
		o.Record = func(p accel.Pull) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, p)
		}
	})
	bottom, top := b.layerWith("bottom", []byte("bottom")), b.layerWith("top", []byte("top"))
	one, two := b.push("team/one", true, bottom, top), b.push("team/two", true, bottom, top)
	if one.manifest != two.manifest {
		t.Fatal("the names are to be all that differs")
	}
	want := map[string]int{}
	for round, p := range []pushed{one, two, one, one, one} {
		for i := range p.layers {
			r := p.request(i)
			r.Namespace = "k8s.io"
			answer, err := b.lazy.Layer(t.Context(), r)
			must(t, err)
			kind := snapshot.KindShared
			if round == 0 {
				kind = snapshot.KindMounted
			}
			b.lazy.Observe(snapshot.Event{Kind: kind, Request: r, Layer: answer.Layer})
		}
		want[p.name]++
	}
	b.stop() // which ends those whose content has not come
	had := map[string]int{}
	for _, r := range got {
		had[r.Image]++
	}
	if !maps.Equal(had, want) {
		t.Errorf("recorded %v, want %v", had, want)
	}
}
