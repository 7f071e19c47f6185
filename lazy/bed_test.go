package lazy

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel/cache"
	"accel/registry"
	"accel/snapshot"

	"github.com/containerd/stargz-snapshotter/estargz"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// patience bounds every wait of a test; none is expected to come near it.
const patience = time.Minute

// bed is a registry and a Lazy that opens layers from there, and mounts nothing.
type bed struct {
	t      *testing.T
	host   string
	dir    string
	http   *http.Transport
	stored *cache.Store
	lazy   *Lazy
	end    func()

	mu     sync.Mutex
	refuse func(r *http.Request) int // the status to answer with instead; 0: none
	asked  []string                  // paths, with their methods
	aside  []string                  // layers and chains that were set aside
	broken error                     // of SetAside
	calls  int                       // of SetAside
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{t: t, dir: t.TempDir(), http: &http.Transport{}}
	images := ggcr.New(ggcr.WithReferrersSupport(true), ggcr.Logger(log.New(io.Discard, "", 0)))
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		b.asked = append(b.asked, r.Method+" "+r.URL.Path)
		code := 0
		if b.refuse != nil {
			code = b.refuse(r)
		}
		b.mu.Unlock()
		if code != 0 {
			w.WriteHeader(code)
			return
		}
		images.ServeHTTP(w, r)
	}))
	b.host = strings.TrimPrefix(upstream.URL, "http://")
	t.Cleanup(func() {
		b.stop()
		b.http.CloseIdleConnections()
		upstream.Close()
	})
	b.start(nil)
	return b
}

// start runs a Lazy on what the last one left.
func (b *bed) start(change func(*Options)) {
	b.t.Helper()
	b.stop()
	var err error
	b.stored, err = cache.Open(cache.Options{Dir: filepath.Join(b.dir, "cache"), VerifyLayer: VerifyLayer, Log: slog.New(slog.DiscardHandler)})
	must(b.t, err)
	client, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: b.host, PlainHTTP: true}}, Attempts: 1})
	must(b.t, err)
	keys, err := OpenKeys("", b.dir, nil)
	must(b.t, err)
	run, err := os.MkdirTemp("", "lazy") // short, for sockets
	must(b.t, err)
	o := Options{
		Dir: filepath.Join(b.dir, "lazy"), RunDir: run, Version: "test", Node: "n1", Holder: []string{"/bin/false"}, Store: b.stored, Registry: client,
		Keys: keys, Stargz: []string{"*/**"}, Log: slog.New(slog.DiscardHandler),
		SetAside: func(_ context.Context, layer, chain digest.Digest, _ string) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.calls++
			if b.broken == nil {
				b.aside = append(b.aside, asideOf(layer, chain))
			}
			return b.broken
		},
	}
	if change != nil {
		change(&o)
	}
	b.lazy, err = New(o)
	must(b.t, err)
	must(b.t, b.lazy.Adopt(b.t.Context(), nil))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- b.stored.Run(ctx) }()
	go func() { ended <- b.lazy.Run(ctx) }()
	b.until("it runs", func() bool {
		b.lazy.mu.Lock()
		defer b.lazy.mu.Unlock()
		return b.lazy.running != nil
	})
	b.end = func() {
		cancel()
		err := errors.Join(<-ended, <-ended, b.lazy.Close(), b.stored.Close(), os.RemoveAll(run))
		client.Close()
		if err != nil {
			b.t.Error(err)
		}
	}
}

func (b *bed) stop() {
	if b.end != nil {
		b.end()
		b.end = nil
	}
}

func asideOf(layer, chain digest.Digest) string { return layer.String() + " as " + chain.String() }

// until waits for something to become true.
func (b *bed) until(what string, isSo func() bool) {
	b.t.Helper()
	for began := time.Now(); !isSo(); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > patience {
			b.t.Fatalf("waited in vain until %s", what)
		}
	}
}

// blob is a layer in eStargz form.
type blob struct {
	packed       []byte
	digest, toc  digest.Digest
	diffID       digest.Digest
	claimed      digest.Digest // what images say that its DiffID is
	contentBytes int
}

