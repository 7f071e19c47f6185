package cache

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	benchClients = 100
	benchBytes   = 300 * mib
)

// BenchmarkHundredClients: a hundred clients get one blob of 300 MB over loopback: from its
// file (as a bare registry gives it), through a cold store that fetches it from there, and
// through a warm one.
func BenchmarkHundredClients(b *testing.B) {
	data := content(3000, benchBytes)
	desc := describe(data)
	path := filepath.Join(b.TempDir(), "blob")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		b.Fatal(err)
	}
	var upstreamBytes atomic.Int64
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeFile(w, r, path)
		upstreamBytes.Add(desc.SizeBytes)
	}))
	defer upstream.Close()

	b.Run("bare", func(b *testing.B) {
		for b.Loop() {
			hundred(b, upstream.URL)
		}
	})
	through := func(b *testing.B, s *Store) {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			reader, err := s.OpenBlob(r.Context(), desc, 0, -1, httpFetcher(upstream.URL))
			if err != nil {
				b.Error(err)
				return
			}
			defer reader.Close()
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Length", fmt.Sprint(desc.SizeBytes))
			if _, err := reader.WriteTo(w); err != nil {
				b.Error(err)
			}
		}))
		defer server.Close()
		hundred(b, server.URL)
	}
	b.Run("cold", func(b *testing.B) {
		var peak int64
		upstreamBytes.Store(0)
		for b.Loop() {
			b.StopTimer()
			s := start(b, Options{})
			stop := watchMemory(&peak)
			b.StartTimer()
			through(b, s.Store)
			b.StopTimer()
			stop()
			s.close()
			if err := os.RemoveAll(s.o.Dir); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		b.ReportMetric(float64(peak)/mib, "anon-MiB")
		b.ReportMetric(float64(upstreamBytes.Load())/float64(desc.SizeBytes)/float64(b.N), "upstream/size")
	})
	b.Run("warm", func(b *testing.B) {
		s := start(b, Options{})
		if _, err := s.Ensure(b.Context(), desc, httpFetcher(upstream.URL), false); err != nil {
			b.Fatal(err)
		}
		var peak int64
		stop := watchMemory(&peak)
		for b.Loop() {
			through(b, s.Store)
		}
		stop()
		b.ReportMetric(float64(peak)/mib, "anon-MiB")
	})
}

