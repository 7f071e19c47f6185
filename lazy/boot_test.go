package lazy

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"accel"
	"accel/bundle"
	"accel/cache"
	"accel/convert"
	"accel/lazyfs"
	"accel/profile/artifact"
	"accel/registry"
	"accel/trust"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// bootBed is a registry with a converted image that has a recorded profile.
type bootBed struct {
	t        *testing.T
	host     string
	target   string // the repository of the converted image, without the host
	client   *registry.Client
	keys     *trust.Keyring
	manifest digest.Digest
	subject  v1.Descriptor
	layers   []accel.LayerMapping
	profile  accel.Profile

	mu    sync.Mutex
	asked map[digest.Digest]int // GETs of blobs
	fault func(w http.ResponseWriter, r *http.Request) bool
}

func newBootBed(t *testing.T, target string) *bootBed {
	t.Helper()
	b := &bootBed{t: t, target: target, asked: map[digest.Digest]int{}}
	next := ggcr.New(ggcr.WithReferrersSupport(true), ggcr.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, blob, ok := strings.Cut(r.URL.Path, "/blobs/")
		b.mu.Lock()
		fault := b.fault
		if ok && r.Method == http.MethodGet {
			b.asked[digest.Digest(blob)]++
		}
		b.mu.Unlock()
		if fault == nil || !fault(w, r) {
			next.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(server.Close)
	b.host = strings.TrimPrefix(server.URL, "http://")
	var err error
	b.client, err = registry.New(registry.Options{Hosts: []registry.Host{{Name: b.host, PlainHTTP: true}}, Attempts: 1})
	must(t, err)
	t.Cleanup(b.client.Close)
	b.keys, err = trust.CreateKeyring(filepath.Join(t.TempDir(), "keys"))
	must(t, err)

	r := rand.New(rand.NewPCG(5, 6))
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	for range 2 {
		var files bytes.Buffer
		tw := tar.NewWriter(&files)
		for k := range 30 {
			content := make([]byte, 20_000+r.IntN(150_000))
			for i := range content {
				content[i] = "0123456789abcdef"[r.IntN(16)]
			}
			must(t, tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("lib/%02d", k), Mode: 0o644, Size: int64(len(content))}))
			_, err := tw.Write(content)
			must(t, err)
		}
		must(t, tw.Close())
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil }, tarball.WithMediaType(types.OCILayer))
		must(t, err)
		img, err = mutate.AppendLayers(img, layer)
		must(t, err)
	}
	c := &convert.Converter{TempDir: t.TempDir(), Params: convert.DefaultParams()}
	must(t, b.client.PushImage(t.Context(), b.repository(), img))
	res, err := c.Convert(t.Context(), convert.Source{Repository: b.repository(), Image: img}, convert.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, res.Close()) })
	must(t, b.client.PushImage(t.Context(), b.converted(), res.Image))
	m := res.Mappings[0]
	m.TargetRepository = b.converted()
	b.manifest, b.layers = m.SourceManifest, m.Layers
	envelope, err := b.keys.Sign(t.Context(), m)
	must(t, err)
	b.subject, err = b.client.Head(t.Context(), b.repository(), b.manifest.String())
	must(t, err)
	_, err = b.client.Attach(t.Context(), b.repository(), b.subject, accel.MediaTypeMapping, map[string]string{accel.AnnotationMapping: string(envelope)})
	must(t, err)
	b.profile = accel.Profile{Manifest: b.manifest, Origin: accel.ProfilePredicted}
	for k := 29; k >= 0; k -= 3 {
		for layer := range 2 {
			b.profile.Items = append(b.profile.Items, accel.ProfileItem{Layer: layer, Path: fmt.Sprintf("lib/%02d", k), Bytes: 1 << 20})
		}
	}
	return b
}

func (b *bootBed) repository() string { return b.host + "/team/app" }

func (b *bootBed) converted() string { return b.host + "/" + b.target }

func (b *bootBed) bundle() bundle.Made {
	b.t.Helper()
	source, err := b.client.Source(b.converted(), "")
	must(b.t, err)
	m, err := bundle.Make(b.t.Context(), b.layers, b.profile.Items, func(ctx context.Context, layer int, offset, n int64) ([]byte, error) {
		r, err := source.Range(ctx, b.layers[layer].Target, b.layers[layer].TargetBytes, offset, n)
		if err != nil {
			return nil, err
		}
		content, err := io.ReadAll(r)
		return content, errors.Join(err, r.Close())
	}, bundle.Bounds{ContentBytes: 1 << 30, SizeBytes: 1 << 30})
	must(b.t, err)
	return m
}

