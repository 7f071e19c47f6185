package node_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/cache"
	"accel/node"

	"github.com/opencontainers/go-digest"
)

func TestThePulledIsKeptAndTold(t *testing.T) {
	b := newBed(t)
	ref, img := b.push("team/app:v1", 3<<20, 100)
	d := b.start(nil)
	for range 2 {
		n, err := b.pull(d.host, "team/app:v1")
		b.check(err)
		if n != 3<<20+100 {
			t.Errorf("%d layer bytes came", n)
		}
	}
	if got := b.registry.Delivered().BlobBytes(); got > 3<<20+100+4096 {
		t.Errorf("the registry delivered %d bytes for two pulls of %d", got, 3<<20+100)
	}
	content, err := d.client.Stat(b.ctx, ref)
	b.check(err)
	if h, _ := img.Digest(); !content.Complete || len(content.Blobs) != 3 || content.Digest.String() != h.String() {
		t.Errorf("the cache has %+v", content)
	}
	live, err := d.client.List(b.ctx)
	b.check(err)
	if len(live) != 3 {
		t.Errorf("the cache lists %d blobs, want 3", len(live))
	}
	b.until("both pulls are measured", func() bool {
		s, err := d.client.Status(b.ctx)
		b.check(err)
		return s.SpooledPulls == 2
	})
	s, err := d.client.Status(b.ctx)
	b.check(err)
	if s.Name != "n1" || s.Labels["zone"] != "a" || s.PID != os.Getpid() || s.Cache.Blobs != 3 || s.StartedAt.IsZero() {
		t.Errorf("the node says %+v", s)
	}
	b.check(d.stop())

	// The stopped node's folder says the same.
	b.offline(func(c *node.Contents) error {
		stopped, err := c.List(b.ctx)
		if len(stopped) != len(live) {
			t.Errorf("stopped, the cache lists %d blobs, not %d", len(stopped), len(live))
		}
		again, err2 := c.Stat(b.ctx, ref)
		if !again.Complete || again.Digest != content.Digest {
			t.Errorf("stopped, the cache has %+v", again)
		}
		return errors.Join(err, err2)
	})
}

// TestLayersAreListed: what is kept inflated is shown beside the blob of its digest, and passes for it nowhere.
func TestLayersAreListed(t *testing.T) {
	b := newBed(t)
	ref, img := b.push("team/app:v1", 3<<20, 100)
	d := b.start(nil)
	_, err := b.pull(d.host, "team/app:v1")
	b.check(err)
	b.check(d.stop())
	layers, err := img.Layers()
	b.check(err)
	first, err := layers[0].Digest()
	b.check(err)
	second, err := layers[1].Digest()
	b.check(err)
	both := digest.Digest(first.String())
	alone := digest.FromString("a layer without its blob")
	store, err := cache.Open(cache.Options{Dir: filepath.Join(b.dir, "cache")})
	b.check(err)
	for _, d := range []digest.Digest{both, alone} {
		kept, err := store.CreateLayer(b.ctx, d, cache.LayerInfo{Chunks: 2, DataBytes: 8192}, func(f cache.LayerFiles) error {
			return errors.Join(os.WriteFile(f.Meta, nil, 0o600), os.WriteFile(f.Table, nil, 0o600), os.WriteFile(f.TOC, nil, 0o600), os.WriteFile(f.Data, make([]byte, 8192), 0o600))
		})
		b.check(err)
		b.check(kept.Commit([]int{0}))
	}
	b.check(store.Remove(digest.Digest(second.String())))
	b.check(store.Close())
	b.offline(func(c *node.Contents) error {
		list, err := c.List(b.ctx)
		b.check(err)
		u, err := c.Usage(b.ctx)
		b.check(err)
		if len(list) != 4 || u.Blobs != 2 || u.CompleteBlobs != 2 || u.Layers != 2 || u.CompleteLayers != 0 {
			t.Errorf("%d in the list, %+v", len(list), u)
		}
		got, err := c.Stat(b.ctx, both.String())
		b.check(err)
		if len(got.Blobs) != 2 || got.Blobs[0].Form != cache.FormBlob || got.Blobs[1].Form != cache.FormLayer || !got.Complete {
			t.Errorf("both forms: %+v", got)
		}
		got, err = c.Stat(b.ctx, alone.String())
		b.check(err)
		if len(got.Blobs) != 1 || got.Blobs[0].PresentChunks != 1 || got.Complete {
			t.Errorf("inflated alone: %+v", got)
		}
		got, err = c.Stat(b.ctx, ref)
		b.check(err)
		if len(got.Blobs) != 4 || got.Complete {
			t.Errorf("the image: %+v", got)
		}
		if _, err := c.Pin(b.ctx, both.String()); err != nil {
			t.Error(err)
		}
		list, err = c.List(b.ctx)
		for _, e := range list {
			if e.Pinned != (e.Digest == both) || e.Pinned != (len(e.PinnedBy) == 1) {
				t.Errorf("%+v", e)
			}
		}
		return err
	})
}

