package prefetch

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"time"
)

// bundled is a blob that has chunks of layers as they are, one behind the other.
type bundled struct {
	blob  []byte
	parts []bundledPart
}

type bundledPart struct {
	f     *fixture
	chunk int
	at    int64 // where it ends
}

func (b *bundled) add(f *fixture, chunks ...int) {
	for _, i := range chunks {
		b.blob = append(b.blob, f.data[i]...)
		b.parts = append(b.parts, bundledPart{f, i, int64(len(b.blob))})
	}
}

func (b *bundled) promises() (list []Promised) {
	for _, p := range b.parts {
		list = append(list, Promised{p.f.digest, p.chunk, p.at})
	}
	return list
}

func (b *bundled) open(t *testing.T, f *Filler, source Source) *Stream {
	t.Helper()
	s, err := f.Stream(t.Context(), "registry.example", source, int64(len(b.blob)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if err := s.Promise(b.promises()); err != nil {
		t.Fatal(err)
	}
	return s
}

// deliver reads and puts the parts before end.
func (b *bundled) deliver(s *Stream, from, end int) error {
	for _, p := range b.parts[from:end] {
		data := make([]byte, len(p.f.data[p.chunk]))
		if _, err := io.ReadFull(s, data); err != nil {
			return err
		}
		if err := s.Put(p.f.digest, p.chunk, data, int64(len(data))); err != nil {
			return err
		}
	}
	return nil
}

func chunksUpTo(n int) (all []int) {
	for i := range n {
		all = append(all, i)
	}
	return all
}

// TestStreamBringsWhatItPromises: who misses it waits for it, and nobody asks the registry for any of it.
func TestStreamBringsWhatItPromises(t *testing.T) {
	b := start(t, Options{})
	one, two := build(t, random(21), shape{members: 60, most: 3_000, together: 3}), build(t, random(22), shape{members: 30, most: 3_000})
	reserved := make(chan int64, 10)
	m1, r1, done1 := b.add(one, func(l *Layer) {
		l.Held = true
		l.Reserve = func(n int64) (func(), error) { reserved <- n; return func() { reserved <- -n }, nil }
	})
	m2, r2, done2 := b.add(two, func(l *Layer) { l.Held = true })
	all := &bundled{}
	all.add(two, chunksUpTo(10)...)
	all.add(one, chunksUpTo(len(one.chunks))...)
	all.add(two, chunksUpTo(len(two.chunks))[10:]...)
	s := all.open(t, b.Filler, &registry{blob: all.blob})
	if err := b.Hot(t.Context(), []Piece{{one.digest, 0, len(one.chunks)}}); err != nil {
		t.Fatal(err)
	}
	filled := make(chan error, 2)
	go func() { filled <- b.Fill(t.Context(), one.digest, 3, 5) }()
	go func() { filled <- b.Fill(t.Context(), two.digest, len(two.chunks)-2, 2) }()
	eventually(t, "two that wait", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.layers[one.digest].waiters) == 1 && len(b.layers[two.digest].waiters) == 1
	})
	if err := all.deliver(s, 0, len(all.parts)); err != nil {
		t.Fatal(err)
	}
	s.Close()
	for range 2 {
		if err := <-filled; err != nil {
			t.Error(err)
		}
	}
	b.Release(one.digest, two.digest)
	<-done1
	<-done2
	for i := range one.chunks {
		m1.check(t, i)
	}
	for i := range two.chunks {
		m2.check(t, i)
	}
	if n := len(r1.asked()) + len(r2.asked()); n > 0 {
		t.Errorf("%d requests for what the stream has brought", n)
	}
	if n := <-reserved; n <= 0 || <-reserved != -n {
		t.Error("room was not reserved and given back")
	}
	if s := b.Stats(one.digest); s.FetchedBytes == 0 || s.DemandBytes > 0 {
		t.Errorf("%+v", s)
	}
}