// attach publishes the profile beside the converted image until the test's end, with a bundle where there is one.
func (b *bootBed) attach(m *bundle.Made) {
	b.t.Helper()
	form, err := artifact.FormOf(b.profile)
	must(b.t, err)
	if m != nil {
		form, err = form.WithBundle(*m)
		must(b.t, err)
	}
	d, err := b.client.Attach(b.t.Context(), b.converted(), b.subject, accel.MediaTypeProfile, form.Annotations, form.Blobs...)
	must(b.t, err)
	b.t.Cleanup(func() { must(b.t, b.client.Delete(context.Background(), b.converted(), d)) })
}

// node is a Lazy that fetches nothing in the background.
func (b *bootBed) node() *Lazy {
	b.t.Helper()
	dir := b.t.TempDir()
	log := slog.New(slog.DiscardHandler)
	store, err := cache.Open(cache.Options{Dir: filepath.Join(dir, "cache"), Log: log})
	must(b.t, err)
	file := filepath.Join(dir, "keys.pem")
	must(b.t, os.WriteFile(file, b.keys.Export(), 0o600))
	keys, err := OpenKeys(file, dir, nil)
	must(b.t, err)
	l, err := New(Options{
		Dir: filepath.Join(dir, "lazy"), RunDir: filepath.Join(dir, "run"), Version: "test", Holder: []string{"true"}, Store: store,
		Registry: b.client, Keys: keys, BackgroundBytesPerSecond: -1, Log: log,
		SetAside: func(context.Context, digest.Digest, digest.Digest, string) error { return nil },
	})
	must(b.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	b.t.Cleanup(func() {
		cancel()
		must(b.t, <-done)
		must(b.t, l.Close())
		must(b.t, store.Close())
	})
	for l.runs() == nil {
		select {
		case <-b.t.Context().Done():
			b.t.FailNow()
		default:
		}
	}
	b.mu.Lock()
	clear(b.asked)
	b.mu.Unlock()
	return l
}

func (l *Lazy) runs() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.running
}

// pulled looks at the image until all that its profile names is there.
func (b *bootBed) pulled(l *Lazy) *image {
	b.t.Helper()
	img, err := l.image(b.t.Context(), imageKey{b.repository(), b.manifest}, b.repository()+":v1")
	must(b.t, err)
	<-img.planned
	must(b.t, l.awaitContent(b.t.Context(), img, false, nil))
	for _, i := range b.profile.Items {
		d := img.layers[i.Layer].Digest
		l.mu.Lock()
		y := l.open[d]
		l.mu.Unlock()
		first, n := b.chunksOf(l, img, i)
		for k := first; k < first+n; k++ {
			if !y.Has(k) {
				b.t.Errorf("chunk %d of %s in layer %d is missing", k, i.Path, i.Layer)
			}
		}
		if n == 0 {
			b.t.Errorf("%s of layer %d has no chunks", i.Path, i.Layer)
		}
	}
	return img
}

func (b *bootBed) chunksOf(l *Lazy, img *image, i accel.ProfileItem) (first, n int) {
	b.t.Helper()
	d := img.layers[i.Layer].Digest
	l.mu.Lock()
	y := l.open[d]
	l.mu.Unlock()
	table, err := lazyfs.OpenTable(y.stored.Files().Table)
	must(b.t, err)
	defer table.Close() //nolint:errcheck // only mapped to read
	layer, err := profileLayer(d, y.stored.Files(), table)
	must(b.t, err)
	return layer.Chunks(i.Path, i.Offset, i.Bytes)
}

// answer has the registry answer otherwise.
func (b *bootBed) answer(fault func(w http.ResponseWriter, r *http.Request) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fault = fault
}

func (b *bootBed) requests(of ...digest.Digest) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range of {
		n += b.asked[d]
	}
	return n
}

func (b *bootBed) targets() (all []digest.Digest) {
	for _, l := range b.layers {
		all = append(all, l.Target)
	}
	return all
}

// TestBootBundle: one request brings the TOCs and all that a start reads, and nothing of it is asked for otherwise. A node that
// has the layers asks for none.
func TestBootBundle(t *testing.T) {
	for _, target := range []string{"team/app", "accelerated/app"} {
		t.Run(target, func(t *testing.T) { testBootBundle(t, newBootBed(t, target)) })
	}
}

