package prefetch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Nothing is marked that is not synced, everything is in the end, and only then is the layer complete; whatever fails in between.
func TestPersists(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(40), shape{members: 200, most: 100_000, together: 2})
	marked := map[int]int{}
	var mu sync.Mutex
	calls := 0
	m, _, done := b.add(fx, func(l *Layer) {
		m := l.Content.(*memory)
		l.Persist = func(chunks []int) error {
			mu.Lock()
			defer mu.Unlock()
			if calls++; calls == 1 {
				return errors.New("the index is busy")
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, i := range chunks {
				if !m.synced[i] {
					t.Errorf("chunk %d is marked and not synced", i)
				}
				marked[i]++
			}
			return nil
		}
	})
	<-done
	mu.Lock()
	defer mu.Unlock()
	if len(marked) != len(fx.chunks) {
		t.Errorf("%d chunks are marked of %d", len(marked), len(fx.chunks))
	}
	for i, n := range marked {
		if n != 1 {
			t.Errorf("chunk %d is marked %d times", i, n)
		}
	}
	if calls > 20 {
		t.Errorf("%d batches", calls)
	}
	select {
	case <-done:
		t.Error("complete twice")
	default:
	}
	// What Content loses is brought again.
	mu.Unlock()
	m.forget(7)
	b.fill(fx, 7, 1)
	<-done
	mu.Lock()
	if marked[7] != 2 {
		t.Errorf("marked %d times", marked[7])
	}
}

// What a failing Sync took back is not marked by the next one that works.
func TestPersistsNothingThatIsLost(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(46), shape{members: 2, most: 500_000})
	marked := make(chan []int, 10)
	var failed atomic.Bool
	m, _, _ := b.add(fx, func(l *Layer) {
		m := l.Content.(*memory)
		l.Content = syncTold{m, &failed}
		l.Persist = func(chunks []int) error { marked <- chunks; return nil }
		m.syncErr = errors.New("the disk is broken")
		fx.scatter()
		l.Source = fx.scattered()
	})
	b.fill(fx, 0, 1)
	eventually(t, "a Sync that fails", failed.Load)
	b.fill(fx, 1, 1)
	if got := <-marked; !slices.Equal(got, []int{1}) || m.Has(0) {
		t.Errorf("marked %v, and chunk 0 is there: %v", got, m.Has(0))
	}
}

// An index that has dropped the layer is not told again and again.
func TestPersistsNothingThatIsDropped(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(48), shape{members: 2, most: 30_000})
	marked := make(chan []int, 10)
	var held atomic.Int64
	b.add(fx, func(l *Layer) {
		fx.scatter()
		l.Source = fx.scattered()
		l.Reserve = func(n int64) (func(), error) {
			held.Add(n)
			return sync.OnceFunc(func() { held.Add(-n) }), nil
		}
		l.Persist = func(chunks []int) error {
			marked <- chunks
			return accel.ErrNotFound
		}
	})
	for i := range 2 {
		b.fill(fx, i, 1)
		if got := <-marked; !slices.Equal(got, []int{i}) {
			t.Errorf("marked %v after chunk %d was put", got, i)
		}
	}
	eventually(t, "nothing is reserved", func() bool { return held.Load() == 0 })
}

// syncTold says that a Sync failed.
type syncTold struct {
	*memory
	failed *atomic.Bool
}

func (s syncTold) Sync() error {
	err := s.memory.Sync()
	if err != nil {
		s.failed.Store(true)
	}
	return err
}

// Chunks that an earlier process put and did not mark are marked when the layer is added.
func TestPersistsWhatIsThere(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(41), shape{members: 10, most: 1000})
	m := fx.memory()
	for i := range fx.chunks {
		if err := m.Put(i, fx.data[i]); err != nil {
			t.Fatal(err)
		}
	}
	got := map[int]bool{}
	done := make(chan struct{})
	if err := b.Add(Layer{
		Content: m, Source: &registry{}, Persisted: func(i int) bool { return i%2 == 0 },
		Persist: func(chunks []int) error {
			for _, i := range chunks {
				got[i] = true
			}
			return nil
		},
		Completed: func() {
			b.Remove(fx.digest) // is allowed
			close(done)
		},
	}); err != nil {
		t.Fatal(err)
	}
	<-done
	if want := (map[int]bool{1: true, 3: true, 5: true, 7: true, 9: true}); !maps.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

