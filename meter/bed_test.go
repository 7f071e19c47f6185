package meter_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/meter"

	"github.com/oklog/ulid/v2"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(killPath); path != "" {
		beKilled(path, os.Getenv(killRun))
	}
	if path := os.Getenv(killFold); path != "" {
		beKilledFolding(path, os.Getenv(killRun))
	}
	goleak.VerifyTestMain(m)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const repository = "registry.test:5000/team/app"

// noon is the middle of a day, so that hours around it are of the same.
var noon = time.Date(2026, 3, 10, 12, 0, 0, 0, time.UTC)

// pullOf is a pull that a node might report, changed by the test.
func pullOf(start time.Time, change ...func(*accel.Pull)) accel.Pull {
	p := accel.Pull{
		ID: idAt(start), Image: repository + ":v1", Digest: digest.FromString("v1"), Node: "n1", Mode: accel.PullMirror,
		Start: start, Duration: 2 * time.Second, RegistryBytes: 100e6, Outcome: accel.OutcomeMiss,
	}
	for _, c := range change {
		c(&p)
	}
	return p
}

func idAt(at time.Time) string {
	return ulid.MustNew(uint64(at.UnixMilli()), rand.Reader).String()
}

func hit(p *accel.Pull) {
	p.Outcome, p.RegistryBytes, p.CacheBytes = accel.OutcomeHit, 0, 100e6
}

func took(d time.Duration) func(*accel.Pull) { return func(p *accel.Pull) { p.Duration = d } }
func of(image string) func(*accel.Pull)      { return func(p *accel.Pull) { p.Image = image } }
func on(node string) func(*accel.Pull)       { return func(p *accel.Pull) { p.Node = node } }
func by(tenant string) func(*accel.Pull)     { return func(p *accel.Pull) { p.Tenant = tenant } }
func memory(n int64) func(*accel.Pull)       { return func(p *accel.Pull) { p.MemoryBytes = n } }

// openLedger opens a ledger whose clock stands at *now.
func openLedger(t testing.TB, path string, now *time.Time, o meter.LedgerOptions) *meter.Ledger {
	t.Helper()
	if path == "" {
		path = filepath.Join(t.TempDir(), "pulls.db")
	}
	o.Now = func() time.Time { return *now }
	l, err := meter.OpenLedger(path, o)
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	return l
}

func add(t testing.TB, l *meter.Ledger, pulls ...accel.Pull) meter.Receipt {
	t.Helper()
	r, err := l.Add(t.Context(), pulls)
	must(t, err)
	return r
}

func usage(t testing.TB, l *meter.Ledger, q meter.Query) meter.Usage {
	t.Helper()
	if q.MemoryBytes == 0 {
		q.MemoryBytes = 1 << 30
	}
	u, err := l.Usage(t.Context(), q)
	must(t, err)
	return u
}

// allPulls lists all pulls that f selects, page by page.
func allPulls(t testing.TB, l *meter.Ledger, f meter.Filter) (all []accel.Pull) {
	t.Helper()
	for {
		p, err := l.Pulls(t.Context(), f)
		must(t, err)
		all = append(all, p.Pulls...)
		if p.Next == "" {
			return all
		}
		f.Cursor = p.Next
	}
}

// into makes a ledger a meter.Sink.
type into struct{ *meter.Ledger }

func (i into) ReportPulls(ctx context.Context, pulls []accel.Pull) error {
	_, err := i.Add(ctx, pulls)
	return err
}

func openSpool(t testing.TB, path string, o meter.SpoolOptions) *meter.Spool {
	t.Helper()
	if path == "" {
		path = filepath.Join(t.TempDir(), "spool.db")
	}
	s, err := meter.OpenSpool(path, o)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

var errAway = errors.New("connection refused")

func name(prefix string, i int) string { return fmt.Sprint(prefix, i) }

// lines is a slog.Handler that keeps what is logged.
type lines struct {
	mu      sync.Mutex
	records []slog.Record
}

func (l *lines) Enabled(context.Context, slog.Level) bool { return true }
func (l *lines) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *lines) WithGroup(string) slog.Handler            { return l }

func (l *lines) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, r)
	return nil
}

// take removes the lines of a level and above, and returns them.
func (l *lines) take(level slog.Level) (taken []slog.Record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = slices.DeleteFunc(l.records, func(r slog.Record) bool {
		if r.Level >= level {
			taken = append(taken, r)
		}
		return r.Level >= level
	})
	return taken
}

// attr is a value that a line has.
func attr(r slog.Record, key string) (v slog.Value) {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == key {
			v = a.Value
		}
		return true
	})
	return v
}