// offline opens the bed's folder with no daemon.
func (b *bed) offline(do func(c *node.Contents) error) {
	b.Helper()
	b.check(node.Offline(b.ctx, b.offlineOptions(), func(_ ctx, c *node.Contents) error { return do(c) }))
}

func (b *bed) offlineOptions() node.OfflineOptions {
	return node.OfflineOptions{Dir: b.dir, Canonical: func(host string) (string, error) { return host, nil }}
}

func TestContentsByWhicheverWay(t *testing.T) {
	b := newBed(t)
	ref, _ := b.push("team/app:v1", 2<<20)
	other, _ := b.push("team/other:v1", 1<<20)
	d := b.start(nil)
	_, err := b.pull(d.host, "team/app:v1")
	b.check(err)

	if _, err := d.client.Stat(b.ctx, other); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("an image that is not here: %v", err)
	}
	if _, err := d.client.Stat(b.ctx, "UPPER:CASE:X"); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a name that is none: %v", err)
	}
	if _, err := d.client.Stat(b.ctx, "elsewhere.test/app:v1"); !errors.Is(err, accel.ErrRegistryNotAllowed) {
		t.Errorf("a registry that is not configured: %v", err)
	}
	if _, err := d.client.Stat(b.ctx, digest.FromString("nothing").String()); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a digest that is not here: %v", err)
	}
	// A live node fetches what it is to pin.
	content, err := d.client.Pin(b.ctx, other)
	b.check(err)
	if !content.Complete {
		t.Errorf("pinned, but not complete: %+v", content)
	}
	for _, blob := range content.Blobs {
		if len(blob.PinnedBy) != 1 || !strings.Contains(blob.PinnedBy[0], other) {
			t.Errorf("%s is pinned by %v", blob.Digest, blob.PinnedBy)
		}
	}
	u, err := d.client.Usage(b.ctx)
	b.check(err)
	if u.PinnedBytes < 1<<20 || u.CompleteBlobs != 4 || len(u.Pins) != 1 {
		t.Errorf("usage %+v", u)
	}
	report, err := d.client.Check(b.ctx, nil)
	b.check(err)
	if report.CheckedBlobs != 4 || len(report.Damaged) != 0 {
		t.Errorf("check: %+v", report)
	}
	b.check(d.client.Unpin(b.ctx, other))
	if err := d.client.Unpin(b.ctx, other); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("released twice: %v", err)
	}
	_, err = d.client.GC(b.ctx)
	b.check(err)
	b.check(d.stop())

	if _, err := d.client.Status(b.ctx); !errors.Is(err, node.ErrNotRunning) {
		t.Errorf("a stopped node: %v", err)
	}
	b.damage()
	b.offline(func(c *node.Contents) error {
		if _, err := c.Pin(b.ctx, ref); err != nil {
			return err
		}
		if err := c.Unpin(b.ctx, ref); err != nil {
			return err
		}
		report, err := c.Check(b.ctx, nil)
		if len(report.Damaged) != 1 {
			t.Errorf("a damaged file was not found: %+v", report)
		}
		return err
	})
}

// damage changes a byte of one of the files with more than half a MiB.
func (b *bed) damage() {
	b.Helper()
	var done bool
	b.check(filepath.WalkDir(filepath.Join(b.dir, "cache", "blobs"), func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || done {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || st.Size() < 1<<19 {
			return err
		}
		var one [1]byte
		if _, err := f.ReadAt(one[:], 1000); err != nil {
			return err
		}
		one[0]++
		_, err = f.WriteAt(one[:], 1000)
		done = true
		return err
	}))
	if !done {
		b.Fatal("there is no file to damage")
	}
}

func TestTheSecondDaemonRefuses(t *testing.T) {
	b := newBed(t)
	d := b.start(nil)
	if _, err := start(b.ctx, b.dir, b.registry.Host(), nil); !errors.Is(err, cache.ErrLocked) {
		t.Errorf("a second daemon in the folder: %v", err)
	}
	if err := node.Offline(b.ctx, b.offlineOptions(), func(ctx, *node.Contents) error { return nil }); !errors.Is(err, cache.ErrLocked) {
		t.Errorf("opened beside the daemon: %v", err)
	}
	if _, err := node.ListenAdmin(b.ctx, d.socket); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("a second daemon on the socket: %v", err)
	}
	if _, err := d.client.Status(b.ctx); err != nil {
		t.Errorf("the first one is disturbed: %v", err)
	}
}

