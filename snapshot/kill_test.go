package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"accel/internal/killtest"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	killImages = 6
	// killWithin is long enough for a start and some hundred calls.
	killWithin = 400 * time.Millisecond
)

// killLayers are the layers of image i: two that all images have, and one of its own. The
// directory's order is the same for both processes.
func killLayers(dir string, i int) []digest.Digest {
	entries, err := os.ReadDir(dir)
	if err != nil {
		panic(err)
	}
	var all []digest.Digest
	for _, e := range entries {
		all = append(all, digest.NewDigestFromEncoded(digest.SHA256, e.Name()))
	}
	return []digest.Digest{all[0], all[1], all[2+i]}
}

// beKilled starts as a node does, pulls, runs and removes without end, and says what is durable.
func beKilled(dir string) {
	fmt.Println("at work")
	ctx := context.Background()
	layers, held := &trees{dir: filepath.Join(dir, "layers")}, &pins{dir: filepath.Join(dir, "pins")}
	s, err := Open(ctx, Options{Dir: filepath.Join(dir, "s"), Images: layers, Mounts: layers, Pins: held, Log: slog.New(slog.DiscardHandler), Limit: time.Minute})
	if err == nil {
		err = errors.Join(held.equalise(s.Owners()), s.Restore(ctx))
	}
	if err != nil {
		panic(err)
	}
	for i := range killImages {
		go func() { panic(s.beUsed(ctx, layers.dir, i)) }()
	}
	select {}
}

// beUsed pulls an image, starts a container on it, and removes both, again and again.
func (s *Snapshotter) beUsed(ctx context.Context, dir string, image int) error {
	layers := killLayers(dir, image)
	for round := 0; ; round++ {
		parent := ""
		for i := range layers {
			key := fmt.Sprintf("extract-%d-%d-%d-%d", os.Getpid(), image, round, i)
			_, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(labelsOf(fmt.Sprint("image", image), layers, i)))
			if errdefs.IsNotFound(err) && i > 0 { // another image's goroutine has just removed what both have
				break
			}
			if !errdefs.IsAlreadyExists(err) {
				return fmt.Errorf("image %d, layer %d: %w", image, i, err)
			}
			parent = chain(layers, i)
		}
		if parent != chain(layers, len(layers)-1) {
			continue
		}
		fmt.Println("there", parent)
		key := fmt.Sprintf("container-%d-%d-%d", os.Getpid(), image, round)
		if _, err := s.Prepare(ctx, key, parent); err != nil {
			return fmt.Errorf("container: %w", err)
		}
		if err := s.Remove(ctx, key); err != nil {
			return err
		}
		if rand.IntN(3) == 0 {
			continue
		}
		fmt.Println("removing", parent)
		for i := len(layers) - 1; i >= 0; i-- {
			if err := s.Remove(ctx, chain(layers, i)); err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
}

func TestKilled(t *testing.T) { killLoop(t, 10) }

func TestLongKilled(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("SKIPPED here: the long kill loop runs in `make test-long`")
	}
	killLoop(t, 200)
}

// killLoop kills a process that uses a snapshotter at random instants, sometimes with a reboot after it.
// Then metastore, directories, mounts and pins have to agree, and what was said to be there has to be.
func killLoop(t *testing.T, kills int) {
	b := newBed(t)
	for i := range killImages + 2 {
		b.layers.add(t, map[string]string{fmt.Sprint("file", i): fmt.Sprint("content", i)})
	}
	said, kept := 0, 0
	for run := range kills {
		b.check(b.Close())
		if run%5 == 4 {
			b.unmountAll()
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env, cmd.Stderr = append(os.Environ(), roleVariable+"="+b.dir), os.Stderr
		last := map[string]string{}
		for _, line := range killtest.Run(t, cmd, killWithin) {
			if what, name, ok := strings.Cut(line, " "); ok && what != "at" {
				last[name] = what
				said++
			}
		}
		b.open()
		b.consistent()
		if bad := b.Bad(); len(bad) > 0 {
			t.Errorf("bad are %+v", bad)
		}
		for name, what := range last {
			if what != "there" {
				continue
			}
			m, err := b.Prepare(b.ctx, "check", name)
			if err != nil {
				t.Errorf("run %d: %s was said to be there: %v", run, name, err)
				continue
			}
			kept++
			for _, l := range b.layersOf(parentsOf(b, "check")) {
				entries, err := os.ReadDir(b.layers.tree(l))
				b.check(err)
				file := entries[0].Name()
				if got := b.mounted(m, file); got != strings.Replace(file, "file", "content", 1) {
					t.Errorf("%s reads %q", file, got)
				}
			}
			b.check(b.Remove(b.ctx, "check"))
		}
		// What containerd would take away, as nobody's: else no image could be removed any more.
		var left []string
		b.check(b.Walk(b.ctx, func(_ context.Context, i snapshots.Info) error {
			if i.Kind == snapshots.KindActive {
				left = append(left, i.Name)
			}
			return nil
		}))
		for _, key := range left {
			b.check(b.Remove(b.ctx, key))
		}
		if t.Failed() {
			t.Fatalf("in run %d", run)
		}
	}
	t.Logf("%d kills; %d answers were seen, %d images were there at a kill and read right after it", kills, said, kept)
	if said == 0 {
		t.Error("the kills left nothing to look at")
	}
}

// parentsOf are the IDs of what is below a snapshot.
func parentsOf(b *bed, key string) []string {
	b.Helper()
	var ids []string
	for name := key; ; {
		info, err := b.Stat(b.ctx, name)
		b.check(err)
		if info.Parent == "" {
			return ids
		}
		name = info.Parent
		for _, l := range b.Lazy() {
			if r := b.remote(l.ID); r.name == name {
				ids = append(ids, l.ID)
			}
		}
	}
}
