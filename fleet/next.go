package fleet

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"accel"
)

// maxReasonBytes bounds a reason, which a node writes and people read.
const maxReasonBytes = 1024

// Next returns what a node is to fetch and has not taken up, the longest waiting
// first, at most 50. While there is nothing it waits, up to wait; then the answer is empty. A node
// that is not known waits too, and is given work once it has been Seen. It returns
// ctx.Err() when ctx ends first.
func (f *Fleet) Next(ctx context.Context, node string, wait time.Duration) ([]accel.Warm, error) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		news, stop := f.hub.listen(node)
		all, err := f.next(ctx, node)
		if err != nil || len(all) > 0 {
			stop()
			return all, err
		}
		select {
		case <-news:
		case <-timer.C:
			stop()
			return nil, nil
		case <-ctx.Done():
			stop()
			return nil, ctx.Err()
		}
		stop()
	}
}

func (f *Fleet) next(ctx context.Context, node string) (all []accel.Warm, err error) {
	err = f.view(ctx, func(c *change) error {
		all, err = c.oldest(bucketPending, hash(node), maxNext)
		return err
	})
	return all, err
}

// Report takes in how far a node has come with w: its State (any but Pending), Digest,
// Reason and bytes count, and Node, where it is set, must be the Warm's. The same report
// twice is one. ErrNotFound for what nobody wants any more, ErrConflict for a Fetching that
// comes after the end; the node drops the image then.
func (f *Fleet) Report(ctx context.Context, w accel.Warm) (accel.Warm, error) {
	if err := checkReport(&w); err != nil {
		return accel.Warm{}, err
	}
	var now accel.Warm
	err := f.update(ctx, func(c *change) error {
		was, ok, err := c.warm(w.ID)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%w: no warm %.40q: it was dropped, or finished long ago", accel.ErrNotFound, w.ID)
		}
		if w.Node != "" && w.Node != was.Node {
			return fmt.Errorf("%w: warm %s is node %s's, not %.253s's", accel.ErrInvalid, w.ID, was.Node, w.Node)
		}
		if was.Ended() && w.State == accel.WarmFetching {
			return fmt.Errorf("%w: warm %s is %s already", accel.ErrConflict, w.ID, was.State)
		}
		now = was
		now.State, now.Reason, now.UpdatedAt = w.State, w.Reason, c.now
		now.TotalBytes, now.FetchedBytes = w.TotalBytes, w.FetchedBytes
		if w.Digest != "" {
			now.Digest = w.Digest
		}
		if w.State != was.State && w.State != accel.WarmFetching {
			c.finished[w.State]++
			c.fetched += w.FetchedBytes
		}
		return c.put(&was, &now)
	})
	if err != nil {
		return accel.Warm{}, err
	}
	if now.State == accel.WarmFailed {
		f.o.Log.Warn("an image could not be brought to a node", "node", now.Node, "image", now.Image, "reason", now.Reason)
	}
	return now, nil
}

func checkReport(w *accel.Warm) error {
	switch w.State {
	case accel.WarmFetching, accel.WarmDone, accel.WarmFailed:
	default:
		return fmt.Errorf("%w: warm %.40q: state %.40q: want %s, %s or %s", accel.ErrInvalid, w.ID, w.State, accel.WarmFetching, accel.WarmDone, accel.WarmFailed)
	}
	if w.Digest != "" {
		if err := w.Digest.Validate(); err != nil {
			return fmt.Errorf("%w: warm %.40q: digest %.200q: %w", accel.ErrInvalid, w.ID, w.Digest, err)
		}
	}
	if w.TotalBytes < 0 || w.FetchedBytes < 0 {
		return fmt.Errorf("%w: warm %.40q: negative bytes", accel.ErrInvalid, w.ID)
	}
	w.Reason = strings.Join(strings.Fields(strings.ToValidUTF8(w.Reason, "\uFFFD")), " ")
	if len(w.Reason) > maxReasonBytes {
		w.Reason = strings.ToValidUTF8(w.Reason[:maxReasonBytes-3], "") + "..."
	}
	if w.State == accel.WarmFailed && w.Reason == "" {
		w.Reason = "the node gave no reason"
	}
	return nil
}

// hub tells the nodes' long polls that there may be something new; it keeps a node
// only while somebody listens.
type hub struct {
	mu    sync.Mutex
	nodes map[string]*listeners
}

type listeners struct {
	news  chan struct{} // closed by wake
	count int
}

// listen returns a channel that is closed by the next wake of the node. Listen first,
// then read, then wait, so that nothing is missed; stop must be called.
func (h *hub) listen(node string) (news <-chan struct{}, stop func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.nodes == nil {
		h.nodes = map[string]*listeners{}
	}
	l := h.nodes[node]
	if l == nil {
		l = &listeners{news: make(chan struct{})}
		h.nodes[node] = l
	}
	l.count++
	return l.news, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if l.count--; l.count == 0 && h.nodes[node] == l {
			delete(h.nodes, node)
		}
	}
}

func (h *hub) wake(nodes map[string]struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for node := range nodes {
		if l := h.nodes[node]; l != nil {
			close(l.news)
			delete(h.nodes, node)
		}
	}
}