// The hot set comes before the background, in its order, over layers.
func TestHotFirst(t *testing.T) {
	b := start(t, Options{})
	r := random(42)
	one, two := build(t, r, shape{members: 400, most: 60_000}), build(t, r, shape{members: 400, most: 60_000})
	link := &shaper{bytesPerSecond: 20e6}
	// Nothing is answered before the hot set is known.
	ready := make(chan struct{})
	slow := func(l *Layer) {
		l.Held = true
		reg := l.Source.(*registry)
		reg.link = link
		l.Source = sourceFunc(func(ctx context.Context, offset, length int64) (answerBody, error) {
			select {
			case <-ready:
			case <-ctx.Done():
				return answerBody{}, ctx.Err()
			}
			body, err := reg.Range(ctx, offset, length)
			return answerBody{body}, err
		})
	}
	m1, _, done1 := b.add(one, slow)
	m2, _, done2 := b.add(two, slow)
	var pieces []Piece
	for i := 350; i < 400; i++ {
		pieces = append(pieces, Piece{two.digest, i, 1}, Piece{one.digest, i - 100, 1})
	}
	if err := b.Hot(t.Context(), pieces); err != nil {
		t.Fatal(err)
	}
	b.Release(one.digest, two.digest)
	if n := b.Stats(two.digest).HotLeft; n != 50 {
		t.Errorf("%d of the hot set are left", n)
	}
	close(ready)
	eventually(t, "the hot set", func() bool { return b.Stats(one.digest).HotLeft+b.Stats(two.digest).HotLeft == 0 })
	if left := m1.Left() + m2.Left(); left < 300 {
		t.Errorf("only %d chunks were left when the hot set was there", left)
	}
	<-done1
	<-done2
	if s := b.sums(); s.hot == 0 || s.demand != 0 || s.fetched != s.skipped+s.hot+s.background {
		t.Errorf("%+v", s)
	}
}

// The profile comes from outside.
func TestHostileHot(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(43), shape{members: 20, most: 1000})
	m, r, _ := b.add(fx, nil)
	const huge = 1<<63 - 1
	pieces := []Piece{
		{"sha256:unknown", 0, 5}, {"", 0, 0},
		{fx.digest, -5, 3}, {fx.digest, huge, huge}, {fx.digest, -huge, huge}, {fx.digest, 20, 1}, {fx.digest, 0, -huge}, {fx.digest, -huge - 1, huge},
		{fx.digest, 18, huge}, {fx.digest, -2, 4}, {fx.digest, 1, 2},
	}
	for range maxPieces {
		pieces = append(pieces, Piece{fx.digest, 0, 3})
	}
	if err := b.Hot(t.Context(), pieces); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the hot set", func() bool { return b.Stats(fx.digest).HotLeft == 0 && m.Has(19) })
	for i, want := range []bool{true, true, true, false} {
		if m.Has(i) != want && i < 3 {
			t.Errorf("chunk %d: %v", i, m.Has(i))
		}
	}
	once(t, r, fx, 0)
	many := make([]Piece, 1000)
	for i := range many {
		many[i] = Piece{fx.digest, 0, huge}
	}
	if err := b.Hot(t.Context(), many); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Hot(ctx, many); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A registry that does not answer keeps back neither another's hot set nor, where it answers for some layers, that of others.
func TestHotOfOneRegistryStarvesNoOther(t *testing.T) {
	b := start(t, Options{BackgroundBytesPerSecond: -1, StallPatience: time.Hour})
	r := random(47)
	var pieces []Piece
	add := func(host string, source func(*fixture) Source) *fixture {
		fx := build(t, r, shape{members: 100, most: 30_000})
		fx.scatter()
		b.add(fx, func(l *Layer) { l.Host, l.Source = host, source(fx) })
		for i := range fx.chunks {
			pieces = append(pieces, Piece{fx.digest, i, 1})
		}
		return fx
	}
	add("silent", func(*fixture) Source {
		return sourceFunc(func(ctx context.Context, _, _ int64) (answerBody, error) {
			<-ctx.Done()
			return answerBody{}, ctx.Err()
		})
	})
	add("mixed", func(*fixture) Source {
		return sourceFunc(func(context.Context, int64, int64) (answerBody, error) {
			return answerBody{}, accel.ErrUnauthenticated
		})
	})
	beside := add("mixed", func(fx *fixture) Source { return fx.scattered() })
	other := add("other", func(fx *fixture) Source { return fx.scattered() })
	if err := b.Hot(t.Context(), pieces); err != nil {
		t.Fatal(err)
	}
	for _, fx := range []*fixture{other, beside} {
		eventually(t, "the hot set", func() bool { return b.Stats(fx.digest).HotLeft == 0 })
	}
}

