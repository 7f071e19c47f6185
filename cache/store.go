package cache

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options of a Store. Dir is required.
type Options struct {
	// Dir is the store's own folder; made (mode 0700) where it is not there.
	Dir string
	// BudgetBytes bounds what the store takes on disk, in allocated blocks; 0: only
	// FreeFloorBytes and the file system do.
	BudgetBytes int64
	// FreeFloorBytes of the file system are left free; content is evicted where others
	// take the space. 0: none.
	FreeFloorBytes int64
	Registerer     prometheus.Registerer // nil: no metrics
	Log            *slog.Logger          // nil: slog.Default
	Now            func() time.Time      // nil: time.Now. Only for what people read: recency is counted, not timed.
}

// Store is a node's content. It is safe for concurrent use.
type Store struct {
	o Options
}

// Open opens the store in o.Dir. ErrLocked when another process has it, named by its
// pid. A damaged index is set aside (index.db.damaged) and a new one begun; the
// files are taken into it by Run, Check, or when they are asked for.
func Open(o Options) (*Store, error) { return &Store{o: o}, nil }

// Run keeps the store until ctx ends: fills run only under it (those asked for before wait for
// it), and so do index commits once a second, eviction down to the free floor, and taking
// back files that the index does not know. It returns when every fill has ended and
// the index is written. An error means that the index was given up: start again.
// It may be called once.
func (s *Store) Run(ctx context.Context) error { return nil }

// Close writes the index and gives the directory back. Readers that are open may
// read on what is there. A second Close is no error.
func (s *Store) Close() error { return nil }