func testBootBundle(t *testing.T, b *bootBed) {
	m := b.bundle()
	b.attach(&m)
	l := b.node()
	img := b.pulled(l)
	if n := b.requests(m.Digest); n != 1 {
		t.Errorf("the bundle was asked for %d times", n)
	}
	if n := b.requests(b.targets()...); n != 0 {
		t.Errorf("%d requests for layers", n)
	}
	a := img.wave.Load()
	var content int64
	for _, y := range m.Layers {
		content += y.ContentBytes
	}
	if a == nil || a.PlannedBytes != content || a.Requests != 1 || a.From != fromRegistry {
		t.Errorf("planned is %+v, of %d bytes", a, content)
	}
	// Its TOCs are kept as others are.
	for _, y := range img.layers {
		stored, err := l.o.Store.Layer(y.Digest)
		must(t, err)
		packed, err := os.ReadFile(stored.Files().TOC)
		must(t, err)
		if toc, err := unpackTOC(packed, nil); err != nil || digest.FromBytes(toc) != y.origin.TOCDigest {
			t.Errorf("the TOC of %s is kept as another: %v", y.Digest, err)
		}
	}
	l.answers.Purge()
	b.pulled(l)
	if n := b.requests(m.Digest); n != 1 {
		t.Errorf("the bundle was asked for %d times by a node that has the layers", n)
	}
}

// TestBootBundlesOfNoUse: whatever is wrong with a bundle, the image is mounted and the hot set comes, right.
func TestBootBundlesOfNoUse(t *testing.T) {
	b := newBootBed(t, "team/app")
	good := b.bundle()
	other := func(change func(m *bundle.Made)) *bundle.Made {
		m := good
		m.Layers = append([]bundle.LayerDescription(nil), good.Layers...)
		m.Content = bytes.Clone(good.Content)
		change(&m)
		m.Digest, m.SizeBytes = digest.FromBytes(m.Content), int64(len(m.Content))
		return &m
	}
	for _, c := range []struct {
		name  string
		m     *bundle.Made
		fault func(w http.ResponseWriter, r *http.Request, m *bundle.Made) bool
		asked bool // for the bundle
	}{
		{name: "none"},
		{name: "no bundle", m: other(func(m *bundle.Made) { m.Content = bytes.Repeat([]byte("x"), 1000) }), asked: true},
		{name: "cut short", m: other(func(m *bundle.Made) { m.Content = m.Content[:len(m.Content)/2] }), asked: true},
		{name: "wrong TOCs", m: other(func(m *bundle.Made) {
			for i := 400; i < 2400; i++ {
				m.Content[i] ^= 0x10
			}
		}), asked: true},
		{name: "wrong content", m: other(func(m *bundle.Made) {
			for i := len(m.Content) - 5000; i < len(m.Content); i++ {
				m.Content[i] ^= 0x10
			}
		}), asked: true},
		{name: "another image's", m: other(func(m *bundle.Made) {
			m.Layers[0].TOCDigest, m.Layers[1].TOCDigest = digest.FromString("a"), digest.FromString("b")
		})},
		{name: "of fewer layers", m: other(func(m *bundle.Made) { m.Layers = m.Layers[:1] })},
		{name: "too much", m: other(func(m *bundle.Made) { m.Layers[0].ContentBytes = 1 << 38 })},
		{name: "refused", m: other(func(m *bundle.Made) { m.Content = append(m.Content, 1) }), asked: true, fault: func(w http.ResponseWriter, r *http.Request, m *bundle.Made) bool {
			refused := strings.HasSuffix(r.URL.Path, m.Digest.String())
			if refused {
				w.WriteHeader(http.StatusForbidden)
			}
			return refused
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer func(was *testing.T) { b.t = was }(b.t)
			b.t = t
			b.attach(c.m)
			if c.fault != nil {
				b.answer(func(w http.ResponseWriter, r *http.Request) bool { return c.fault(w, r, c.m) })
				defer b.answer(nil)
			}
			l := b.node()
			b.pulled(l)
			if c.m != nil && (b.requests(c.m.Digest) > 0) != c.asked {
				t.Errorf("the bundle was asked for %d times", b.requests(c.m.Digest))
			}
			if b.requests(b.targets()...) == 0 {
				t.Error("nothing was asked of the layers")
			}
		})
	}
}