// layerWith is one with a file of some bytes.
func (b *bed) layerWith(name string, content []byte) blob {
	b.t.Helper()
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	must(b.t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(content)), Mode: 0o644}))
	_, err := w.Write(content)
	must(b.t, errors.Join(err, w.Close()))
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw.Bytes()), 0, int64(raw.Len())))
	must(b.t, err)
	packed, err := io.ReadAll(built)
	must(b.t, errors.Join(err, built.Close()))
	y := blob{packed: packed, digest: digest.FromBytes(packed), toc: built.TOCDigest(), diffID: digest.Digest(built.DiffID().String()), contentBytes: len(content)}
	y.claimed = y.diffID
	return y
}

// put uploads something to the registry.
func (b *bed) put(path string, contentType string, content []byte) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), http.MethodPut, "http://"+b.host+path, bytes.NewReader(content))
	must(b.t, err)
	req.Header.Set("Content-Type", contentType)
	res, err := (&http.Client{Transport: b.http}).Do(req)
	must(b.t, err)
	_, _ = io.Copy(io.Discard, res.Body) // what it says does not matter
	must(b.t, res.Body.Close())
	if res.StatusCode != http.StatusCreated {
		b.t.Fatalf("PUT %s: %s", path, res.Status)
	}
}

// get reads something of the registry.
func (b *bed) get(path string) []byte {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), http.MethodGet, "http://"+b.host+path, http.NoBody)
	must(b.t, err)
	res, err := (&http.Client{Transport: b.http}).Do(req)
	must(b.t, err)
	raw, err := io.ReadAll(res.Body)
	must(b.t, errors.Join(err, res.Body.Close()))
	return raw
}

// forgetAnswers has images looked at anew.
func (b *bed) forgetAnswers() {
	b.lazy.mu.Lock()
	defer b.lazy.mu.Unlock()
	b.lazy.answers.Purge()
}

func (b *bed) putBlob(repository string, content []byte) {
	b.t.Helper()
	b.put(fmt.Sprintf("/v2/%s/blobs/uploads/1?digest=%s", repository, digest.FromBytes(content)), "application/octet-stream", content)
}

// push puts an image into a repository, with the layers' blobs unless they are left out.
func (b *bed) push(repository string, withBlobs bool, layers ...blob) pushed {
	b.t.Helper()
	var config ocispec.Image
	config.OS, config.Architecture, config.RootFS.Type = "linux", "amd64", "layers"
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, y := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, y.claimed)
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: y.digest, Size: int64(len(y.packed)), Annotations: map[string]string{annotationTOC: y.toc.String()},
		})
		if withBlobs {
			b.putBlob(repository, y.packed)
		}
	}
	raw, err := json.Marshal(config)
	must(b.t, err)
	b.putBlob(repository, raw)
	m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	raw, err = json.Marshal(m)
	must(b.t, err)
	d := digest.FromBytes(raw)
	b.put("/v2/"+repository+"/manifests/"+d.String(), ocispec.MediaTypeImageManifest, raw)
	return pushed{b.host + "/" + repository + "@" + d.String(), d, layers, identity.ChainIDs(config.RootFS.DiffIDs)}
}

// pushed is an image in the registry.
type pushed struct {
	name     string
	manifest digest.Digest
	layers   []blob
	chains   []digest.Digest
}

// request is what containerd asks for one of its layers.
func (p pushed) request(i int) snapshot.Request {
	return snapshot.Request{Reference: p.name, Manifest: p.manifest, Layer: p.layers[i].digest, Chain: p.chains[i]}
}

// ask is containerd's question about all of its layers.
func (b *bed) ask(p pushed) error {
	for i := range p.layers {
		if _, err := b.lazy.Layer(b.t.Context(), p.request(i)); err != nil {
			return err
		}
	}
	return nil
}

// requireDeclined wants a no with these words in its reason.
func (b *bed) requireDeclined(err error, words string) {
	b.t.Helper()
	var no *Declined
	if !errors.As(err, &no) || !strings.Contains(no.Reason, words) {
		b.t.Errorf("%v, want declined: ... %s", err, words)
	}
}
