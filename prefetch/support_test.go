package prefetch

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// fixture is a layer: its blob, its chunks and what they are.
type fixture struct {
	digest digest.Digest
	blob   []byte
	chunks []accel.Chunk
	data   [][]byte
}

// shape says how a fixture is made.
type shape struct {
	members   int
	most      int  // bytes of a chunk
	together  int  // chunks in a member, at most
	shuffled  bool // chunks are not numbered as they lie in the blob
	repeating bool // some chunks are equal
}

func build(t testing.TB, r *rand.Rand, s shape) *fixture {
	t.Helper()
	f := &fixture{}
	var blob bytes.Buffer
	for range s.members {
		offset := int64(blob.Len())
		w, err := gzip.NewWriterLevel(&blob, gzip.HuffmanOnly)
		if err != nil {
			t.Fatal(err)
		}
		first, inner := len(f.chunks), int64(0)
		for range 1 + r.IntN(max(s.together, 1)) {
			between := make([]byte, r.IntN(600)) // a tar header, for one
			w.Write(between)
			inner += int64(len(between))
			var data []byte
			if s.repeating && len(f.data) > 0 && r.IntN(4) == 0 {
				data = f.data[r.IntN(len(f.data))]
			} else {
				data = content(r, r.IntN(s.most+1))
			}
			w.Write(data)
			f.data = append(f.data, data)
			f.chunks = append(f.chunks, accel.Chunk{BlobOffset: offset, InnerOffset: inner, Bytes: int64(len(data)), Digest: sha256.Sum256(data)})
			inner += int64(len(data))
		}
		w.Write(make([]byte, r.IntN(1000)))
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		for i := range f.chunks[first:] {
			f.chunks[first+i].BlobBytes = int64(blob.Len()) - offset
		}
	}
	if s.shuffled {
		r.Shuffle(len(f.chunks), func(i, j int) {
			f.chunks[i], f.chunks[j] = f.chunks[j], f.chunks[i]
			f.data[i], f.data[j] = f.data[j], f.data[i]
		})
	}
	at := int64(0)
	for i := range f.chunks {
		f.chunks[i].DataOffset = at
		at += (f.chunks[i].Bytes + 4095) &^ 4095
	}
	f.blob = blob.Bytes()
	f.digest = digest.FromBytes(f.blob)
	return f
}

// scatter puts the members so far from each other that each is a request of its own.
func (f *fixture) scatter() {
	for i := range f.chunks {
		f.chunks[i].BlobOffset += int64(i) * maxWindowBytes
	}
}

// scattered is the Source of a fixture whose members were scattered.
func (f *fixture) scattered() sourceFunc {
	return func(_ context.Context, offset, length int64) (answerBody, error) {
		i := offset / maxWindowBytes
		if i >= int64(len(f.chunks)) || f.chunks[i].BlobOffset != offset || f.chunks[i].BlobBytes != length {
			return answerBody{}, fmt.Errorf("%w: %d bytes at %d", accel.ErrInvalid, length, offset)
		}
		at := offset - i*maxWindowBytes
		return bodyOf(f.blob[at : at+length]), nil
	}
}

// pool is compressible by about half.
var pool = sync.OnceValue(func() []byte {
	r := random(0)
	b := make([]byte, 2<<20)
	for i := range b {
		if r.IntN(2) == 0 {
			b[i] = byte(r.Uint32())
		}
	}
	return b
})

// content is n bytes that are hardly ever the same.
func content(r *rand.Rand, n int) []byte {
	at := r.IntN(len(pool()) - n)
	return pool()[at : at+n]
}

// memory is a Content in memory that checks digests, as the real one does.
type memory struct {
	*fixture
	mu       sync.Mutex
	have     [][]byte
	left     int
	puts     int
	unsynced map[int]bool
	synced   map[int]bool
	putErr   func(i int) error // nil: none
	syncErr  error             // of the next Sync, which loses what was put since the last
	order    []int
}

func (f *fixture) memory() *memory {
	return &memory{fixture: f, have: make([][]byte, len(f.chunks)), left: len(f.chunks), unsynced: map[int]bool{}, synced: map[int]bool{}}
}

func (m *memory) Digest() digest.Digest   { return m.digest }
func (m *memory) Len() int                { return len(m.chunks) }
func (m *memory) Chunk(i int) accel.Chunk { return m.chunks[i] }

func (m *memory) Has(i int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.have[i] != nil
}

