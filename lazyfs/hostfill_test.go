package lazyfs

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A fill that fails, or brings other bytes, is EIO for that read; the next may do better.
func TestFailedFill(t *testing.T) {
	im := newSample(20, 30, 300<<10)
	b := newBed(t, nil).start(im)
	target := b.mount(im, "a")
	faults := map[string]func(context.Context, *Layer, int, int) error{
		"error":         func(context.Context, *Layer, int, int) error { return errors.New("registry is down") },
		"wrong bytes":   func(_ context.Context, l *Layer, i, _ int) error { return l.Put(i, make([]byte, l.Chunk(i).Bytes)) },
		"too few bytes": func(_ context.Context, l *Layer, i, _ int) error { return l.Put(i, im.chunks[i][1:]) },
		"no such chunk": func(_ context.Context, l *Layer, i, _ int) error { return l.Put(l.Len(), im.chunks[i]) },
	}
	for name, fault := range faults {
		b.memory.fault(fault)
		if err := im.sameFile(target, im.names[3]); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %v", name, err)
		}
	}
	l, _ := b.Layer(im.digest)
	if l.Left() != l.Len() {
		t.Errorf("%d chunks count as there", l.Len()-l.Left())
	}
	b.memory.fault(nil)
	if err := im.same(target); err != nil {
		t.Error("after the faults:", err)
	}
}

// liar answers every Fill with nil and brings nothing.
type liar struct{ asked atomic.Int64 }

func (f *liar) Fill(context.Context, *Layer, int, int) error { f.asked.Add(1); return nil }

func TestFillerThatLies(t *testing.T) {
	im := newSample(21, 5, 1000)
	lies := &liar{}
	b := newBed(t, func(o *Options) { o.Filler = lies }).start(im)
	if err := im.sameFile(b.mount(im, "a"), im.names[0]); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if lies.asked.Load() == 0 {
		t.Error("never asked")
	}
}

// With the daemon away reads wait for Patience, and what is there is read as ever.
func TestPatience(t *testing.T) {
	im := newSample(22, 20, 1000)
	b := newBed(t, nil)
	b.options.Holder = holderCommand(b.dir, "v1", holderTimes{Patience: 300 * time.Millisecond})
	b.start(im)
	target := b.mount(im, "a")
	if err := im.sameFile(target, im.names[0]); err != nil {
		t.Fatal(err)
	}
	b.stop()
	for range 3 {
		if err := im.sameFile(target, im.names[1]); !errors.Is(err, unix.EIO) {
			t.Error("a miss without a daemon:", err)
		}
		if err := im.sameFile(target, im.names[0]); err != nil {
			t.Error("what is there:", err)
		}
	}
	if log, err := os.ReadFile(filepath.Join(b.dir, "v1.log")); err != nil || strings.Count(string(log), "fail until") != 1 {
		t.Errorf("not said once: %v\n%s", err, log)
	}
	b.start(im)
	<-b.adopted // which may take longer than what is left of the patience
	if err := im.same(target); err != nil {
		t.Error("with a daemon again:", err)
	}
}

// A fill without end is given up.
func TestFillLimit(t *testing.T) {
	im := newSample(23, 5, 1000)
	b := newBed(t, nil)
	b.options.Holder = holderCommand(b.dir, "v1", holderTimes{FillLimit: 200 * time.Millisecond})
	b.start(im)
	canceled := make(chan struct{}, 100)
	b.memory.fault(func(ctx context.Context, _ *Layer, _, _ int) error {
		<-ctx.Done() // the daemon is told that nobody waits any more
		canceled <- struct{}{}
		return ctx.Err()
	})
	if err := im.sameFile(b.mount(im, "a"), im.names[0]); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	<-canceled
}

// An answer that the device does not take is EIO for whoever waits for it, not silence.
func TestAnswerThatIsNotTaken(t *testing.T) {
	im := sampleOf(32, map[string][]byte{"file": bytesOf(32, 200<<10)})
	l := openSample(t, im, nil)
	fillAll(t, l, im)
	data, err := os.Open(l.files.Data)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	// Datagrams of more than some KiB do not fit into the socket, whether they are spliced or written.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer closeFD(pair[0])
	defer closeFD(pair[1])
	if err := unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_SNDBUF, 4096); err != nil {
		t.Fatal(err)
	}
	f := &fuseServer{dev: pair[0], log: slog.New(slog.DiscardHandler)}
	defer f.pipes.close()
	file := &held{data: data}
	for unique, answer := range map[uint64]func(unique uint64) error{
		7: func(unique uint64) error { return f.splice(unique, file, 0, 100<<10) },
		8: func(unique uint64) error { return f.copy(unique, file, 0, 100<<10) },
	} {
		if err := answer(unique); err != nil {
			t.Error(err)
		}
		got, want := make([]byte, 200<<10), make([]byte, outHeaderBytes)
		putOutHeader(want, unique, 0, unix.EIO)
		for { // what of the splice went into a datagram of its own
			n, _, err := unix.Recvfrom(pair[1], got, unix.MSG_DONTWAIT)
			if err != nil {
				t.Fatalf("request %d is not answered: %v", unique, err)
			}
			if bytes.Equal(got[:n], want) {
				break
			}
		}
	}
}