// TestStreamThatEndsEarly: what it does not bring is fetched, for who waits and for the hot set, and what it had
// brought stays.
func TestStreamThatEndsEarly(t *testing.T) {
	b := start(t, noBackground)
	one := build(t, random(23), shape{members: 60, most: 3_000, together: 3})
	m, r, _ := b.add(one, nil)
	all := &bundled{}
	all.add(one, chunksUpTo(len(one.chunks))...)
	s := all.open(t, b.Filler, &registry{blob: all.blob})
	if err := b.Hot(t.Context(), []Piece{{one.digest, 0, len(one.chunks) / 2}}); err != nil {
		t.Fatal(err)
	}
	filled := make(chan error, 1)
	last := len(one.chunks) - 1
	go func() { filled <- b.Fill(t.Context(), one.digest, last, 1) }()
	if err := all.deliver(s, 0, 5); err != nil {
		t.Fatal(err)
	}
	if len(r.asked()) > 0 {
		t.Error("something was asked for that is promised")
	}
	s.Close()
	if err := <-filled; err != nil {
		t.Fatal(err)
	}
	eventually(t, "the hot set", func() bool { return b.Stats(one.digest).HotLeft == 0 })
	m.check(t, last)
	for i := range len(one.chunks) / 2 {
		m.check(t, i)
	}
	if err := s.Put(one.digest, 0, one.data[0], 1); err != nil {
		t.Errorf("after its end: %v", err)
	}
}

// TestStreamLies: a wrong chunk is none, and is fetched.
func TestStreamLies(t *testing.T) {
	b := start(t, noBackground)
	one := build(t, random(24), shape{members: 20, most: 20_000})
	m, _, _ := b.add(one, nil)
	all := &bundled{}
	all.add(one, chunksUpTo(len(one.chunks))...)
	s := all.open(t, b.Filler, &registry{blob: all.blob})
	if err := s.Put(one.digest, 2, bytes.ToUpper(append(one.data[2], 1)), 9); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a wrong chunk: %v", err)
	}
	if err := s.Put("sha256:0000000000000000000000000000000000000000000000000000000000000000", 2, nil, 9); err != nil {
		t.Errorf("a layer that is not there: %v", err)
	}
	s.Close()
	b.fill(one, 2, 1)
	m.check(t, 2)
}

// TestStreamIsOvertaken: what comes much later by the stream is asked for; it is not asked for again.
func TestStreamIsOvertaken(t *testing.T) {
	b := start(t, noBackground)
	one := build(t, random(25), shape{members: 300, most: 200_000})
	m, r, _ := b.add(one, nil)
	all := &bundled{}
	all.add(one, chunksUpTo(len(one.chunks))...)
	s := all.open(t, b.Filler, &registry{blob: all.blob, link: &shaper{bytesPerSecond: 2e6}, latency: time.Millisecond})
	if err := all.deliver(s, 0, 20); err != nil { // so that its rate is known
		t.Fatal(err)
	}
	last := len(one.chunks) - 1
	b.fill(one, last, 1)
	m.check(t, last)
	if n := len(r.asked()); n != 1 {
		t.Errorf("%d requests, want one", n)
	}
	if b.sums().overtakes != 1 {
		t.Errorf("%+v", b.Stats(one.digest))
	}
	if m.Has(last - 1) {
		t.Error("what is promised was fetched along")
	}
}

// TestStreamWithoutAnswer: one that is refused, or brings nothing, is given up, and none waits for it.
func TestStreamWithoutAnswer(t *testing.T) {
	b := start(t, Options{BackgroundBytesPerSecond: -1, StallPatience: 50 * time.Millisecond})
	one := build(t, random(26), shape{members: 20, most: 20_000})
	b.add(one, nil)
	refused := errors.New("no")
	_, err := b.Stream(t.Context(), "registry.example", sourceFunc(func(context.Context, int64, int64) (answerBody, error) { return answerBody{}, refused }), 100)
	if !errors.Is(err, refused) {
		t.Errorf("a refusal: %v", err)
	}
	all := &bundled{}
	all.add(one, chunksUpTo(10)...)
	s := all.open(t, b.Filler, sourceFunc(func(ctx context.Context, _, _ int64) (answerBody, error) {
		return answerBody{&hanging{ctx, bytes.NewReader(all.blob[:100])}}, nil
	}))
	if err := all.deliver(s, 0, 10); !errors.Is(err, errStalled) {
		t.Errorf("one that hangs: %v", err)
	}
	s.Close()
	s.Close()
	b.fill(one, 0, 10)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, k := range b.links {
		if k.flying[hot] != 0 || k.hotBytes != 0 {
			t.Errorf("the link counts %d flights of %d bytes", k.flying[hot], k.hotBytes)
		}
	}
}

