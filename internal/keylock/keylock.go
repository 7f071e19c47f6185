// Package keylock serialises work by a key, such as a tag that is moved.
package keylock

import (
	"context"
	"sync"
)

// Mutex serialises by key; its zero value is ready. An entry lives as long as
// somebody holds or awaits it.
type Mutex struct {
	mu   sync.Mutex
	held map[string]*turn
}

type turn struct {
	free  chan struct{} // holds one token while nobody has the key
	users int
}

// Lock waits for key until ctx ends, and then returns ctx's cause.
func (m *Mutex) Lock(ctx context.Context, key string) (unlock func(), err error) {
	m.mu.Lock()
	if m.held == nil {
		m.held = map[string]*turn{}
	}
	t := m.held[key]
	if t == nil {
		t = &turn{free: make(chan struct{}, 1)}
		t.free <- struct{}{}
		m.held[key] = t
	}
	t.users++
	m.mu.Unlock()

	leave := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(m.held, key)
		}
	}
	select {
	case <-t.free:
		return func() { t.free <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
