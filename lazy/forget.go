package lazy

import (
	"context"
	"errors"
	"fmt"

	"accel"
	"accel/lazyfs"

	"github.com/opencontainers/go-digest"
)

// Forget closes a layer that is not mounted, so that the store may remove it, and what is known of images
// with it: the next pull looks at them anew. accel.ErrConflict while it is mounted.
func (l *Lazy) Forget(ctx context.Context, d digest.Digest) error {
	unlock, err := l.locks.Lock(ctx, d.String())
	if err != nil {
		return err
	}
	defer unlock()
	l.mu.Lock()
	l.dropAnswers(d)
	open := l.open[d] != nil
	l.mu.Unlock()
	if !open {
		return nil
	}
	mounts, err := l.host.Mounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.Digest == d {
			return fmt.Errorf("%w: layer %s is mounted at %s", accel.ErrConflict, d, m.Target)
		}
	}
	if err := l.closeLayer(ctx, d); errors.Is(err, lazyfs.ErrInUse) {
		return fmt.Errorf("%w: %w", accel.ErrConflict, err)
	} else if err != nil {
		return err
	}
	return nil
}

// dropAnswers has images with a layer looked at anew. l.mu is held.
func (l *Lazy) dropAnswers(d digest.Digest) {
	for _, key := range l.answers.Keys() {
		if a, ok := l.answers.Peek(key); ok && a.has(d) {
			l.answers.Remove(key)
		}
	}
}

// has reports whether an answer that is there is about a layer.
func (a *answer) has(d digest.Digest) bool {
	select {
	case <-a.done:
	default:
		return false
	}
	if a.img == nil {
		return false
	}
	for _, y := range a.img.layers {
		if y.Digest == d {
			return true
		}
	}
	return false
}
