package boltstore_test

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
	"accel/readiness"
	"accel/readiness/boltstore"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

// The test binary runs itself again in these roles.
const (
	roleVariable = "ACCEL_BOLTSTORE_TEST_ROLE" // "killed" or "resident"
	pathVariable = "ACCEL_BOLTSTORE_TEST_PATH"
	nameVariable = "ACCEL_BOLTSTORE_TEST_NAME"
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "killed":
		beKilled(os.Getenv(pathVariable), os.Getenv(nameVariable))
	case "resident":
		beResident(os.Getenv(pathVariable))
	default:
		goleak.VerifyTestMain(m)
	}
}

func role(ctx context.Context, name, path, run string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+name, pathVariable+"="+path, nameVariable+"="+run)
	cmd.Stderr = os.Stderr
	return cmd
}

// beKilled pushes and converts without end, and says on standard output what was answered.
func beKilled(path, run string) {
	s, err := boltstore.Open(path)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	tr := readiness.New(s, readiness.Options{LeaseTime: 10 * time.Millisecond, MaxAttempts: 1000})
	var mu sync.Mutex
	say := func(what string, d digest.Digest) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf("%s %s\n", what, d)
	}
	for sender := range 8 {
		go func() {
			for i := 0; ; i++ {
				d := digest.FromString(fmt.Sprint(run, sender, i))
				if _, err := tr.Push(ctx, pushEvent(fmt.Sprint("t", sender, "-", i/2), d)); err != nil {
					panic(err)
				}
				say("pushed", d)
			}
		}()
	}
	for range 4 {
		go func() {
			for {
				w, err := tr.Claim(ctx)
				if err != nil {
					panic(err)
				}
				err = tr.Finish(ctx, w, accel.Target{Repository: w.Repository, Digest: w.Digest}, accel.Result{}, map[digest.Digest][]byte{w.Digest: []byte("m")})
				if err == nil { // else it was superseded
					say("ready", w.Digest)
				}
			}
		}()
	}
	select {}
}

// TestKilled kills a process that pushes and converts at random instants. What it had answered
// must be there, and all indexes must agree.
func TestKilled(t *testing.T) {
	const kills = 20
	path := filepath.Join(t.TempDir(), "records.db")
	said := map[digest.Digest]string{}
	for run := range kills {
		cmd := role(t.Context(), "killed", path, fmt.Sprint("run", run, "-"))
		for _, line := range killtest.Run(t, cmd, 80*time.Millisecond) {
			what, d, _ := strings.Cut(line, " ")
			if said[digest.Digest(d)] != "ready" {
				said[digest.Digest(d)] = what
			}
		}
		checkSaid(t, path, said)
	}
	t.Logf("%d kills, %d pushes answered", kills, len(said))
}

func checkSaid(t *testing.T, path string, said map[digest.Digest]string) {
	t.Helper()
	s, err := boltstore.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	tr := readiness.New(s, readiness.Options{})
	for d, what := range said {
		st, err := tr.Find(t.Context(), accel.Reference{Registry: "registry.example", Repository: "team/app", Digest: d})
		if err != nil {
			t.Fatalf("lost after %q: %v", what, err)
		}
		if what == "ready" && st.State != accel.Ready {
			t.Fatalf("%s was said to be Ready and is %s", d, st.State)
		}
	}
}
