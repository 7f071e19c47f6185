package meter_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"accel"
	"accel/meter"

	"github.com/prometheus/client_golang/prometheus"
)

func series(n int) []accel.Pull {
	pulls := make([]accel.Pull, 0, n)
	for i := range n {
		pulls = append(pulls, pullOf(noon.Add(time.Duration(i)*time.Second)))
	}
	return pulls
}

func ids(pulls []accel.Pull) []string {
	all := make([]string, 0, len(pulls))
	for _, p := range pulls {
		all = append(all, p.ID)
	}
	return all
}

func TestSpoolKeepsUntilAcknowledged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node", "spool.db")
	pulls := series(5)
	pulls[2].Tenant, pulls[2].MemoryBytes, pulls[2].Reason = "t 1", 1<<40, "ü"
	s := openSpool(t, path, meter.SpoolOptions{})
	must(t, s.Add(pulls[3:]...))
	must(t, s.Add(pulls[:4]...)) // one twice
	must(t, s.Add())
	must(t, s.Ack(pulls[0].ID, idAt(noon), pulls[0].ID))
	must(t, s.Close())
	must(t, s.Close())
	if err := s.Add(pulls[0]); !errors.Is(err, meter.ErrClosed) {
		t.Errorf("add to a closed spool: %v", err)
	}
	s = openSpool(t, path, meter.SpoolOptions{Registerer: prometheus.NewRegistry()})
	got, err := s.Oldest(10)
	must(t, err)
	if !slices.Equal(got, pulls[1:]) || s.Len() != 4 || s.Dropped() != 0 {
		t.Errorf("%d, %d dropped: %+v", s.Len(), s.Dropped(), got)
	}
	if got, err = s.Oldest(2); err != nil || !slices.Equal(got, pulls[1:3]) {
		t.Errorf("%+v, %v", got, err)
	}
	if err := s.Ack("no id"); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("%v", err)
	}
	if _, err := meter.OpenSpool(path, meter.SpoolOptions{}); !errors.Is(err, meter.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
}

func TestSpoolDropsTheOldest(t *testing.T) {
	pulls := series(12)
	s := openSpool(t, "", meter.SpoolOptions{MaxPulls: 5})
	for _, p := range pulls[:7] {
		must(t, s.Add(p))
	}
	must(t, s.Add(pulls[7:]...))
	got, err := s.Oldest(100)
	must(t, err)
	if !slices.Equal(got, pulls[7:]) || s.Len() != 5 || s.Dropped() != 7 {
		t.Errorf("%d, %d dropped: %v", s.Len(), s.Dropped(), ids(got))
	}
}

func TestDamagedSpoolIsSetAside(t *testing.T) {
	for name, damage := range map[string]func(b []byte) []byte{
		"cut":      func(b []byte) []byte { return b[:len(b)/4] },
		"noise":    func(b []byte) []byte { return slices.Repeat([]byte("noise"), 10_000) },
		"row":      func(b []byte) []byte { return slices.Concat(b[:8192], slices.Repeat([]byte{0xff}, len(b)-8192)) },
		"another":  func([]byte) []byte { return ledgerFile(t) },
		"nonsense": func([]byte) []byte { return []byte("x") },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "spool.db")
			s := openSpool(t, path, meter.SpoolOptions{})
			must(t, s.Add(series(300)...))
			must(t, s.Close())
			whole, err := os.ReadFile(path)
			must(t, err)
			must(t, os.Remove(path)) // an old mapping must not see the new content
			must(t, os.WriteFile(path, damage(whole), 0o600))
			s = openSpool(t, path, meter.SpoolOptions{})
			if s.Len() != 0 {
				t.Errorf("%d pulls in a new spool", s.Len())
			}
			must(t, s.Add(series(3)...))
			if _, err := os.Stat(path + ".damaged"); err != nil {
				t.Error(err)
			}
		})
	}
}

func ledgerFile(t *testing.T) []byte {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l, err := meter.OpenLedger(path, meter.LedgerOptions{})
	must(t, err)
	must(t, l.Close())
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

// sink takes pulls as a test says.
type sink func(pulls []accel.Pull) error

func (s sink) ReportPulls(_ context.Context, pulls []accel.Pull) error { return s(pulls) }

// report runs a reporter in a bubble's time until the spool is empty.
func report(t *testing.T, s *meter.Spool, to meter.Sink) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- (&meter.Reporter{Spool: s, Sink: to}).Run(ctx) }()
	for range 1000 {
		if s.Len() == 0 {
			break
		}
		time.Sleep(time.Minute)
	}
	synctest.Wait()
	cancel()
	must(t, <-done)
	if s.Len() != 0 {
		t.Errorf("%d pulls still wait", s.Len())
	}
}

func TestReporterTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openSpool(t, "", meter.SpoolOptions{})
		pulls := series(1200)
		must(t, s.Add(pulls...))
		var asked []time.Time
		var taken []accel.Pull
		report(t, s, sink(func(batch []accel.Pull) error {
			asked = append(asked, time.Now())
			switch len(asked) {
			case 1:
				return errAway
			case 2:
				return accel.WithRetryAfter(errAway, time.Hour)
			case 3:
				taken = append(taken, batch...)
				return errors.New("the answer was lost") // so it comes again
			}
			taken = append(taken, batch...)
			return nil
		}))
		if asked[1].Sub(asked[0]) < 500*time.Millisecond || asked[2].Sub(asked[1]) < time.Hour {
			t.Errorf("asked at %v", asked)
		}
		if len(taken) != 1700 || !slices.Equal(taken[500:], pulls) || s.Dropped() != 0 {
			t.Errorf("%d taken, %d dropped", len(taken), s.Dropped())
		}
	})
}

func TestReporterDropsWhatIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openSpool(t, "", meter.SpoolOptions{})
		pulls := series(700)
		must(t, s.Add(pulls...))
		bad := []string{pulls[0].ID, pulls[333].ID, pulls[334].ID, pulls[699].ID}
		var taken []accel.Pull
		calls := 0
		report(t, s, sink(func(batch []accel.Pull) error {
			calls++
			for _, p := range batch {
				if slices.Contains(bad, p.ID) {
					return &meter.Refusal{ID: p.ID, Err: fmt.Errorf("%w: no", accel.ErrInvalid)}
				}
			}
			taken = append(taken, batch...)
			return nil
		}))
		if len(taken) != 696 || s.Dropped() != 4 || calls > 6 {
			t.Errorf("%d taken, %d dropped, %d calls", len(taken), s.Dropped(), calls)
		}
	})
}

// TestReporterKeepsWhatIsNotRefused: an answer that names no pull of the report says nothing about any.
func TestReporterKeepsWhatIsNotRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openSpool(t, "", meter.SpoolOptions{})
		pulls := series(700)
		must(t, s.Add(pulls...))
		var taken []accel.Pull
		wrong := []error{fmt.Errorf("%w: no", accel.ErrInvalid), &meter.Refusal{ID: idAt(noon), Err: accel.ErrInvalid}, accel.ErrForbidden, accel.ErrNotFound}
		report(t, s, sink(func(batch []accel.Pull) error {
			switch {
			case len(wrong) > 0:
				err := wrong[0]
				wrong = wrong[1:]
				return err
			case len(batch) > 100:
				return fmt.Errorf("%w: 413", meter.ErrTooLarge)
			}
			taken = append(taken, batch...)
			return nil
		}))
		if !slices.Equal(taken, pulls) || s.Dropped() != 0 {
			t.Errorf("%d taken, %d dropped", len(taken), s.Dropped())
		}
	})
}

// TestReporterLogsChanges: a line when the server goes away and one when it is back, whatever happens in between.
func TestReporterLogsChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openSpool(t, "", meter.SpoolOptions{})
		must(t, s.Add(series(10)...))
		log := &lines{}
		calls := 0
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- (&meter.Reporter{Spool: s, Log: slog.New(log), Sink: sink(func([]accel.Pull) error {
				if calls++; calls%20 != 0 {
					return errAway
				}
				return nil
			})}).Run(ctx)
		}()
		for outage := range 2 {
			time.Sleep(time.Hour)
			synctest.Wait()
			if got := log.take(slog.LevelInfo); len(got) != 2 || got[0].Level != slog.LevelWarn || got[1].Level != slog.LevelInfo || s.Len() != 0 {
				t.Errorf("outage %d: %v", outage, got)
			} else if n := attr(got[1], "failed_tries"); n.Int64() != 19 {
				t.Errorf("%s tries failed", n)
			}
			if got := log.take(slog.LevelDebug); len(got) != 18 {
				t.Errorf("%d lines in between", len(got))
			}
			must(t, s.Add(series(5)...))
		}
		cancel()
		must(t, <-done)
	})
}

func TestReporterWaitsForPulls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := openSpool(t, "", meter.SpoolOptions{})
		got := make(chan int, 10)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- (&meter.Reporter{Spool: s, Sink: sink(func(p []accel.Pull) error { got <- len(p); return nil })}).Run(ctx)
		}()
		for i := range 3 {
			must(t, s.Add(pullOf(noon.Add(time.Duration(i)*time.Second))))
			if n := <-got; n != 1 {
				t.Errorf("%d", n)
			}
		}
		cancel()
		must(t, <-done)
	})
}
