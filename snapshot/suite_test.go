package snapshot

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
)

// TestConformance is containerd's own suite for snapshotters.
func TestConformance(t *testing.T) {
	needsRoot(t)
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		layers, held := &trees{dir: filepath.Join(root, "layers")}, &pins{dir: filepath.Join(root, "pins")}
		if err := errors.Join(os.Mkdir(layers.dir, 0o755), os.Mkdir(held.dir, 0o755)); err != nil {
			return nil, nil, err
		}
		s, err := Open(ctx, Options{Dir: filepath.Join(root, "s"), Images: layers, Mounts: layers, Pins: held, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, s.Restore(ctx)
	})
}
