package testbed

import (
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

// Delivered counts what a registry sent.
type Delivered struct {
	Requests int64 // of any kind, also refused ones
	// Blobs has the bytes of each blob's bodies; one that was only asked for by HEAD
	// is not in it.
	Blobs map[digest.Digest]int64
	// ManifestBytes are the bodies of manifests and indexes.
	ManifestBytes int64
}

// BlobBytes is the sum over all blobs.
func (d Delivered) BlobBytes() int64 {
	var sum int64
	for _, n := range d.Blobs {
		sum += n
	}
	return sum
}

// counter counts bodies on their way out.
type counter struct {
	mu  sync.Mutex
	sum Delivered
}

func (c *counter) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		counted := &countingWriter{ResponseWriter: w}
		// Also where the handler panics because the client went away.
		defer func() { c.add(r, counted) }()
		next.ServeHTTP(counted, r)
	})
}

func (c *counter) add(r *http.Request, w *countingWriter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sum.Requests++
	n := w.bytes.Load()
	if r.Method != http.MethodGet || w.status >= 300 || n == 0 {
		return
	}
	if _, blob, ok := strings.Cut(r.URL.Path, "/blobs/"); ok {
		if c.sum.Blobs == nil {
			c.sum.Blobs = map[digest.Digest]int64{}
		}
		c.sum.Blobs[digest.Digest(blob)] += n
	} else if strings.Contains(r.URL.Path, "/manifests/") {
		c.sum.ManifestBytes += n
	}
}

func (c *counter) delivered() Delivered {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.sum
	d.Blobs = maps.Clone(c.sum.Blobs)
	return d
}

func (c *counter) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sum = Delivered{}
}

// countingWriter counts the body of one answer; it keeps sendfile working.
type countingWriter struct {
	http.ResponseWriter
	status int
	bytes  atomic.Int64
}

func (w *countingWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.bytes.Add(int64(n))
	return n, err
}

func (w *countingWriter) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, r)
	w.bytes.Add(n)
	return n, err
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
