package prefetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"accel"
)

func TestOneMiss(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(1), shape{members: 50, most: 20_000})
	told := 0
	m, r, _ := b.add(fx, func(l *Layer) {
		l.OnDemand = func(err error) {
			if told++; err != nil {
				t.Error(err)
			}
		}
	})
	b.fill(fx, 3, 2)
	m.check(t, 3)
	m.check(t, 4)
	if n := len(r.asked()); n != 1 {
		t.Errorf("%d requests", n)
	}
	b.fill(fx, 3, 2) // is there
	if s := b.Stats(fx.digest); s.Misses != 1 || s.MissBytes != fx.chunks[3].Bytes+fx.chunks[4].Bytes || s.Chunks != 50 || told != 1 || len(r.asked()) != 1 {
		t.Errorf("told %d times, %+v", told, s)
	}
}

func TestBackgroundCompletes(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(2), shape{members: 300, most: 40_000, together: 4})
	m, r, done := b.add(fx, nil)
	<-done
	for i := range fx.chunks {
		m.check(t, i)
	}
	once(t, r, fx, 0)
	if s := b.sums(); s.background != int64(len(fx.blob)) || s.demand != 0 {
		t.Errorf("%+v of %d", s, len(fx.blob))
	}
}

// once fails the test where more bytes were asked for than the blob has, and those that may be twice.
func once(t testing.TB, r *registry, fx *fixture, twice int64) {
	t.Helper()
	sum := int64(0)
	for _, q := range r.asked() {
		sum += q[1]
	}
	if sum > int64(len(fx.blob))+twice {
		t.Errorf("%d bytes were asked for of a blob of %d, %d of them may be twice", sum, len(fx.blob), twice)
	}
}

// Any layers, any reads, with and without background and hot set: all that is read is right, and
// nothing is asked for twice but what was overtaken or lay between.
func TestInterleavings(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 5
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { interleave(t, uint64(seed)) })
	}
}

func interleave(t *testing.T, seed uint64) {
	r := random(100 + seed)
	o := Options{}
	if r.IntN(3) == 0 {
		o = noBackground
	}
	b := start(t, o)
	type bench struct {
		fx   *fixture
		m    *memory
		r    *registry
		done chan struct{}
	}
	var layers []bench
	for range 1 + r.IntN(4) {
		fx := build(t, r, shape{
			members: 1 + r.IntN(120), most: []int{100, 5_000, 60_000, 200_000}[r.IntN(4)], together: 1 + r.IntN(5),
			shuffled: r.IntN(4) == 0, repeating: r.IntN(2) == 0,
		})
		m, reg, done := b.add(fx, func(l *Layer) {
			reg := l.Source.(*registry)
			reg.latency = time.Duration(r.IntN(5)) * time.Millisecond
			reg.link = &shaper{bytesPerSecond: 1e7 * float64(1+r.IntN(20))}
		})
		layers = append(layers, bench{fx, m, reg, done})
	}
	if r.IntN(2) == 0 {
		var pieces []Piece
		for range r.IntN(100) {
			l := layers[r.IntN(len(layers))]
			pieces = append(pieces, Piece{l.fx.digest, r.IntN(len(l.fx.chunks)), 1 + r.IntN(10)})
		}
		if err := b.Hot(t.Context(), pieces); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		reader := rand.New(rand.NewPCG(r.Uint64(), 1))
		wg.Go(func() {
			l := layers[reader.IntN(len(layers))]
			at := 0
			for range 60 {
				if reader.IntN(3) == 0 {
					at = reader.IntN(len(l.fx.chunks))
				}
				n := min(1+reader.IntN(4), len(l.fx.chunks)-at)
				if err := b.Fill(t.Context(), l.fx.digest, at, n); err != nil {
					t.Errorf("chunks %d to %d: %v", at, at+n, err)
					return
				}
				for i := at; i < at+n; i++ {
					l.m.check(t, i)
				}
				if at += n; at == len(l.fx.chunks) {
					at = 0
				}
			}
		})
	}
	wg.Wait()
	for _, l := range layers {
		if o.BackgroundBytesPerSecond >= 0 {
			<-l.done
			for i := range l.fx.chunks {
				l.m.check(t, i)
			}
		}
		s := b.sums()
		if s.failedMisses > 0 || s.corrupt > 0 || s.stalls > 0 || s.retries > 0 {
			t.Errorf("%+v", s)
		}
		// An overtaken flight had asked for its rest too.
		once(t, l.r, l.fx, s.skipped+s.overtakes*mostBackgroundBytes)
		if most := int64(len(l.fx.blob)) + s.skipped + s.overtakes*(batchBytes+pieceBytes); b.Stats(l.fx.digest).FetchedBytes > most {
			t.Errorf("%d bytes were fetched of a blob of %d: %+v", b.Stats(l.fx.digest).FetchedBytes, len(l.fx.blob), s)
		}
		if most := 8 + mostHotConnections + 4; l.r.mostOpen > most { // of misses, the hot set and the background
			t.Errorf("%d connections, more than %d", l.r.mostOpen, most)
		}
	}
}