// hundred lets all clients get the whole of url. They read from raw connections and throw away, so that the
// benchmark measures the server.
func hundred(b *testing.B, url string) {
	b.SetBytes(benchClients * benchBytes)
	var wg sync.WaitGroup
	for range benchClients {
		wg.Go(func() {
			conn, err := (&net.Dialer{}).DialContext(b.Context(), "tcp", strings.TrimPrefix(url, "http://"))
			if err != nil {
				b.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			in := bufio.NewReaderSize(conn, 64<<10)
			resp, err := http.ReadResponse(in, nil)
			if err != nil {
				b.Error(err)
				return
			}
			defer resp.Body.Close()
			if n, err := io.CopyBuffer(onlyWriter{io.Discard}, resp.Body, make([]byte, 64<<10)); err != nil || n != benchBytes {
				b.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	wg.Wait()
}

// httpFetcher is as plain as a Fetcher of HTTP ranges can be.
type httpFetcher string

func (f httpFetcher) Fetch(ctx context.Context, offset, length int64) (Stream, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, string(f), nil)
	if err != nil {
		return Stream{}, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	resp, err := http.DefaultClient.Do(req) //nolint:bodyclose // the store closes it
	if err != nil {
		return Stream{}, err
	}
	return Stream{ReadCloser: resp.Body, From: offset}, nil
}

// watchMemory keeps the most anonymous memory of the process until the returned function is called.
func watchMemory(peak *int64) func() {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			*peak = max(*peak, anonymousBytes())
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	}()
	return func() { close(stop); <-done }
}

func anonymousBytes() int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(b)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	return 0
}

// BenchmarkCommitPart: what the index costs for each part of 1 MiB: blobs of 64 parts, a commit for
// every 16 parts of each of 4, as when several fills run. The data itself is not written.
func BenchmarkCommitPart(b *testing.B) {
	s := open(b, Options{})
	const parts, fills, step = 64, 4, 16
	before := s.index.allocated()
	marked := 0
	for n := 0; b.Loop(); n++ {
		rows := map[rowKey][]byte{}
		for f := range fills {
			d := digest.FromString(fmt.Sprint(n*step/parts, f))
			r := blobRow{size: parts * mib, seq: uint64(n), usedAt: int64(n), parts: newBitmap(parts)}
			for p := range int64((n*step)%parts + step) {
				r.parts.set(p)
			}
			key, err := keyOf(d)
			if err != nil {
				b.Fatal(err)
			}
			rows[rowKey{tableBlobs, key}] = sealRow(tableBlobs, key, r.encode())
		}
		marked += fills * step
		if err := s.index.commit(rows); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(marked), "ns/part")
	b.ReportMetric(float64(s.index.allocated()-before)/float64(marked), "index-B/part")
}

// manyDir makes a store with so many blobs of so many parts.
func manyDir(b *testing.B, blobs, parts int64, complete bool) string {
	b.Helper()
	dir := filepath.Join(b.TempDir(), "many")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	err := Seed(dir, func(yield func(Entry) bool) {
		for i := range blobs {
			var name [8]byte
			binary.LittleEndian.PutUint64(name[:], uint64(i))
			e := Entry{Digest: digest.FromBytes(name[:]), SizeBytes: parts * mib, AllocatedBytes: parts * mib, Complete: complete, PresentBytes: parts * mib / 2, UsedAt: time.Now()}
			if !yield(e) {
				return
			}
		}
	})
	if err != nil {
		b.Fatal(err)
	}
	return dir
}

// BenchmarkOpenMillionParts: another process opens a store of a million parts, and says how long
// that took and what memory it has then.
func BenchmarkOpenMillionParts(b *testing.B) {
	for _, c := range []struct {
		blobs, parts int64
		complete     bool
	}{{1000, 1000, false}, {20_000, 50, true}, {20_000, 50, false}, {100_000, 10, true}, {1_000_000, 1, true}} {
		name := fmt.Sprintf("%dx%d", c.blobs, c.parts)
		if !c.complete {
			name += "-partial"
		}
		b.Run(name, func(b *testing.B) {
			dir := manyDir(b, c.blobs, c.parts, c.complete)
			info, err := os.Stat(filepath.Join(dir, "index.db"))
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				cmd := exec.CommandContext(b.Context(), os.Args[0])
				cmd.Env = append(os.Environ(), roleVariable+"=many", dirVariable+"="+dir)
				cmd.Stderr = os.Stderr
				out, err := cmd.Output()
				if err != nil {
					b.Fatal(err)
				}
				for field := range strings.FieldsSeq(string(out)) {
					name, value, _ := strings.Cut(field, "=")
					var v float64
					if _, err := fmt.Sscan(value, &v); err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(v, name)
				}
			}
			b.ReportMetric(float64(info.Size())/float64(c.blobs*c.parts), "index-B/part")
		})
	}
}

func beMany(dir string) {
	start := time.Now()
	s, err := Open(Options{Dir: dir, Log: quiet()})
	if err != nil {
		panic(err)
	}
	fmt.Printf("open-ms=%.1f anon-MiB=%.1f blobs=%d\n", float64(time.Since(start).Microseconds())/1000, float64(anonymousBytes())/mib, s.Usage().Blobs)
	if err := s.Close(); err != nil {
		panic(err)
	}
}

func TestSeed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "seeded")
	data := content(3001, 3*mib)
	s := &Store{o: Options{Dir: dir}}
	path := s.path(digest.FromBytes(data))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	one := func(yield func(Entry) bool) {
		yield(Entry{Digest: digest.FromBytes(data), SizeBytes: int64(len(data)), AllocatedBytes: int64(len(data)), Complete: true})
	}
	if err := Seed(dir, one); err != nil {
		t.Fatal(err)
	}
	if err := Seed(dir, one); err == nil {
		t.Error("seeded twice")
	}
	b := start(t, Options{Dir: dir})
	got, _, err := get(b.Store, describe(data), 0, -1, nil)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
