package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"accel"
)

// maxPause bounds the pause between two attempts of one call. A registry that
// asks for a longer one gets it from the queue.
const maxPause = 10 * time.Second

// budget is what one call may spend on further attempts.
type budget struct {
	attempts int // of the whole
	left     int
	pause    time.Duration
	initial  time.Duration
}

func (c *Client) budget() *budget {
	return &budget{attempts: c.o.Attempts, left: c.o.Attempts - 1, pause: c.o.Backoff, initial: c.o.Backoff}
}

// refill gives all attempts back, after progress.
func (b *budget) refill() { b.left, b.pause = b.attempts-1, b.initial }

// again waits until the next attempt is due and returns nil, or returns the
// error to end with: err itself, marked with the pause that the registry asked for.
func (b *budget) again(ctx context.Context, err error) error {
	var after time.Duration
	if answer := (*responseError)(nil); errors.As(err, &answer) {
		after = answer.after
	}
	switch {
	case ctx.Err() != nil:
		if cause := context.Cause(ctx); !errors.Is(err, cause) {
			return fmt.Errorf("%w, after: %w", cause, err)
		}
		return err
	case !retryable(err):
		return asking(err, after)
	case b.left <= 0 || after > maxPause:
		if b.attempts > 1 && after <= maxPause {
			err = fmt.Errorf("gave up after %d attempts: %w", b.attempts, err)
		}
		return asking(err, after)
	}
	b.left--
	wait := max(after, b.pause/2+rand.N(b.pause/2+1))
	b.pause = min(2*b.pause, maxPause)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w, after: %w", context.Cause(ctx), err)
	}
}

// asking marks err with a pause, where one was asked for.
func asking(err error, after time.Duration) error {
	if after > 0 {
		return accel.WithRetryAfter(err, after)
	}
	return err
}
