package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

// The test binary runs itself again in these roles.
const (
	roleVariable = "ACCEL_CACHE_TEST_ROLE" // "killed", "hold" or "many"
	dirVariable  = "ACCEL_CACHE_TEST_DIR"
	seedVariable = "ACCEL_CACHE_TEST_SEED"
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "killed":
		beKilled(os.Getenv(dirVariable), os.Getenv(seedVariable))
	case "hold":
		beHolder(os.Getenv(dirVariable))
	case "many":
		beMany(os.Getenv(dirVariable))
	default:
		goleak.VerifyTestMain(m)
	}
}

// bed is a store that runs.
type bed struct {
	*Store
	t    testing.TB
	stop context.CancelFunc
	done chan error
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t testing.TB, o Options) *Store {
	t.Helper()
	if o.Dir == "" {
		o.Dir = filepath.Join(t.TempDir(), "cache")
	}
	if o.Log == nil {
		o.Log = quiet()
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// start opens a store and runs it; at the end of the test it is stopped, and its accounts are checked.
func start(t testing.TB, o Options) *bed {
	t.Helper()
	b := &bed{Store: open(t, o), t: t, done: make(chan error, 1)}
	var ctx context.Context
	ctx, b.stop = context.WithCancel(context.Background())
	go func() { b.done <- b.Run(ctx) }()
	t.Cleanup(b.end)
	return b
}

func (b *bed) end() {
	if b.stop == nil {
		return
	}
	b.stop()
	b.stop = nil
	if err := <-b.done; err != nil {
		b.t.Errorf("Run: %v", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	used := int64(0)
	for _, l := range b.layers {
		used += l.allocated
		if l.writers+l.checks > 0 {
			b.t.Errorf("layer %s is being written or checked after Run", l.digest)
		}
	}
	for _, blob := range b.blobs {
		used += blob.allocated
		if blob.live != nil && len(blob.live.fills) > 0 {
			b.t.Errorf("blob %s is being filled after Run", blob.digest)
		}
	}
	if used != b.used || b.reserved != 0 || b.demand != 0 || b.strays != 0 {
		b.t.Errorf("accounts: %d bytes used, %d by the blobs; %d reserved, demand %d, %d in strays", b.used, used, b.reserved, b.demand, b.strays)
	}
	if n := len(b.order.all()); n != len(b.blobs)+len(b.layers) {
		b.t.Errorf("%d in the order of eviction, %d blobs and %d layers", n, len(b.blobs), len(b.layers))
	}
}

// close ends it before the test does.
func (b *bed) close() {
	b.t.Helper()
	b.end()
	if err := b.Close(); err != nil {
		b.t.Fatal(err)
	}
}

// content is n bytes that do not compress, the same for the same seed.
func content(seed, n int) []byte {
	b := make([]byte, n)
	c := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1})
	_, _ = c.Read(b) // never fails
	return b
}

// describe hashes; big content is described once.
func describe(b []byte) accel.BlobDescriptor {
	return accel.BlobDescriptor{Digest: digest.FromBytes(b), SizeBytes: int64(len(b))}
}

// source is a Fetcher of content, which can be made to fail.
type source struct {
	data     []byte
	unranged bool // always from 0
	peer     bool

	fetches atomic.Int64
	bytes   atomic.Int64 // delivered

	mu     sync.Mutex
	gates  []gate // where streams wait
	fail   func(fetch int64, offset int64) error
	cut    int64 // >0: the first stream ends there
	cutAll bool  // not only that one
	spoil  func(at int64, p []byte)
}

type gate struct {
	at   int64
	open chan struct{}
}

func from(b []byte) *source { return &source{data: b} }

// holdAt makes streams wait at an offset until the returned function is called.
func (s *source) holdAt(at int64) func() {
	g := gate{at, make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gates = append(s.gates, g)
	return sync.OnceFunc(func() { close(g.open) })
}

func (s *source) Fetch(ctx context.Context, offset, length int64) (Stream, error) {
	n := s.fetches.Add(1)
	s.mu.Lock()
	fail, cut := s.fail, s.cut
	s.mu.Unlock()
	if fail != nil {
		if err := fail(n, offset); err != nil {
			return Stream{}, err
		}
	}
	st := &sourceStream{source: s, ctx: ctx, at: offset, end: min(offset+length, int64(len(s.data)))}
	if s.unranged {
		st.at, st.end = 0, int64(len(s.data))
	}
	if cut > 0 && (n == 1 || s.cutAll) {
		st.end = min(st.end, cut)
	}
	return Stream{ReadCloser: st, From: st.at, Peer: s.peer}, nil
}

type sourceStream struct {
	*source
	ctx     context.Context
	at, end int64
}

func (st *sourceStream) Read(p []byte) (int, error) {
	if err := st.ctx.Err(); err != nil {
		return 0, err
	}
	st.mu.Lock()
	stop := st.end
	var wait chan struct{}
	for _, g := range st.gates {
		select {
		case <-g.open:
			continue
		default:
		}
		if g.at >= st.at && g.at < stop {
			stop, wait = g.at, g.open
		}
	}
	spoil := st.spoil
	st.mu.Unlock()
	if st.at == stop && wait != nil {
		select {
		case <-wait:
			return st.Read(p)
		case <-st.ctx.Done():
			return 0, st.ctx.Err()
		}
	}
	if st.at >= st.end {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 32<<10)], st.data[st.at:stop])
	if spoil != nil {
		spoil(st.at, p[:n])
	}
	st.at += int64(n)
	st.bytes.Add(int64(n))
	return n, nil
}

func (st *sourceStream) Close() error { return nil }

// get reads a range through a Reader.
func get(s *Store, d accel.BlobDescriptor, offset, length int64, f Fetcher) ([]byte, accel.Tally, error) {
	r, err := s.OpenBlob(context.Background(), d, offset, length, f)
	if err != nil {
		return nil, accel.Tally{}, err
	}
	var buf bytes.Buffer
	_, err = r.WriteTo(onlyWriter{&buf})
	return buf.Bytes(), r.Tally(), errors.Join(err, r.Close())
}

type onlyWriter struct{ io.Writer }

// compared is a writer that wants certain bytes.
type compared struct{ left []byte }

var errOther = errors.New("other bytes than the blob's")

func (c *compared) Write(p []byte) (int, error) {
	if len(p) > len(c.left) || !bytes.Equal(p, c.left[:len(p)]) {
		return 0, errOther
	}
	c.left = c.left[len(p):]
	return len(p), nil
}

// mustGet reads a range, which has to work.
func mustGet(t testing.TB, s *Store, data []byte, offset, length int64, f Fetcher) accel.Tally {
	t.Helper()
	r, err := s.OpenBlob(context.Background(), describe(data), offset, length, f)
	if err != nil {
		t.Fatal(err)
	}
	want := data[offset:]
	if length >= 0 {
		want = want[:length]
	}
	c := &compared{want}
	_, err = r.WriteTo(c)
	if err := errors.Join(err, r.Close()); err != nil || len(c.left) > 0 {
		t.Fatalf("bytes %d+%d: %d are missing, %v", offset, len(want), len(c.left), err)
	}
	tally := r.Tally()
	if sum := tally.CacheBytes + tally.RegistryBytes + tally.PeerBytes + tally.SharedBytes; sum != int64(len(want)) {
		t.Fatalf("the tally %+v counts %d bytes, %d were given", tally, sum, len(want))
	}
	return tally
}

// until waits for something that has to become true.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never came: %s", what)
		}
	}
}

const mib = 1 << 20
