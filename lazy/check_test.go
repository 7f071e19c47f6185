package lazy

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"accel/snapshot"

	"github.com/opencontainers/go-digest"
)

// lying makes images say another DiffID of a layer than it has.
func (y blob) lying() blob {
	y.claimed = digest.FromString("what somebody else's layer has")
	return y
}

// TestLiesAreRememberedForGood: a lie that was found cannot be told again, whoever tells it, whatever of the layer
// is still here.
func TestLiesAreRememberedForGood(t *testing.T) {
	b := newBed(t)
	layer := b.layerWith("file", []byte("content"))
	liar := b.push("team/liar", true, layer.lying())
	if err := b.ask(liar); err != nil {
		t.Fatal("nobody knows yet:", err)
	}
	b.until("the lie is found", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return slices.Contains(b.aside, asideOf(layer.digest, liar.chains[0]))
	})
	b.requireDeclined(b.ask(liar), "has DiffID")
	b.requireDeclined(b.ask(b.push("team/liar2", true, layer.lying(), b.layerWith("more", nil))), "has DiffID")
	if err := b.ask(b.push("team/honest", true, layer)); err != nil {
		t.Error("who says the truth of the same layer:", err)
	}

	b.start(nil)
	b.requireDeclined(b.ask(liar), "has DiffID")

	b.stop() // and everything else about the layer is lost
	for _, lost := range []string{"cache", "lazy/origins"} {
		must(t, os.RemoveAll(b.dir+"/"+lost))
	}
	b.start(nil)
	b.requireDeclined(b.ask(liar), "has DiffID")
	if err := b.ask(b.push("team/honest", true, layer)); err != nil {
		t.Error("who says the truth of the same layer:", err)
	}
}

// TestLieFoundBetweenAnswerAndMount: containerd was told yes, the lie was found, and then the snapshot was made.
func TestLieFoundBetweenAnswerAndMount(t *testing.T) {
	b := newBed(t)
	layer := b.layerWith("file", []byte("content"))
	liar := b.push("team/liar", true, layer.lying())
	must(t, b.ask(liar))
	want := asideOf(layer.digest, liar.chains[0])
	times := func() (n int) {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, c := range b.aside {
			if c == want {
				n++
			}
		}
		return n
	}
	b.until("the lie is found", func() bool { return times() > 0 })
	before := times()
	b.lazy.Observe(snapshot.Event{Kind: snapshot.KindMounted, Request: liar.request(0), Layer: layer.digest})
	b.until("the new snapshot is set aside too", func() bool { return times() > before })
}

// TestSetAsideIsTriedAgain: what the store of snapshots refuses is not forgotten.
func TestSetAsideIsTriedAgain(t *testing.T) {
	b := newBed(t)
	layer := b.layerWith("file", []byte("content"))
	liar := b.push("team/liar", true, layer.lying())
	b.mu.Lock()
	b.broken = errors.New("the disk is full")
	b.mu.Unlock()
	must(t, b.ask(liar))
	b.until("SetAside was refused", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.calls > 0
	})
	b.requireDeclined(b.ask(liar), "has DiffID")
	b.mu.Lock()
	b.broken = nil
	b.mu.Unlock()
	must(t, b.lazy.checkClaims(t.Context(), layer.digest))
	if len(b.lazy.claimed()) > 0 {
		t.Error("its claims are still to be compared")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Contains(b.aside, asideOf(layer.digest, liar.chains[0])) {
		t.Error("its snapshot is not set aside")
	}
}

func TestDues(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	complete, partial := digest.FromString("complete"), digest.FromString("partial")
	q := dues{}
	claimed := map[digest.Digest]bool{complete: true, partial: false}
	if these := q.now(now, claimed); len(these) != 1 || these[0] != complete {
		t.Errorf("due at once: %v", these)
	}
	if q.failed(complete, now) != checkAgain || !q.putOff(complete, now) || q.putOff(complete, now.Add(checkAgain)) {
		t.Error("after a failure it is not put off for a minute")
	}
	if these := q.now(now, claimed); len(these) > 0 {
		t.Errorf("due after a failure: %v", these)
	}
	for range 10 {
		q.failed(complete, now)
	}
	if q.failed(complete, now) != checkAgainMost {
		t.Errorf("put off for %s", q[complete].pause)
	}
	if these := q.now(now.Add(claimTime), claimed); len(these) != 1 || these[0] != partial {
		t.Errorf("a layer that does not become complete is not checked in the end: %v", these)
	}
	if q.now(now, nil); len(q) > 0 {
		t.Errorf("layers that are closed are remembered: %v", q)
	}
}