// What another layer has is not fetched, and one that has it wrong is no harm.
func TestCopies(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		b := start(t, Options{})
		r := random(44)
		old := build(t, r, shape{members: 100, most: 50_000})
		m, _, done := b.add(old, nil)
		<-done
		if damaged {
			m.mu.Lock()
			for i := range m.have {
				m.have[i] = make([]byte, len(m.have[i]), len(m.have[i])+1)
			}
			m.mu.Unlock()
		}
		// The same files in another layer, in another order.
		twin := *old
		twin.chunks = append([]accel.Chunk(nil), old.chunks...)
		twin.data = append([][]byte(nil), old.data...)
		r.Shuffle(len(twin.chunks), func(i, j int) {
			twin.chunks[i], twin.chunks[j] = twin.chunks[j], twin.chunks[i]
			twin.data[i], twin.data[j] = twin.data[j], twin.data[i]
		})
		twin.digest = digest.FromString("twin")
		m2, reg, done2 := b.add(&twin, nil)
		b.fill(&twin, 50, 3)
		<-done2
		for i := range twin.chunks {
			m2.check(t, i)
		}
		if n := len(reg.asked()); (n > 0) != damaged {
			t.Errorf("damaged %v: %d requests", damaged, n)
		}
		if s := b.Stats(twin.digest); (s.CopiedBytes > 0) == damaged {
			t.Errorf("%+v", s)
		}
	}
}

func TestBackgroundLimit(t *testing.T) {
	b := start(t, Options{BackgroundBytesPerSecond: 100 << 10})
	fx := build(t, random(45), shape{members: 1000, most: 30_000})
	m, _, _ := b.add(fx, nil)
	began := time.Now()
	eventually(t, "something", func() bool { return b.sums().background > 200<<10 })
	// The bucket holds a piece. Slower is always right; faster than this is not.
	if took, least := time.Since(began), time.Second/2; took < least {
		t.Errorf("200 KiB took %s at 100 KiB/s", took)
	}
	// Who waits is not limited, nor is a miss the end of the limit.
	i := 0
	for ; m.Has(i); i++ {
	}
	b.fill(fx, i, 1)
	m.check(t, i)
	b.fill(fx, 900, 1)
	m.check(t, 900)
	if m.Left() < 100 {
		t.Errorf("only %d chunks are left", m.Left())
	}
}

func TestMetrics(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(46), shape{members: 10, most: 1000})
	_, _, done := b.add(fx, nil)
	b.fill(fx, 5, 1)
	<-done
	if sums, s := b.sums(), b.Stats(fx.digest); sums.fetched != s.FetchedBytes || sums.demand != s.DemandBytes || sums.misses != s.Misses {
		t.Errorf("%+v, but %+v", sums, s)
	}
	if _, err := New(Options{Registerer: b.metrics}); err == nil {
		t.Error("the same metrics twice")
	}
}

// Members, runs and places of layers whose chunks lie in any order.
func TestPlaces(t *testing.T) {
	for seed := range uint64(20) {
		r := random(50 + seed)
		fx := build(t, r, shape{members: 1 + r.IntN(30), most: 50, together: 1 + r.IntN(4), shuffled: seed%2 == 0})
		l, err := newLayer(Layer{Content: fx.memory(), Source: &registry{}})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[int]bool{}
		end := int64(0)
		for m := range l.members {
			offset, after := l.span(m)
			if offset != end {
				t.Fatalf("member %d begins at %d, not %d", m, offset, end)
			}
			end = after
			for p, to := l.places(m); p < to; p++ {
				i := l.at(p)
				if l.memberOf(i) != m || fx.chunks[i].BlobOffset != offset || seen[i] {
					t.Fatal(fmt.Sprint(seed, m, i))
				}
				seen[i] = true
			}
		}
		if len(seen) != len(fx.chunks) {
			t.Fatalf("%d of %d chunks", len(seen), len(fx.chunks))
		}
	}
}
