package registry

import (
	"context"
	"sync"
)

// keyedMutex serialises by key. An entry lives as long as somebody holds or
// awaits it.
type keyedMutex struct {
	mu   sync.Mutex
	held map[string]*keyTurn
}

type keyTurn struct {
	free  chan struct{} // holds one token while nobody has the key
	users int
}

// lock waits for key until ctx ends.
func (k *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*keyTurn{}
	}
	turn := k.held[key]
	if turn == nil {
		turn = &keyTurn{free: make(chan struct{}, 1)}
		turn.free <- struct{}{}
		k.held[key] = turn
	}
	turn.users++
	k.mu.Unlock()

	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if turn.users--; turn.users == 0 {
			delete(k.held, key)
		}
	}
	select {
	case <-turn.free:
		return func() { turn.free <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
