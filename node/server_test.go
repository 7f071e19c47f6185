package node_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"accel"
	"accel/api"
	"accel/fleet"
	"accel/meter"
	"accel/node"
	"accel/readiness"
	"accel/readiness/boltstore"
	"accel/trust"

	"github.com/opencontainers/go-digest"
)

type ctx = context.Context

func dialUnix(socket string) func(ctx, string, string) (net.Conn, error) {
	return func(ctx ctx, _, _ string) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", socket) }
}

// server is a real accel server but for its worker, on an address of its own, which can be
// away for a while.
type server struct {
	*bed
	url     string
	client  *api.Client
	fleet   *fleet.Fleet
	away    atomic.Bool
	reports atomic.Int64 // requests with pulls, also such as were lost
	lose    atomic.Bool  // do the work, and lose the answer
}

type noLifecycle struct{}

func (noLifecycle) DeleteTarget(ctx, accel.Record) error         { return nil }
func (noLifecycle) GC(ctx, bool) ([]api.Orphan, error)           { return nil, nil }
func (b *bed) canonical(host string) (canonical string, _ error) { return host, nil }

func (b *bed) newServer(rules ...fleet.Rule) *server {
	b.Helper()
	s := &server{bed: b}
	dir := b.TempDir()
	store, err := boltstore.Open(filepath.Join(dir, "readiness.db"))
	b.check(err)
	keys, err := trust.CreateKeyring(filepath.Join(dir, "keys"))
	b.check(err)
	s.fleet, err = fleet.Open(filepath.Join(dir, "fleet.db"), fleet.Options{Rules: rules})
	b.check(err)
	ledger, err := meter.OpenLedger(filepath.Join(dir, "pulls.db"), meter.LedgerOptions{})
	b.check(err)
	draining, drain := context.WithCancel(context.Background())
	handler, err := api.New(api.Options{
		Tracker: readiness.New(store, readiness.Options{Params: "p"}), Canonical: b.canonical, Keys: keys, Lifecycle: noLifecycle{}, Open: true,
		Draining: draining, Version: "test", Log: slog.New(slog.DiscardHandler), Fleet: s.fleet, Ledger: ledger,
	})
	b.check(err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	b.check(err)
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && r.URL.Path == "/v1/pulls" {
			s.reports.Add(1)
			if s.lose.Load() {
				handler.ServeHTTP(&deaf{header: http.Header{}}, r)
				panic(http.ErrAbortHandler)
			}
		}
		if s.away.Load() {
			panic(http.ErrAbortHandler)
		}
		handler.ServeHTTP(w, r)
	})}
	served := make(chan error, 1)
	go func() { served <- web.Serve(l) }()
	b.Cleanup(func() {
		drain()
		b.http.CloseIdleConnections()
		err := web.Close()
		<-served
		b.check(errors.Join(err, s.fleet.Close(), ledger.Close(), store.Close()))
	})
	s.url = "http://" + l.Addr().String()
	s.client = b.client(s.url)
	return s
}

// deaf takes an answer that nobody hears.
type deaf struct{ header http.Header }

func (d *deaf) Header() http.Header         { return d.header }
func (d *deaf) WriteHeader(int)             {}
func (d *deaf) Write(p []byte) (int, error) { return len(p), nil }

// pulls are those that the server knows.
func (s *server) pulls() []accel.Pull {
	s.Helper()
	var all []accel.Pull
	for p, err := range s.client.Pulls(s.ctx, api.PullOptions{}) {
		s.check(err)
		all = append(all, p)
	}
	return all
}

func TestTheServerIsToldOfNodeAndPulls(t *testing.T) {
	b := newBed(t)
	s := b.newServer()
	b.push("team/app:v1", 2<<20)
	d := b.start(func(o *node.Options) { o.Server = b.client(s.url) })
	for range 2 {
		_, err := b.pull(d.host, "team/app:v1")
		b.check(err)
		b.until("the pull is measured", func() bool { return len(s.pulls()) > 0 })
	}
	b.until("both pulls are there", func() bool { return len(s.pulls()) == 2 })
	outcomes := map[accel.Outcome]accel.Pull{}
	for _, p := range s.pulls() {
		outcomes[p.Outcome] = p
		if p.Image != b.registry.Host()+"/team/app:v1" || p.Node != "n1" || p.Mode != accel.PullMirror {
			t.Errorf("reported %+v", p)
		}
	}
	if miss, hit := outcomes[accel.OutcomeMiss], outcomes[accel.OutcomeHit]; miss.RegistryBytes != 2<<20 || hit.CacheBytes != 2<<20 {
		t.Errorf("reported %+v", outcomes)
	}
	b.until("the server knows how full the cache is", func() bool {
		n, err := s.client.Node(b.ctx, "n1")
		return err == nil && n.Cache.Blobs == 2 && n.Labels["zone"] == "a"
	})
}

