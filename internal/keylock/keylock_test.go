package keylock_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"accel/internal/keylock"
)

func TestOneAtATimeForEachKey(t *testing.T) {
	var m keylock.Mutex
	counts := make([]int, 3) // the race detector is the judge
	var wg sync.WaitGroup
	for i := range 300 {
		wg.Go(func() {
			unlock, err := m.Lock(t.Context(), fmt.Sprint(i%3))
			if err != nil {
				t.Error(err)
				return
			}
			defer unlock()
			counts[i%3]++
		})
	}
	wg.Wait()
	for i, n := range counts {
		if n != 100 {
			t.Errorf("key %d was held %d times, want 100", i, n)
		}
	}
}

func TestWaitEndsWithContext(t *testing.T) {
	var m keylock.Mutex
	unlock, err := m.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("a wait without hope returned %v", err)
	}
	if other, err := m.Lock(t.Context(), "b"); err != nil {
		t.Errorf("another key waits too: %v", err)
	} else {
		other()
	}
	unlock()
	again, err := m.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	again()
}