var errWrongDigest = errors.New("wrong digest")

func (m *memory) Put(i int, b []byte) error {
	if sha256.Sum256(b) != m.chunks[i].Digest {
		return errWrongDigest
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.putErr != nil {
		if err := m.putErr(i); err != nil {
			return err
		}
	}
	m.puts++
	if m.have[i] == nil {
		m.have[i] = append(make([]byte, 0, len(b)+1), b...)
		m.left--
		m.unsynced[i] = true
		m.order = append(m.order, i)
	}
	return nil
}

func (m *memory) Read(i int, p []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.have[i] == nil || len(p) != len(m.have[i]) {
		return fmt.Errorf("chunk %d is not there", i)
	}
	copy(p, m.have[i])
	return nil
}

func (m *memory) Sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.syncErr; err != nil {
		m.syncErr = nil
		for i := range m.unsynced {
			m.have[i] = nil
			m.left++
		}
		clear(m.unsynced)
		return err
	}
	for i := range m.unsynced {
		m.synced[i] = true
	}
	clear(m.unsynced)
	return nil
}

func (m *memory) Left() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.left
}

// check fails the test unless chunk i is there.
func (m *memory) check(t testing.TB, i int) {
	t.Helper()
	got := make([]byte, m.chunks[i].Bytes)
	if err := m.Read(i, got); err != nil || !bytes.Equal(got, m.data[i]) {
		t.Errorf("chunk %d: wrong, or %v", i, err)
	}
}

func (m *memory) forget(i int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.have[i] = nil
	m.left++
}

// bed is a Filler that runs until the end of the test.
type bed struct {
	*Filler
	t       testing.TB
	metrics *prometheus.Registry
	stop    func()
}

// sums are what the metrics of a bed say, over all layers.
type sums struct {
	misses, failedMisses                      int64
	demand, hot, background, skipped, fetched int64 // bytes; fetched are all that came from registries
	retries, stalls, corrupt, overtakes       int64
}

func (b *bed) sums() (s sums) {
	b.t.Helper()
	families, err := b.metrics.Gather()
	if err != nil {
		b.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if m.Counter == nil {
				continue
			}
			n := int64(m.Counter.GetValue())
			labels := map[string]string{}
			for _, l := range m.Label {
				labels[l.GetName()] = l.GetValue()
			}
			switch f.GetName() {
			case "accel_fill_misses_total":
				if s.misses += n; labels["result"] == "error" {
					s.failedMisses += n
				}
			case "accel_fill_bytes_total":
				if labels["source"] == "copy" {
					continue
				}
				s.fetched += n
				kinds := map[string]*int64{"demand": &s.demand, "hot": &s.hot, "background": &s.background}
				if labels["source"] == "skipped" {
					s.skipped += n
				} else {
					*kinds[labels["kind"]] += n
				}
			case "accel_fill_retries_total":
				s.retries += n
			case "accel_fill_stalls_total":
				s.stalls += n
			case "accel_fill_corrupt_chunks_total":
				s.corrupt += n
			case "accel_fill_overtakes_total":
				s.overtakes += n
			}
		}
	}
	return s
}

func start(t testing.TB, o Options) *bed {
	t.Helper()
	if o.Log == nil {
		o.Log = quiet()
	}
	registry := prometheus.NewRegistry()
	o.Registerer = registry
	f, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	b := &bed{Filler: f, t: t, metrics: registry}
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(b.stop)
	return b
}

// noBackground is for tests of what is fetched on demand.
var noBackground = Options{BackgroundBytesPerSecond: -1}

// add adds a fixture, and returns its parts and a channel that is closed when it is complete.
func (b *bed) add(f *fixture, change func(*Layer)) (*memory, *registry, chan struct{}) {
	b.t.Helper()
	m, r, done := f.memory(), &registry{blob: f.blob}, make(chan struct{}, 10)
	l := Layer{Content: m, Source: r, Host: "registry.example", Completed: func() { done <- struct{}{} }}
	if change != nil {
		change(&l)
	}
	if err := b.Add(l); err != nil {
		b.t.Fatal(err)
	}
	return m, r, done
}

func (b *bed) fill(f *fixture, first, n int) {
	b.t.Helper()
	if err := b.Fill(b.t.Context(), f.digest, first, n); err != nil {
		b.t.Fatal(err)
	}
}

func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 7)) }

// eventually waits for what another goroutine brings about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}