func TestPullsWaitForTheServerAndComeOnce(t *testing.T) {
	b := newBed(t)
	s := b.newServer()
	s.away.Store(true)
	s.lose.Store(true)
	b.push("team/app:v1", 1<<20)
	d := b.start(func(o *node.Options) { o.Server = b.client(s.url) })
	_, err := b.pull(d.host, "team/app:v1")
	b.check(err)
	b.until("the pull was reported, and the answer lost", func() bool { return s.reports.Load() > 0 })
	status, err := d.client.Status(b.ctx)
	b.check(err)
	if status.SpooledPulls != 1 || status.ServerProblem == "" {
		t.Errorf("without a server, the node says %+v", status)
	}
	s.lose.Store(false)
	s.away.Store(false)
	b.until("the spool is empty", func() bool {
		status, err := d.client.Status(b.ctx)
		b.check(err)
		return status.SpooledPulls == 0 && status.ServerProblem == ""
	})
	if got := s.pulls(); len(got) != 1 {
		t.Errorf("the server knows %d pulls, want 1", len(got))
	}
}

func TestImagesAreBroughtAhead(t *testing.T) {
	b := newBed(t)
	s := b.newServer()
	ref, img := b.push("team/app:v1", 3<<20)
	d := b.start(func(o *node.Options) { o.Server = b.client(s.url) })
	b.until("the node is known", func() bool {
		_, err := s.client.Node(b.ctx, "n1")
		return err == nil
	})
	warm := func(image string) accel.Warm {
		t.Helper()
		asked, err := s.client.Warm(b.ctx, image, "n1")
		b.check(err)
		if len(asked) != 1 {
			t.Fatalf("asked for %d warms", len(asked))
		}
		var last accel.Warm
		b.until(fmt.Sprintf("%s is brought", image), func() bool {
			for w, err := range s.client.Warms(b.ctx, api.WarmOptions{}) {
				b.check(err)
				if w.ID == asked[0].ID {
					last = w
				}
			}
			return last.State == accel.WarmDone || last.State == accel.WarmFailed
		})
		return last
	}
	w := warm(ref)
	if h, _ := img.Digest(); w.State != accel.WarmDone || w.Digest.String() != h.String() || w.FetchedBytes != 3<<20 || w.TotalBytes != 3<<20 {
		t.Errorf("brought: %+v", w)
	}
	content, err := d.client.Stat(b.ctx, ref)
	if err != nil || !content.Complete {
		t.Errorf("the cache has %+v, %v", content, err)
	}
	if w := warm(b.registry.Host() + "/team/nothing:v1"); w.State != accel.WarmFailed || w.Reason == "" {
		t.Errorf("what is not there: %+v", w)
	}
	b.registry.Reset()
	b.check(b.registry.Stop())
	if n, err := b.pull(d.host, "team/app:v1"); n != 3<<20 {
		t.Errorf("pulled with the registry away: %d, %v", n, err)
	}
}

// TestWarmedByRulePulledByTagOffline: what became Ready is pulled by its tag for the first time when the
// registry is away already.
func TestWarmedByRulePulledByTagOffline(t *testing.T) {
	b := newBed(t)
	s := b.newServer(fleet.Rule{Name: "all", Repositories: []string{"*/**"}})
	_, img := b.push("team/app:v1", 1<<20)
	d := b.start(func(o *node.Options) { o.Server = b.client(s.url) })
	b.until("the node is known", func() bool {
		_, err := s.client.Node(b.ctx, "n1")
		return err == nil
	})
	h, err := img.Digest()
	b.check(err)
	b.check(s.fleet.Ready(b.ctx, accel.Record{
		ID: "r", Repository: b.registry.Host() + "/team/app", Digest: digest.Digest(h.String()), Tags: []string{"v1"}, State: accel.Ready, UpdatedAt: time.Now(),
	}))
	b.until("it is brought", func() bool {
		for w, err := range s.client.Warms(b.ctx, api.WarmOptions{}) {
			b.check(err)
			if w.State == accel.WarmFailed {
				t.Fatalf("brought: %+v", w)
			}
			return w.State == accel.WarmDone
		}
		return false
	})
	b.check(b.registry.Stop())
	if n, err := b.pull(d.host, "team/app:v1"); n != 1<<20 {
		t.Errorf("pulled by its tag with the registry away: %d, %v", n, err)
	}
}
