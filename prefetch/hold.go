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

// waits reports whether some of the hot set is still to be asked for over its link, and can be.
func (h *hotSet) waits(now time.Time) bool {
	return h.ready(now) > 0 || len(h.wants) > 0 && !now.Before(h.wants[0].l.pausedUntil)
}
