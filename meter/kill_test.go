package meter_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/internal/killtest"
	"accel/meter"
)

// The test binary runs itself again, to be killed.
const (
	killPath = "ACCEL_METER_TEST_PATH"
	killFold = "ACCEL_METER_TEST_FOLD"
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
		for _, id := range runAndKill(t, killPath+"="+dir, killRun+"="+name("run", run)) {
			spooled[id] = true
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

// runAndKill runs this binary with an environment, kills it at some instant, and returns the lines that it said.
func runAndKill(t *testing.T, env ...string) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	return killtest.Run(t, cmd, 80*time.Millisecond)
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

// beKilledFolding is a server that folds days, and is told of late pulls of folded days and new ones meanwhile. It
// says on standard output which it has.
func beKilledFolding(dir, run string) {
	day, err := strconv.Atoi(run)
	if err != nil {
		panic(err)
	}
	now := noon.AddDate(0, 0, day)
	l, err := meter.OpenLedger(filepath.Join(dir, "ledger.db"), meter.LedgerOptions{KeepPulls: apart, KeepDetail: aDay, Now: func() time.Time { return now }})
	if err != nil {
		panic(err)
	}
	l.FoldBy(5)
	go func() {
		for i := 0; ; i++ {
			p := pullOf(now.AddDate(0, 0, -i%3*5), of(repository+":"+name("v", i%9)), by(name("t", i%4)))
			if _, err := l.Add(context.Background(), []accel.Pull{p}); err != nil {
				panic(err)
			}
			fmt.Println(p.ID)
		}
	}()
	for {
		if err := l.Prune(context.Background()); err != nil {
			panic(err)
		}
	}
}

// killedFolding kills a server so many times while it folds. Each pull must be counted exactly once, and the folded sums be
// those of the pulls.
func killedFolding(t *testing.T, kills int) {
	dir := t.TempDir()
	now := noon.AddDate(0, 0, kills+40)
	path := filepath.Join(dir, "ledger.db")
	l := openLedger(t, path, &now, meter.LedgerOptions{KeepPulls: apart})
	add(t, l, manyDays(rand.New(rand.NewPCG(9, 9)), kills+20, 60)...)
	must(t, l.Close())
	said := map[string]bool{}
	folds := 0
	for run := range kills {
		before := rowsOf(t, path)
		for _, id := range runAndKill(t, killFold+"="+dir, killRun+"="+strconv.Itoa(run+20)) {
			said[id] = true
		}
		if rowsOf(t, path) < before {
			folds++
		}
	}
	l = openLedger(t, path, &now, meter.LedgerOptions{KeepPulls: apart, KeepDetail: aDay})
	whole := openLedger(t, "", &now, meter.LedgerOptions{KeepPulls: apart, KeepDetail: apart})
	all := allPulls(t, l, meter.Filter{Limit: 1000})
	for batch := range slices.Chunk(all, 1000) {
		add(t, whole, batch...)
	}
	for _, p := range all {
		delete(said, p.ID)
	}
	if len(said) > 0 || len(all) < (kills+20)*60 {
		t.Errorf("%d pulls are lost, %d are there", len(said), len(all))
	}
	for range 2 { // in the middle, and when all is folded
		for _, what := range []string{meter.ByImage, meter.ByTenant, meter.ByNode, meter.ByDay} {
			q := meter.Query{By: what}
			if got, want := comparable(usage(t, l, q), true), comparable(usage(t, whole, q), true); !reflect.DeepEqual(got, want) {
				t.Fatalf("by %s: %+v\nwant %+v", what, got, want)
			}
		}
		must(t, l.Prune(t.Context()))
	}
	t.Logf("%d kills, %d of them after something was folded, %d pulls", kills, folds, len(all))
	if folds == 0 {
		t.Error("nothing was folded before a kill")
	}
}

// rowsOf counts the roll-ups of a ledger that nobody has open.
func rowsOf(t *testing.T, path string) int {
	l, err := meter.OpenLedger(path, meter.LedgerOptions{})
	must(t, err)
	n, err := l.Rows()
	must(t, errors.Join(err, l.Close()))
	return n
}

func TestKilledFolding(t *testing.T) { killedFolding(t, 20) }

func TestKilledFoldingLong(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("200 kills: make test-long")
	}
	killedFolding(t, 200)
}
