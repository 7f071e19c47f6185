package registry

import (
	"context"
	"sync"
)

// Warm has up to so many connections to the registry ready, lest each of many requests that are to come at once waits for one
// of its own: a round trip, or more under TLS. A host that is spoken to over HTTP/2 needs one, and has it. It is a hint:
// what fails is left for the requests to tell.
func (s *Source) Warm(ctx context.Context, connections int) {
	if s.r.multiplexed.Load() {
		return
	}
	var g sync.WaitGroup
	for range min(connections, idleConnections) {
		g.Go(func() {
			if resp, err := s.r.auth.bare(ctx); err == nil {
				drain(resp)
			}
		})
	}
	g.Wait()
}