func TestJoinsWhatIsUnderWay(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(3), shape{members: 4, most: 20_000})
	_, r, _ := b.add(fx, func(l *Layer) { l.Source.(*registry).latency = 50 * time.Millisecond })
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() { b.fill(fx, i%4, 1) })
	}
	wg.Wait()
	once(t, r, fx, 0)
}

// A miss far behind in a long flight gets its own request, and what it was to bring is not lost.
func TestOvertakes(t *testing.T) {
	b := start(t, Options{BackgroundConnections: 1})
	fx := build(t, random(4), shape{members: 150, most: 400_000})
	m, _, done := b.add(fx, func(l *Layer) {
		l.Source.(*registry).latency = time.Millisecond
		l.Source.(*registry).single = 4 * time.Millisecond
	})
	eventually(t, "some bytes", func() bool { return m.Left() < 148 })
	b.fill(fx, 15, 1)
	if m.Left() < 140 {
		t.Error("the miss waited for nearly all")
	}
	if s := b.sums(); s.overtakes == 0 {
		t.Errorf("%+v", s)
	}
	<-done
	if s := b.sums(); s.fetched > int64(len(fx.blob))+s.skipped+s.overtakes*batchBytes {
		t.Errorf("%+v of %d", s, len(fx.blob))
	}
}

// A program that reads on has more and more fetched ahead of it.
func TestReadsAhead(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(5), shape{members: 300, most: 120_000})
	m, r, _ := b.add(fx, func(l *Layer) {
		l.Source.(*registry).latency = 2 * time.Millisecond
		l.Source.(*registry).link = &shaper{bytesPerSecond: 200e6}
	})
	for i := range fx.chunks {
		b.fill(fx, i, 1)
		m.check(t, i)
	}
	if n := len(r.asked()); n > 60 {
		t.Errorf("%d requests for 300 chunks in order", n)
	}
	once(t, r, fx, 0)
	largest := int64(0)
	for _, q := range r.asked() {
		largest = max(largest, q[1])
	}
	if largest < 4*leastWindowBytes {
		t.Errorf("the largest request was for %d bytes", largest)
	}
}

// A large window comes over several connections, the first of which has what is waited for.
func TestSplitsWindows(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(10), shape{members: 200, most: 200_000})
	release := make(chan struct{})
	m, _, _ := b.add(fx, func(l *Layer) {
		l.Source = sourceFunc(func(ctx context.Context, offset, length int64) (answerBody, error) {
			select {
			case <-release:
			case <-ctx.Done():
				return answerBody{}, ctx.Err()
			}
			return bodyOf(fx.blob[offset : offset+length]), nil
		})
	})
	b.mu.Lock()
	l := b.layers[fx.digest]
	end := b.cover(l, 10, 12, 8<<20)
	flights := len(l.flights)
	first, must := l.flights[0].first, l.flights[0].must
	b.mu.Unlock()
	close(release)
	if flights != splitParts || first != 10 || must != 12 {
		t.Errorf("%d flights, the first from %d to %d", flights, first, must)
	}
	eventually(t, "all of the window", func() bool { return m.Left() == len(fx.chunks)-(end-10) })
}

