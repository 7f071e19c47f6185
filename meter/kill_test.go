package meter_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/meter"
)

// The test binary runs itself again, to be killed.
const (
	killPath = "ACCEL_METER_TEST_PATH"
	killRun  = "ACCEL_METER_TEST_RUN"
)

// beKilled is a node that spools and reports pulls without end, and its server. It says on
// standard output which were spooled.
func beKilled(dir, run string) {
	s, err := meter.OpenSpool(filepath.Join(dir, "spool.db"), meter.SpoolOptions{})
	if err != nil {
		panic(err)
	}
	l, err := meter.OpenLedger(filepath.Join(dir, "ledger.db"), meter.LedgerOptions{})
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	var mu sync.Mutex
	for sender := range 4 {
		go func() {
			for i := 0; ; i++ {
				p := pullOf(time.Now().UTC().Truncate(time.Millisecond), on(name("n", sender)), of(repository+":"+run), memory(int64(i%2)<<30))
				if err := s.Add(p); err != nil {
					panic(err)
				}
				mu.Lock()
				fmt.Println(p.ID)
				mu.Unlock()
			}
		}()
	}
	go func() {
		for { // the server's part of the house-keeping
			if err := l.Prune(ctx); err != nil {
				panic(err)
			}
		}
	}()
	panic((&meter.Reporter{Spool: s, Sink: into{l}}).Run(ctx))
}

// killed kills a node with its server so many times, while pulls go from the one to the other. Each
// spooled pull must be counted exactly once, and the sums must be those of the pulls.
func killed(t *testing.T, kills int) {
	dir := t.TempDir()
	spooled := map[string]bool{}
	for run := range kills {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), killPath+"="+dir, killRun+"="+name("run", run))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewReader(out)
		first, err := lines.ReadString('\n') // it is at work
		if err != nil {
			t.Fatalf("run %d: %v", run, err)
		}
		kill := time.AfterFunc(time.Duration(rand.IntN(80_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		rest, err := io.ReadAll(lines)
		kill.Stop()
		_ = cmd.Wait() // killed
		must(t, err)
		all := first + string(rest)
		for line := range strings.Lines(all[:strings.LastIndexByte(all, '\n')+1]) {
			spooled[strings.TrimSpace(line)] = true
		}
	}
	now := time.Now()
	l := openLedger(t, filepath.Join(dir, "ledger.db"), &now, meter.LedgerOptions{})
	s := openSpool(t, filepath.Join(dir, "spool.db"), meter.SpoolOptions{})
	waited := s.Len()
	for s.Len() > 0 {
		pulls, err := s.Oldest(500)
		must(t, err)
		add(t, l, pulls...)
		must(t, s.Ack(ids(pulls)...))
	}
	counted := map[string]int{}
	all := allPulls(t, l, meter.Filter{Limit: 1000})
	for _, p := range all {
		counted[p.ID]++
	}
	for id := range spooled {
		if counted[id] != 1 {
			t.Fatalf("pull %s was spooled and is counted %d times", id, counted[id])
		}
	}
	checkSums(t, l, all)
	t.Logf("%d kills, %d pulls spooled for sure, %d counted, %d waited at the end", kills, len(spooled), len(all), waited)
}

// checkSums compares usage with the single pulls.
func checkSums(t *testing.T, l *meter.Ledger, all []accel.Pull) {
	t.Helper()
	var bytes int64
	byImage := map[string]int64{}
	var seconds float64
	for _, p := range all {
		bytes += p.RegistryBytes
		byImage[p.Image]++
		seconds += p.Duration.Seconds()
	}
	u := usage(t, l, meter.Query{By: meter.ByImage})
	if u.Total.Pulls != int64(len(all)) || u.Total.RegistryBytes != bytes || u.Total.Seconds != seconds || len(u.Lines) != len(byImage) || u.Total.GBSecondsBilled != seconds {
		t.Errorf("%d pulls of %d bytes in %g s, but usage says %+v", len(all), bytes, seconds, u.Total)
	}
	for _, line := range u.Lines {
		if line.Pulls != byImage[line.Key] {
			t.Errorf("%d pulls of %s, but usage says %d", byImage[line.Key], line.Key, line.Pulls)
		}
	}
}

func TestKilledExactlyOnce(t *testing.T) { killed(t, 20) }

func TestKilledExactlyOnceLong(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("200 kills: make test-long")
	}
	killed(t, 200)
}
