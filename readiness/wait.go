package readiness

import (
	"context"
	"errors"
	"sync"
	"time"

	"accel"
)

// relook bounds every wait for news: changes that another process made through
// the same store bring no news here.
const relook = 5 * time.Second

// Topics of the hub. A repository's contains a slash, so it is none of these.
const (
	topicWork   = "work"
	topicChecks = "checks"
	topicEvents = "events"
)

func repositoryTopic(repository string) string { return "repository/" + repository }

// hub tells waiters that something may have changed; they read again what they wait
// for. It keeps a topic only while somebody listens.
type hub struct {
	mu     sync.Mutex
	topics map[string]*topic
}

type topic struct {
	news      chan struct{} // closed by wake
	listeners int
}

// listen returns a channel that is closed by the next wake of the name. Listen first, then read, then
// wait, so that nothing is missed; stop must be called.
func (h *hub) listen(name string) (news <-chan struct{}, stop func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.topics == nil {
		h.topics = map[string]*topic{}
	}
	tp := h.topics[name]
	if tp == nil {
		tp = &topic{news: make(chan struct{})}
		h.topics[name] = tp
	}
	tp.listeners++
	return tp.news, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if tp.listeners--; tp.listeners == 0 && h.topics[name] == tp {
			delete(h.topics, name)
		}
	}
}

func (h *hub) wake(names map[string]struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name := range names {
		if tp := h.topics[name]; tp != nil {
			close(tp.news)
			delete(h.topics, name)
		}
	}
}

// sleep waits for news, for d or for relook, whichever comes first.
func sleep(ctx context.Context, news <-chan struct{}, d time.Duration) error {
	timer := time.NewTimer(min(d, relook))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-news:
	case <-timer.C:
	}
	return nil
}

// Wait is Find that waits until the answer is Final or ctx ends (then: the latest answer, or ErrNotFound, with ctx's error joined).
// An unknown reference is waited for too; a Superseded record's successor is followed.
func (t *Tracker) Wait(ctx context.Context, ref accel.Reference) (Status, error) {
	var last Status
	lastErr := accel.ErrNotFound // where ctx ends before the first look
	for {
		news, stop := t.hub.listen(repositoryTopic(ref.Name()))
		st, err := t.outcome(ctx, ref)
		if err == nil && st.Final() {
			stop()
			return st, nil
		}
		if ctx.Err() != nil {
			stop()
			return last, errors.Join(lastErr, ctx.Err())
		}
		if err != nil && !errors.Is(err, accel.ErrNotFound) {
			stop()
			return last, err
		}
		last, lastErr = st, err
		err = sleep(ctx, news, relook)
		stop()
		if err != nil {
			return last, errors.Join(lastErr, err)
		}
	}
}

// maxSuccessors bounds how far Wait follows a tag that moves on and on.
const maxSuccessors = 10_000

// outcome is Find that goes on to the successor of a Superseded record while there is one.
func (t *Tracker) outcome(ctx context.Context, ref accel.Reference) (Status, error) {
	var st Status
	err := t.store.View(ctx, func(tx Tx) (err error) {
		if st, err = t.look(tx, ref); err != nil {
			return err
		}
		for range maxSuccessors {
			if st.State != accel.Superseded || st.SuccessorID == "" {
				break
			}
			e, err := follow(tx, st.SuccessorID)
			if errors.Is(err, accel.ErrNotFound) {
				break // deleted: the Superseded record is all there is to say
			}
			if err != nil {
				return err
			}
			st = Status{Record: e.Record, Previous: st.Previous}
		}
		return nil
	})
	return st, err
}
