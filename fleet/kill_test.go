package fleet_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/fleet"
	"accel/internal/killtest"
)

// The test binary runs itself again, to be killed.
const (
	roleVariable = "ACCEL_FLEET_TEST_RUN"
	pathVariable = "ACCEL_FLEET_TEST_PATH"
)

// beKilled brings images to nodes without end, and says on standard output what was answered.
func beKilled(path, run string) {
	f, err := fleet.Open(path, fleet.Options{Rules: everything()})
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	var mu sync.Mutex
	say := func(words ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(words...)
	}
	for i := range 4 {
		name := fmt.Sprint("n", i)
		n := node(name)
		n.StartedAt = time.Now()
		if _, err := f.Seen(ctx, n); err != nil {
			panic(err)
		}
		go func() { // the node
			for {
				warms, err := f.Next(ctx, name, time.Hour)
				if err != nil {
					panic(err)
				}
				for _, w := range warms {
					w.State = accel.WarmFetching
					_, err := f.Report(ctx, w)
					if errors.Is(err, accel.ErrConflict) {
						continue // it gave way to newer ones
					}
					if err == nil {
						w.State = accel.WarmDone
						_, err = f.Report(ctx, w)
					}
					if err != nil {
						panic(err)
					}
					say("done", w.ID)
				}
			}
		}()
		go func() { // persons
			for k := 0; ; k++ {
				r := accel.Reference{Registry: "registry.test", Repository: "wish", Tag: fmt.Sprint(run, "-", name, "-", k)}
				warms, err := f.Want(ctx, r, []string{name})
				if err != nil {
					panic(err)
				}
				say("asked", warms[0].ID)
			}
		}()
	}
	go func() { // the registry
		for k := 0; ; k++ {
			rec := accel.Record{Repository: repository, Digest: source(fmt.Sprint(run, k)), Tags: []string{fmt.Sprint("v", k%7)}, State: accel.Ready, UpdatedAt: time.Now()}
			if err := f.Ready(ctx, rec); err != nil {
				panic(err)
			}
			if err := f.SetPosition(ctx, uint64(k)+1); err != nil {
				panic(err)
			}
		}
	}()
	select {}
}

func TestKilled(t *testing.T) { killed(t, 20) }

func TestKilledLong(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("200 kills run in make test-long (ACCEL_TEST_LONG=1); 20 run always")
	}
	killed(t, 200)
}

// killed kills a process that works on a fleet at random instants. What it had answered must
// be there, and all indexes must agree (Open sets the file aside where they do not).
func killed(t *testing.T, kills int) {
	path := filepath.Join(t.TempDir(), "fleet.db")
	saidOf := map[string]string{}
	for run := range kills {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"="+fmt.Sprint("run", run), pathVariable+"="+path)
		cmd.Stderr = os.Stderr
		for _, line := range killtest.Run(t, cmd, 80*time.Millisecond) {
			what, id, _ := strings.Cut(line, " ")
			if saidOf[id] != "done" {
				saidOf[id] = what
			}
		}
		checkSaid(t, path, saidOf)
	}
	t.Logf("%d kills, %d warms answered", kills, len(saidOf))
}

func checkSaid(t *testing.T, path string, saidOf map[string]string) {
	t.Helper()
	f, err := fleet.Open(path, fleet.Options{})
	must(t, err)
	defer f.Close()
	if _, err := os.Stat(path + ".damaged"); err == nil {
		t.Fatal("a killed process leaves a damaged file")
	}
	have := map[string]accel.Warm{}
	for sel := (fleet.Filter{Limit: 500}); ; {
		page, err := f.Warms(t.Context(), sel)
		must(t, err)
		for _, w := range page.Warms {
			have[w.ID] = w
		}
		if sel.Cursor = page.Next; sel.Cursor == "" {
			break
		}
	}
	for id, what := range saidOf {
		w, ok := have[id]
		if !ok {
			t.Fatalf("%s was %s and is lost", id, what)
		}
		if what == "done" && w.State != accel.WarmDone {
			t.Fatalf("%s was said to be there and is %s", w.Image, w.State)
		}
	}
}
