package lazy

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/cache"
	"accel/lazyfs"
	"accel/registry"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// opener is a Lazy whose registry has one layer, of one file, and that mounts nothing.
type opener struct {
	*Lazy
	store  *cache.Store
	layer  digest.Digest
	origin origin
	runDir string
}

func newOpener(t *testing.T) *opener {
	t.Helper()
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	must(t, w.WriteHeader(&tar.Header{Name: "file", Typeflag: tar.TypeReg, Size: 7, Mode: 0o644}))
	_, err := w.Write([]byte("content"))
	must(t, errors.Join(err, w.Close()))
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw.Bytes()), 0, int64(raw.Len())))
	must(t, err)
	packed, err := io.ReadAll(built)
	must(t, errors.Join(err, built.Close()))
	b := &opener{layer: digest.FromBytes(packed)}
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/blobs/"+b.layer.String()) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(packed))
		} else if r.URL.Path != "/v2/" {
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(upstream.Close)
	host := strings.TrimPrefix(upstream.URL, "http://")
	b.origin = origin{Repositories: []string{host + "/a"}, SizeBytes: int64(len(packed)), TOCDigest: built.TOCDigest(), TOCOffset: -1, Signed: true}

	quiet := slog.New(slog.DiscardHandler)
	b.store, err = cache.Open(cache.Options{Dir: t.TempDir(), VerifyLayer: VerifyLayer, Log: quiet})
	must(t, err)
	client, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: host, PlainHTTP: true}}, Attempts: 1})
	must(t, err)
	keys, err := OpenKeys("", t.TempDir(), nil)
	must(t, err)
	b.runDir, err = os.MkdirTemp("", "lazy") // short, for sockets
	must(t, err)
	b.Lazy, err = New(Options{
		Dir: t.TempDir(), RunDir: b.runDir, Version: "test", Node: "n1", Holder: []string{"/bin/false"}, Store: b.store, Registry: client,
		Keys: keys, BackgroundBytesPerSecond: -1, Log: quiet,
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- b.store.Run(ctx) }()
	go func() { ended <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		err := errors.Join(<-ended, <-ended, b.Close(), b.store.Close(), os.RemoveAll(b.runDir))
		client.Close()
		if err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *opener) openIt(t *testing.T, said *origin) error {
	_, err := b.openLayer(t.Context(), b.layer, said, nil)
	return err
}

func (b *opener) createIt(t *testing.T) (*cache.Layer, error) {
	stored, _, err := b.create(t.Context(), b.layer, &b.origin, nil)
	return stored, err
}

func (b *opener) opened() *openLayer {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open[b.layer]
}

// A layer that the store dropped while it was open is made anew, and not taken as good for ever.
func TestLayerThatTheStoreDropped(t *testing.T) {
	b := newOpener(t)
	must(t, b.openIt(t, &b.origin))
	must(t, b.filler.Fill(t.Context(), b.layer, 0, 1))
	before := b.opened()
	must(t, b.openIt(t, nil))
	if b.opened() != before {
		t.Error("opened anew without need")
	}
	b.until(t, "nothing is written", func() bool { return b.store.Remove(b.layer) == nil })
	must(t, b.openIt(t, nil))
	after := b.opened()
	if after == before || after.Has(0) {
		t.Errorf("the same as before: %v; its chunk counts as there: %v", after == before, after.Has(0))
	}
	must(t, after.stored.Use())
	must(t, b.filler.Fill(t.Context(), b.layer, 0, 1))
	if got := make([]byte, 7); after.Read(0, got) != nil || string(got) != "content" {
		t.Errorf("its content is %q", got)
	}
}

func (b *opener) until(t *testing.T, what string, isSo func() bool) {
	t.Helper()
	for range 6000 {
		if isSo() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

// A layer that gets no filler is not open, or reads of it would fail for ever.
func TestLayerWithoutAFiller(t *testing.T) {
	b := newOpener(t)
	must(t, b.openIt(t, &b.origin))
	content := b.opened().Layer
	must(t, b.host.Remove(t.Context(), b.layer, nil)) // and the filler has it still
	b.mu.Lock()
	delete(b.open, b.layer)
	b.mu.Unlock()
	if err := b.openIt(t, nil); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("given to the filler twice: %v", err)
	}
	if _, known := b.host.Layer(b.layer); known || b.opened() != nil || content.Len() != 0 {
		t.Error("it is open without a filler")
	}
	b.filler.Remove(b.layer)
	must(t, b.openIt(t, nil))
	must(t, b.filler.Fill(t.Context(), b.layer, 0, 1))
}

// A layer that cannot be filled is declined, so that containerd pulls its image.
func TestLayerBeyondTheFillersBounds(t *testing.T) {
	b := newOpener(t)
	stored, err := b.createIt(t)
	must(t, err)
	table, err := os.OpenFile(stored.Files().Table, os.O_RDWR, 0)
	must(t, err)
	raw, err := io.ReadAll(table)
	must(t, err)
	const header, blobBytes = 64, 64 + 8 // as in lazyfs/table.go
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	le := binary.LittleEndian
	le.PutUint64(raw[blobBytes:], accel.MaxMemberBytes+1)
	le.PutUint32(raw[32:], crc32.Checksum(raw[header:], castagnoli))
	le.PutUint32(raw[60:], crc32.Checksum(raw[:60], castagnoli))
	_, err = table.WriteAt(raw, 0)
	must(t, errors.Join(err, table.Close()))
	var no *Declined
	if err := b.openIt(t, &b.origin); !errors.As(err, &no) {
		t.Errorf("%v, want it declined", err)
	}
	if b.opened() != nil {
		t.Error("it is open")
	}
}

// What cannot be closed, because somebody may read it, is filled as before.
func TestLayerThatIsStillRead(t *testing.T) {
	b := newOpener(t)
	must(t, b.openIt(t, &b.origin))
	// A holder that does not answer.
	dir := filepath.Join(b.runDir, "v@1-1")
	must(t, os.Mkdir(dir, 0o700))
	lock, err := os.Create(filepath.Join(dir, "lock"))
	must(t, err)
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	before := b.opened()
	if err := b.Forget(t.Context(), b.layer); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("closed: %v", err)
	}
	if b.opened() != before {
		t.Error("it is not open any more")
	}
	must(t, b.filler.Fill(t.Context(), b.layer, 0, 1))
	must(t, errors.Join(lock.Close(), os.RemoveAll(dir)))
	must(t, b.Forget(t.Context(), b.layer))
	if err := b.filler.Fill(t.Context(), b.layer, 0, 1); !errors.Is(err, accel.ErrNotFound) || b.opened() != nil {
		t.Errorf("filled after it was closed: %v", err)
	}
}

// A table that is cut short while it is read is damage of that layer, not the end of the process.
func TestVerifyADamagedTable(t *testing.T) {
	b := newOpener(t)
	stored, err := b.createIt(t)
	must(t, err)
	f := stored.Files()
	_, err = VerifyLayer(t.Context(), b.layer, f, func(int) bool {
		must(t, os.Truncate(f.Table, 0))
		return true
	}, nil)
	if !errors.Is(err, lazyfs.ErrDamaged) {
		t.Errorf("%v, want damage", err)
	}
}
