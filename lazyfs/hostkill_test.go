package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"accel/internal/killtest"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// killSample is the layer that round's daemon mounts first; nothing of it is there then.
func killSample(round int) *sample { return newSample(uint64(1000+round), 30, 80<<10) }

func killTarget(dir string, round int) string {
	return filepath.Join(dir, "mnt", strconv.Itoa(round))
}

// killHost is the daemon of a round: it has the layers of all rounds until then.
func killHost(dir, store string, rounds int) (*Host, []*sample, error) {
	m := &memory{images: map[digest.Digest]*sample{}}
	m.before = func(ctx context.Context, _ *Layer, _, _ int) error {
		select {
		case <-time.After(rand.N(3 * time.Millisecond)):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	h, err := NewHost(Options{
		Dir: dir, Version: "v1", Holder: holderCommand(dir, "v1", holderTimes{}), Filler: m,
		HolderDied: func(d []digest.Digest) { panic(fmt.Sprint("dead: ", d)) },
		Log:        slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return nil, nil, err
	}
	var samples []*sample
	for round := range rounds {
		im := killSample(round)
		m.images[im.digest] = im
		samples = append(samples, im)
		if _, err := h.Add(im.digest, filesIn(store, im), nil); err != nil {
			return nil, nil, err
		}
	}
	return h, samples, nil
}

// beDaemon serves, mounts, completes and unmounts without end.
func beDaemon(args []string) {
	dir, store := args[0], args[1]
	rounds, err := strconv.Atoi(args[2])
	if err != nil {
		panic(err)
	}
	h, samples, err := killHost(dir, store, rounds)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	go func() { panic(h.Run(ctx)) }()
	<-h.adopted
	fmt.Println("at work")
	for round, im := range samples {
		if err := h.Mount(ctx, im.digest, killTarget(dir, round)); err != nil {
			panic(err)
		}
	}
	other := filepath.Join(dir, "mnt", "other")
	for {
		for _, im := range samples {
			l, _ := h.Layer(im.digest)
			if l.Complete() {
				if err := h.Complete(ctx, im.digest); err != nil && !errors.Is(err, ErrIncomplete) {
					panic(err)
				}
			}
			if err := l.Forget(rand.IntN(l.Len())); err != nil {
				panic(err)
			}
			if err := h.Unmount(ctx, other); err != nil {
				panic(err)
			}
			if err := h.Mount(ctx, im.digest, other); err != nil {
				panic(err)
			}
		}
	}
}

func TestDaemonKilled(t *testing.T) { daemonKilled(t, 10) }

func TestLongDaemonKilled(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("SKIPPED: set ACCEL_TEST_LONG=1 (make test-long) to kill 50 daemons")
	}
	daemonKilled(t, 50)
}

// daemonKilled kills daemon after daemon at any instant. Whoever reads notices nothing.
func daemonKilled(t *testing.T, rounds int) {
	b := newBed(t, nil)
	var readers sync.WaitGroup
	stop := make(chan struct{})
	walks := make([]int, rounds)
	for round := range rounds {
		im := killSample(round)
		im.store(t, b.store)
		target := killTarget(b.dir, round)
		if err := os.MkdirAll(target, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(b.dir, "mnt", "other"), 0o700); err != nil {
			t.Fatal(err)
		}
		readers.Go(func() { walks[round] = walkOn(t, im, target, stop) })
		daemon := exec.Command(os.Args[0], "be-daemon", b.dir, b.store, strconv.Itoa(round+1))
		daemon.Stderr = os.Stderr
		killtest.Run(t, daemon, 400*time.Millisecond)
	}
	// The last daemon is not killed.
	h, samples, err := killHost(b.dir, b.store, rounds)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	for round, im := range samples {
		if err := h.Mount(ctx, im.digest, killTarget(b.dir, round)); err != nil {
			t.Error(err)
		}
	}
	if err := h.Unmount(ctx, filepath.Join(b.dir, "mnt", "other")); err != nil {
		t.Error(err)
	}
	for round, im := range samples {
		if err := im.same(killTarget(b.dir, round)); err != nil {
			t.Error(round, err)
		}
		l, _ := h.Layer(im.digest)
		fillAll(t, l, im)
		if err := h.Complete(ctx, im.digest); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	readers.Wait()
	total := 0
	for _, n := range walks {
		total += n
	}
	t.Logf("%d daemons killed, %d files read meanwhile", rounds, total)
	mounts, err := h.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) != rounds {
		t.Errorf("%d mounts, not %d", len(mounts), rounds)
	}
	for _, m := range mounts {
		if m.Lazy {
			t.Errorf("%s is still lazy", m.Target)
		}
	}
	until(t, "the holder has nothing open", func() bool { return h.opens() == 0 })
	for round, im := range samples {
		if err := h.Unmount(ctx, killTarget(b.dir, round)); err != nil {
			t.Error(err)
		}
		if err := h.Remove(ctx, im.digest, nil); err != nil {
			t.Error(err)
		}
	}
	cancel()
	<-ended
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}

// walkOn reads files in no order and past the mount's page cache, from the moment it is mounted. It
// returns how many.
func walkOn(t *testing.T, im *sample, target string, stop chan struct{}) int {
	rng := rand.New(rand.NewPCG(uint64(len(target)), uint64(time.Now().UnixNano())))
	for n := 0; ; {
		select {
		case <-stop:
			return n
		default:
		}
		name := im.names[rng.IntN(len(im.names))]
		f, err := os.Open(filepath.Join(target, name))
		if errors.Is(err, os.ErrNotExist) && n == 0 { // not mounted yet
			time.Sleep(time.Millisecond)
			continue
		}
		if err == nil {
			err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
			f.Close()
		}
		if err == nil {
			err = im.sameFile(target, name)
		}
		if err != nil {
			t.Errorf("%s: %v", target, err)
			return n
		}
		n++
	}
}