func TestTheSocketIsItsOwnersAlone(t *testing.T) {
	b := newBed(t)
	path := filepath.Join(b.dir, "run", "s")
	l, err := node.ListenAdmin(b.ctx, path)
	b.check(err)
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want mode %o", p, st.Mode(), err, want)
		}
	}
	b.check(l.Close())
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 0 {
		t.Errorf("closed, it leaves %v", left)
	}
	// What a killed daemon left is taken over.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	b.check(err)
	dead.SetUnlinkOnClose(false)
	b.check(dead.Close())
	l, err = node.ListenAdmin(b.ctx, path)
	b.check(err)
	b.check(l.Close())
	if _, err := node.ListenAdmin(b.ctx, filepath.Join(b.dir, strings.Repeat("x", 120))); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a path that no socket may have: %v", err)
	}
}

func TestAClientThatDoesNotReadHoldsNoStopUp(t *testing.T) {
	b := newBed(t)
	_, img := b.push("team/app:v1", 32<<20)
	d := b.start(nil)
	layers, err := img.Layers()
	b.check(err)
	h, err := layers[0].Digest()
	b.check(err)
	conn, err := net.Dial("tcp", d.host)
	b.check(err)
	defer conn.Close()
	_, err = io.WriteString(conn, "GET /v2/team/app/blobs/"+h.String()+" HTTP/1.1\r\nHost: x\r\n\r\n")
	b.check(err)
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, "200") {
		t.Fatalf("%q, %v", line, err)
	}
	b.check(d.stop()) // ends, though nobody reads the rest
}

func TestKilledItKnowsWhatItHad(t *testing.T) {
	b := newBed(t)
	ref, _ := b.push("team/app:v1", 5<<20, 1<<20)
	cmd := exec.CommandContext(b.ctx, os.Args[0])
	cmd.Env = append(os.Environ(), dirVariable+"="+b.dir, registryVariable+"="+b.registry.Host())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	b.check(err)
	b.check(cmd.Start())
	host, err := bufio.NewReader(out).ReadString('\n')
	b.check(err)
	_, err = b.pull(strings.TrimSpace(host), "team/app:v1")
	b.check(err)
	killed := node.NewClient(filepath.Join(b.dir, "s"))
	defer killed.Close()
	b.until("the pull is measured and the content is complete", func() bool {
		s, err := killed.Status(b.ctx)
		b.check(err)
		c, err := killed.Stat(b.ctx, ref)
		b.check(err)
		return s.SpooledPulls > 0 && c.Complete
	})
	time.Sleep(1500 * time.Millisecond) // names and small parts are on disk within a second or so
	before, err := killed.Status(b.ctx) // a slow machine may have made two pulls of the one
	b.check(err)
	b.check(cmd.Process.Kill())
	if err := cmd.Wait(); err == nil {
		t.Fatal("it was not killed")
	}

	b.check(b.registry.Stop())
	d := b.start(nil)
	s, err := d.client.Status(b.ctx)
	b.check(err)
	if s.SpooledPulls != before.SpooledPulls {
		t.Errorf("%d pulls are kept, want %d", s.SpooledPulls, before.SpooledPulls)
	}
	// The registry is away: all comes from the cache.
	n, err := b.pull(d.host, "team/app:v1")
	if err != nil || n != 6<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
	report, err := d.client.Check(b.ctx, nil)
	if err != nil || len(report.Damaged) != 0 || report.CheckedBlobs != 3 {
		t.Errorf("check: %+v, %v", report, err)
	}
}

func TestMetricsOnTheSocket(t *testing.T) {
	b := newBed(t)
	d := b.start(nil)
	unix := &http.Transport{DialContext: dialUnix(d.socket)}
	defer unix.CloseIdleConnections()
	for path, want := range map[string]string{"/healthz": "ok", "/metrics": "go_goroutines", "/openapi.json": "cache-pin"} {
		res, err := (&http.Client{Transport: unix}).Get("http://node" + path)
		b.check(err)
		raw, err := io.ReadAll(res.Body)
		b.check(errors.Join(err, res.Body.Close()))
		if res.StatusCode != http.StatusOK || !strings.Contains(string(raw), want) {
			t.Errorf("%s: %d %.200s", path, res.StatusCode, raw)
		}
	}
}
