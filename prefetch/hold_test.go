package prefetch

import (
	"context"
	"testing"
	"time"
)

// TestHeldLayersWaitForTheHotSet: what is held is not begun by the background, so that the hot set comes first and by requests
// of its own; then all comes.
func TestHeldLayersWaitForTheHotSet(t *testing.T) {
	b := start(t, Options{})
	one := build(t, random(7), shape{members: 400, most: 60_000})
	requested := make(chan [2]int64, 1000)
	memory, _, done := b.add(one, func(l *Layer) {
		l.Held = true
		reg := l.Source.(*registry)
		l.Source = sourceFunc(func(ctx context.Context, offset, length int64) (answerBody, error) {
			requested <- [2]int64{offset, length}
			body, err := reg.Range(ctx, offset, length)
			return answerBody{body}, err
		})
	})
	// A miss is served, held or not.
	if err := b.Fill(t.Context(), one.digest, 0, 1); err != nil {
		t.Fatal(err)
	}
	left := memory.Left()
	var pieces []Piece
	for i := 100; i < 400; i += 30 {
		pieces = append(pieces, Piece{one.digest, i, 1})
	}
	if err := b.Hot(t.Context(), pieces); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the hot set", func() bool { return b.Stats(one.digest).HotLeft == 0 })
	time.Sleep(20 * time.Millisecond) // were the background at work, it would begin something
	if s := b.sums(); s.background > 0 || memory.Left() == 0 || memory.Left() >= left {
		t.Errorf("%d chunks are left of %d, %+v", memory.Left(), left, s)
	}
	b.Release(one.digest)
	<-done
	if s := b.sums(); s.background == 0 || memory.Left() != 0 {
		t.Errorf("after its release: %+v", s)
	}
	b.Release(one.digest) // complete, and again
	b.Remove(one.digest)
	b.Release(one.digest)
}

// TestBackgroundLeavesTheHotSetToItself: no request of the background takes part of a hot set along that is not begun yet.
func TestBackgroundLeavesTheHotSetToItself(t *testing.T) {
	b := start(t, Options{})
	one := build(t, random(8), shape{members: 600, most: 60_000})
	ready := make(chan struct{})
	_, _, done := b.add(one, func(l *Layer) {
		l.Held = true
		reg := l.Source.(*registry)
		l.Source = sourceFunc(func(ctx context.Context, offset, length int64) (answerBody, error) {
			select {
			case <-ready:
			case <-ctx.Done():
				return answerBody{}, ctx.Err()
			}
			body, err := reg.Range(ctx, offset, length)
			return answerBody{body}, err
		})
	})
	var pieces []Piece
	for i := 0; i < 600; i += 7 { // more than one epoch
		pieces = append(pieces, Piece{one.digest, i, 1})
	}
	if err := b.Hot(t.Context(), pieces); err != nil {
		t.Fatal(err)
	}
	b.Release(one.digest)
	close(ready)
	<-done
	// All members that are hot came as such; bridges between them are counted with them.
	var hotBytes int64
	for _, p := range pieces {
		hotBytes += one.chunks[p.First].BlobBytes
	}
	if s := b.sums(); s.hot < hotBytes {
		t.Errorf("of %d hot bytes %d came as such: %+v", hotBytes, s.hot, s)
	}
}

// TestBackgroundWaitsForAStartThatHasAll: when all that was foretold is here the background still waits, until something
// else is missed.
func TestBackgroundWaitsForAStartThatHasAll(t *testing.T) {
	b := start(t, Options{})
	one := build(t, random(9), shape{members: 200, most: 60_000})
	memory, _, done := b.add(one, func(l *Layer) { l.Held = true })
	if err := b.Hot(t.Context(), []Piece{{one.digest, 20, 10}}); err != nil {
		t.Fatal(err)
	}
	b.Release(one.digest)
	eventually(t, "the hot set", func() bool { return b.Stats(one.digest).HotLeft == 0 })
	time.Sleep(20 * time.Millisecond) // were the background at work, it would begin something
	if s := b.sums(); s.background > 0 {
		t.Errorf("%+v", s)
	}
	b.fill(one, 25, 1) // it is there: no miss
	time.Sleep(20 * time.Millisecond)
	if s := b.sums(); s.background > 0 || s.misses > 0 {
		t.Errorf("%+v", s)
	}
	b.fill(one, 150, 1)
	<-done
	if s := b.sums(); s.background == 0 || memory.Left() > 0 {
		t.Errorf("after a miss of something else: %+v, %d chunks left", s, memory.Left())
	}
}
