package ledger_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/internal/killtest"
	"accel/profile/ledger"

	"github.com/opencontainers/go-digest"
)

// The test binary runs itself again, to be killed.
const (
	roleVariable = "ACCEL_LEDGER_TEST_RUN"
	pathVariable = "ACCEL_LEDGER_TEST_PATH"
)

func digests(images []ledger.Image) (all []digest.Digest) {
	for _, i := range images {
		all = append(all, i.Digest)
	}
	return all
}

// beKilled takes reports and publishes without end, and says on standard output what was answered.
func beKilled(path, run string) {
	l, err := ledger.Open(path, ledger.Options{PublishEvery: time.Millisecond})
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
	part := func(path string) []accel.ProfileItem { return []accel.ProfileItem{{Path: path, Bytes: 10}} }
	for node := range 4 {
		go func() {
			for k := 0; ; k++ {
				name := fmt.Sprint(run, "-", k)
				if err := l.Learn(ctx, manifest(name), imageOf(name), layers, ledger.Given{Predicted: part("predicted")}); err != nil {
					panic(err)
				}
				if _, err := l.Report(ctx, report(name, node, fmt.Sprint("n", node), part("read"))); err != nil {
					panic(err)
				}
				say(name, node)
			}
		}()
	}
	go func() {
		for {
			p, err := l.NextPublication(ctx, nil)
			if err != nil {
				panic(err)
			}
			for n := range p.Places {
				p.Places[n].Artifact = p.Version
			}
			if err := l.Published(ctx, p); err != nil {
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

// killed kills a process that works on a ledger at random instants. What it had answered must
// be there, and all indexes must agree (Open sets the file aside where they do not).
func killed(t *testing.T, kills int) {
	path := filepath.Join(t.TempDir(), "profiles.db")
	said := map[string][]int{}
	reports := 0
	for run := range kills {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), roleVariable+"="+fmt.Sprint("run", run), pathVariable+"="+path)
		cmd.Stderr = os.Stderr
		for _, line := range killtest.Run(t, cmd, 200*time.Millisecond) {
			var name string
			var node int
			_, err := fmt.Sscan(line, &name, &node)
			must(t, err)
			said[name] = append(said[name], node)
			reports++
		}
	}
	l, err := ledger.Open(path, ledger.Options{})
	must(t, err)
	defer l.Close()
	if _, err := os.Stat(path + ".damaged"); err == nil {
		t.Fatal("a killed process leaves a damaged file")
	}
	for name, nodes := range said {
		encoded, _, err := l.Profile(t.Context(), manifest(name))
		must(t, err)
		if !strings.Contains(string(encoded), `"recorded"`) {
			t.Fatalf("%s was recorded, and has the profile %s", name, encoded)
		}
		for _, node := range nodes {
			receipt, err := l.Report(t.Context(), report(name, node, fmt.Sprint("n", node), nil))
			must(t, err)
			if !receipt.Duplicate {
				t.Fatalf("the report of node %d about %s was answered and is lost", node, name)
			}
		}
	}
	t.Logf("%d kills, %d images, %d reports answered", kills, len(said), reports)
}
