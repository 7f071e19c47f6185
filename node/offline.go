package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"accel/cache"
	"accel/lazy"
)

// OfflineOptions describe a node that is stopped.
type OfflineOptions struct {
	Dir                         string // Options.Dir
	BudgetBytes, FreeFloorBytes int64
	// Canonical maps a registry's name to the one that the store has.
	Canonical func(host string) (string, error)
	Log       *slog.Logger
}

// Offline does something with the store of a stopped node. The error wraps
// cache.ErrLocked when one is running after all.
func Offline(ctx context.Context, o OfflineOptions, do func(context.Context, *Contents) error) (err error) {
	store, err := cache.Open(cache.Options{Dir: storeDir(o.Dir), BudgetBytes: o.BudgetBytes, FreeFloorBytes: o.FreeFloorBytes, VerifyLayer: lazy.VerifyLayer, Log: o.Log})
	if err != nil {
		return fmt.Errorf("node's folder %s: %w", o.Dir, err)
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- store.Run(running) }()
	known := lazy.OpenStopped(lazyDir(o.Dir), o.Log) // what is mounted is pinned
	err = do(ctx, &Contents{store: store, canonical: o.Canonical, mounted: known.ManifestOf, layersOf: known.LayersOf})
	stop()
	return errors.Join(err, <-ended, store.Close())
}
