package snapshot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"accel/internal/unixsocket"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"
)

// drain is how long calls may go on when Serve is to end; containerd repeats what is cut off.
const drain = 5 * time.Second

// Listen makes the socket on which containerd asks; see unixsocket.Listen.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	l, err := unixsocket.Listen(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("socket of the snapshotter: %w", err)
	}
	return l, nil
}

// Serve answers containerd until ctx ends. It closes l; the socket stays and is the next process's to take over.
func (s *Snapshotter) Serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(g, snapshotservice.FromSnapshotter(s))
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	cut := time.AfterFunc(drain, g.Stop)
	defer cut.Stop()
	g.GracefulStop()
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}