// TestStreamOfALayerThatGoes: Remove waits for nothing but Puts.
func TestStreamOfALayerThatGoes(t *testing.T) {
	b := start(t, noBackground)
	one := build(t, random(27), shape{members: 20, most: 20_000})
	m, _, _ := b.add(one, nil)
	all := &bundled{}
	all.add(one, chunksUpTo(len(one.chunks))...)
	s := all.open(t, b.Filler, &registry{blob: all.blob})
	if err := all.deliver(s, 0, 3); err != nil {
		t.Fatal(err)
	}
	b.Remove(one.digest)
	left := m.Left()
	if err := all.deliver(s, 3, 6); err != nil {
		t.Fatal(err)
	}
	if m.Left() != left {
		t.Error("something was put into a layer that was removed")
	}
	s.Close()
}

// TestStreamWithoutRoom: it promises nothing.
func TestStreamWithoutRoom(t *testing.T) {
	b := start(t, noBackground)
	one := build(t, random(28), shape{members: 20, most: 20_000})
	full := errors.New("full")
	b.add(one, func(l *Layer) { l.Reserve = func(int64) (func(), error) { return nil, full } })
	all := &bundled{}
	all.add(one, 1, 2, 3)
	s, err := b.Stream(t.Context(), "registry.example", &registry{blob: all.blob}, int64(len(all.blob)))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Promise(all.promises()); !errors.Is(err, full) {
		t.Errorf("no room: %v", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.layers[one.digest].promised); n > 0 {
		t.Errorf("%d chunks are promised", n)
	}
}

// TestStreamIsWidened: what one connection brings slowly comes over several, in order, each byte once.
func TestStreamIsWidened(t *testing.T) {
	b := start(t, noBackground)
	one := build(t, random(29), shape{members: 400, most: 100_000})
	m, r, _ := b.add(one, nil)
	all := &bundled{}
	all.add(one, chunksUpTo(len(one.chunks))...)
	b.mu.Lock()
	b.linkOf("registry.example").capacity = 50e6
	b.mu.Unlock()
	slow := &registry{blob: all.blob, latency: 5 * time.Millisecond, single: 30 * time.Millisecond}
	s := all.open(t, b.Filler, slow)
	if err := all.deliver(s, 0, len(all.parts)); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Error("it goes on behind its end")
	}
	s.Close()
	for i := range one.chunks {
		m.check(t, i)
	}
	if len(r.asked()) > 0 {
		t.Error("the layer was asked for something")
	}
	ranges := slow.asked()
	if slow.mostOpen < 3 || len(ranges) < 3 {
		t.Errorf("%d requests, %d at a time", len(ranges), slow.mostOpen)
	}
	slices.SortFunc(ranges, func(a, b [2]int64) int { return cmp.Compare(a[0], b[0]) })
	at := ranges[1][0] // where the first one ended
	for _, r := range ranges[1:] {
		if r[0] != at {
			t.Errorf("bytes from %d were asked for, want %d", r[0], at)
		}
		at += r[1]
	}
	if at != int64(len(all.blob)) {
		t.Errorf("%d bytes were asked for of %d", at, len(all.blob))
	}
}

// TestWideStreamFails: a piece that does not come ends the stream, and no request outlives it.
func TestWideStreamFails(t *testing.T) {
	b := start(t, noBackground)
	one := build(t, random(30), shape{members: 400, most: 100_000})
	b.add(one, nil)
	all := &bundled{}
	all.add(one, chunksUpTo(len(one.chunks))...)
	refused := errors.New("no")
	b.mu.Lock()
	b.linkOf("registry.example").capacity = 50e6
	b.mu.Unlock()
	slow := &registry{blob: all.blob, single: 30 * time.Millisecond, fault: func(k int, _ context.Context, _ int64, _ []byte) (io.Reader, error, bool) {
		return nil, refused, k == 3
	}}
	s := all.open(t, b.Filler, slow)
	if err := all.deliver(s, 0, len(all.parts)); !errors.Is(err, refused) {
		t.Errorf("a piece that is refused: %v", err)
	}
	s.Close()
	slow.mu.Lock()
	defer slow.mu.Unlock()
	if slow.open > 0 {
		t.Errorf("%d requests are open", slow.open)
	}
}