// The same over real connections.
func TestOverHTTP(t *testing.T) {
	b := start(t, Options{})
	fx := build(t, random(11), shape{members: 300, most: 60_000, together: 2})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(fx.blob))
	}))
	defer server.Close()
	defer b.stop()
	m, _, done := b.add(fx, func(l *Layer) { l.Source = httpSource{server} })
	var wg sync.WaitGroup
	for k := range 4 {
		r := random(uint64(k))
		wg.Go(func() {
			for range 30 {
				i := r.IntN(len(fx.chunks))
				b.fill(fx, i, 1)
				m.check(t, i)
			}
		})
	}
	wg.Wait()
	<-done
	if s := b.sums(); s.failedMisses > 0 || s.retries > 0 {
		t.Errorf("%+v", s)
	}
}

type httpSource struct{ *httptest.Server }

func (s httpSource) Range(ctx context.Context, offset, length int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	resp, err := s.Client().Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusPartialContent {
		resp.Body.Close()
		return nil, errors.New(resp.Status)
	}
	return resp.Body, nil
}

func TestContextOfReader(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(6), shape{members: 5, most: 1000})
	release := make(chan struct{})
	var requests atomic.Int32
	m, _, _ := b.add(fx, func(l *Layer) {
		l.Source = sourceFunc(func(ctx context.Context, offset, length int64) (answerBody, error) {
			requests.Add(1)
			select {
			case <-release:
			case <-ctx.Done():
				return answerBody{}, ctx.Err()
			}
			return bodyOf(fx.blob[offset : offset+length]), nil
		})
	})
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error)
	go func() { gone <- b.Fill(ctx, fx.digest, 2, 1) }()
	eventually(t, "a request", func() bool { return requests.Load() == 1 })
	stays := make(chan error)
	go func() { stays <- b.Fill(t.Context(), fx.digest, 2, 1) }()
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(release)
	if err := <-stays; err != nil {
		t.Error(err)
	}
	m.check(t, 2)
	if n := requests.Load(); n != 1 {
		t.Errorf("%d requests", n)
	}
}

func TestWrongQuestions(t *testing.T) {
	b := start(t, noBackground)
	fx := build(t, random(7), shape{members: 5, most: 1000})
	b.add(fx, nil)
	for _, q := range [][2]int{{-1, 1}, {0, 6}, {5, 1}, {0, -1}, {6, 0}, {1 << 62, 1 << 62}, {2, 1<<63 - 1}} {
		if err := b.Fill(t.Context(), fx.digest, q[0], q[1]); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%v: %v", q, err)
		}
	}
	if err := b.Fill(t.Context(), "sha256:other", 0, 1); !errors.Is(err, accel.ErrNotFound) {
		t.Error(err)
	}
	if err := b.Add(Layer{Content: fx.memory(), Source: &registry{}}); !errors.Is(err, accel.ErrConflict) {
		t.Error(err)
	}
	for name, change := range map[string]func(c []accel.Chunk){
		"negative offset":  func(c []accel.Chunk) { c[1].BlobOffset = -1 },
		"no bytes":         func(c []accel.Chunk) { c[1].BlobBytes = 0 },
		"huge chunk":       func(c []accel.Chunk) { c[1].Bytes = 1 << 40 },
		"huge offset":      func(c []accel.Chunk) { c[1].BlobOffset = 1<<63 - 1 },
		"negative inside":  func(c []accel.Chunk) { c[1].InnerOffset = -5 },
		"overlap":          func(c []accel.Chunk) { c[1].BlobOffset = c[0].BlobOffset + 1 },
		"overlap inside":   func(c []accel.Chunk) { c[1] = c[0]; c[1].Bytes++ },
		"different member": func(c []accel.Chunk) { c[1] = c[0]; c[1].BlobBytes++ },
	} {
		bad := *build(t, random(8), shape{members: 3, most: 1000})
		change(bad.chunks)
		if err := b.Add(Layer{Content: bad.memory(), Source: &registry{}}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := b.Add(Layer{}); !errors.Is(err, accel.ErrInvalid) {
		t.Error(err)
	}
	if _, err := New(Options{Patience: -1}); !errors.Is(err, accel.ErrInvalid) {
		t.Error(err)
	}
}

func TestEmptyLayer(t *testing.T) {
	b := start(t, Options{})
	_, _, done := b.add(build(t, random(9), shape{}), nil)
	<-done
}
