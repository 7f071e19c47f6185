// Package collectors registers the metrics of one component as a whole.
package collectors

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// Register registers all of them, or none and says why not. unregister takes them back, for a component that ends before
// its process: gauges go on asking it otherwise. A nil Registerer is no error, and nothing is registered.
func Register(r prometheus.Registerer, all ...prometheus.Collector) (unregister func(), err error) {
	if r == nil {
		return func() {}, nil
	}
	take := func(registered []prometheus.Collector) {
		for _, c := range registered {
			r.Unregister(c)
		}
	}
	for i, c := range all {
		if err := r.Register(c); err != nil {
			take(all[:i])
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return func() { take(all) }, nil
}
