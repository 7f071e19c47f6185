package prefetch

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Release has the background fill layers that were added Held. Those that are not there are left out.
func (f *Filler) Release(digests ...digest.Digest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range digests {
		if l := f.layers[d]; l != nil {
			l.Held = false
		}
	}
	kick(f.dispatching)
}

// waits reports whether some of the hot set is still to be asked for over a link, and can be. A request of the background would
// take some of it along, in the middle of what can wait.
func (h *hotSet) waits(k *link, now time.Time) bool {
	for _, r := range h.runs {
		if r.l.link == k && !now.Before(r.l.pausedUntil) {
			return true
		}
	}
	return len(h.wants) > 0 && h.wants[0].l.link == k && !now.Before(h.wants[0].l.pausedUntil)
}
