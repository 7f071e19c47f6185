package lazyfs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
)

// peers are both ends of a connection; each answers as its handler says.
func peers(t *testing.T, a, b func(context.Context, message) (message, bool)) (*peer, *peer) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := listenAt(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	p, q := newPeer(near), newPeer(far)
	var serving sync.WaitGroup
	serving.Go(func() { p.serve(context.Background(), a) })
	serving.Go(func() { q.serve(context.Background(), b) })
	t.Cleanup(func() { p.close(); q.close(); serving.Wait() })
	return p, q
}

func TestPeersAskEachOther(t *testing.T) {
	echo := func(_ context.Context, m message) (message, bool) { return message{First: m.First + 1}, true }
	p, q := peers(t, echo, echo)
	var all sync.WaitGroup
	for i := range 200 {
		for _, from := range []*peer{p, q} {
			all.Go(func() {
				a, err := from.ask(t.Context(), message{Kind: askFill, First: i})
				if err != nil || a.First != i+1 {
					t.Error(a, err)
				}
			})
		}
	}
	all.Wait()
}

func TestPeerErrors(t *testing.T) {
	refusal := errors.New("some reason")
	p, q := peers(t, nil, func(_ context.Context, m message) (message, bool) {
		switch m.Kind {
		case askAdd:
			return refuse(errors.Join(ErrInUse, refusal)), true
		case askRemove:
			return refuse(refusal), true
		}
		return message{}, false // never answered
	})
	if _, err := p.ask(t.Context(), message{Kind: askAdd}); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
	if _, err := p.ask(t.Context(), message{Kind: askRemove}); err == nil || errors.Is(err, ErrInUse) {
		t.Error(err)
	}
	if _, err := p.ask(t.Context(), message{Kind: askFill, Layers: make([]heldLayer, maxMessageBytes/40)}); err == nil {
		t.Error("a message without bound")
	}
	got := make(chan error, 1)
	go func() { _, err := p.ask(t.Context(), message{Kind: askFill}); got <- err }()
	q.close()
	if err := <-got; !errors.Is(err, errGone) {
		t.Error(err)
	}
	if _, err := p.ask(t.Context(), message{Kind: askFill}); !errors.Is(err, errGone) {
		t.Error(err)
	}
}

func TestPeerCancels(t *testing.T) {
	working, canceled := make(chan struct{}), make(chan struct{})
	p, _ := peers(t, nil, func(ctx context.Context, m message) (message, bool) {
		close(working)
		<-ctx.Done()
		close(canceled)
		return message{}, true
	})
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 1)
	go func() { _, err := p.ask(ctx, message{Kind: askFill}); got <- err }()
	<-working
	cancel()
	<-canceled
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A holder's answers to questions that no daemon of ours asks.
func TestHolderRefuses(t *testing.T) {
	h := &holder{o: HolderOptions{Version: "v1"}, shelf: newShelf(func(digest.Digest) {}), back: make(chan struct{}), wake: make(chan struct{}, 1)}
	for _, m := range []message{
		{Kind: "nonsense"}, {Kind: askRemove, Digest: "x"}, {Kind: askAdd, Layers: make([]heldLayer, 1)}, {Kind: askAdd}, {Kind: askAdd, Layers: make([]heldLayer, 2)},
		{Kind: askAdd, Layers: []heldLayer{{Digest: digest.FromString("x"), Table: os.DevNull, Data: os.DevNull, Bits: os.DevNull}}},
	} {
		if a := h.answer(nil, m); a.err() == nil {
			t.Errorf("%+v", m)
		}
	}
	if a := h.answer(nil, message{Kind: askRemove, Digest: digest.FromString("unknown")}); a.err() != nil {
		t.Error(a.err())
	}
}

func FuzzReceive(f *testing.F) {
	frame := func(body string) []byte {
		return append(binary.LittleEndian.AppendUint32(nil, uint32(len(body))), body...)
	}
	f.Add(frame(`{"kind":"fill","id":1,"digest":"sha256:00","first":1,"n":2}`))
	f.Add(frame(`{"kind":"hello","layers":[{"digest":"x"}]}`))
	f.Add(frame(`{`))
	f.Add([]byte{255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bufio.NewReader(bytes.NewReader(b))
		for {
			if _, err := receive(in); err != nil {
				return
			}
		}
	})
}
