package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"accel"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"
)

const (
	// maxSocketPath is what the kernel takes (unix(7)), with the zero at its end.
	maxSocketPath = 107
	// drain is how long calls may go on when Serve is to end; containerd repeats what is cut off.
	drain = 5 * time.Second
)

// Listen makes the socket on which containerd asks. Only its owner may use it. Of a daemon that was
// killed it takes over the socket; one that answers makes it accel.ErrConflict.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	l, err := listen(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("socket of the snapshotter: %w", err)
	}
	return l, nil
}

func listen(ctx context.Context, path string) (_ net.Listener, err error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("%w: %s is too long a path for a socket", accel.ErrInvalid, path)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return nil, errors.Join(fmt.Errorf("%w: another process answers on %s", accel.ErrConflict, path), conn.Close())
	case !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	// Made where nobody else gets in, and then moved: at no time is there a socket at path that others may use.
	private, err := os.MkdirTemp(dir, ".s")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(private)) }()
	made := filepath.Join(private, "s")
	if len(made) > maxSocketPath {
		return nil, fmt.Errorf("%w: %s, where the socket is made, is too long a path for one", accel.ErrInvalid, made)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", made)
	if err != nil {
		return nil, err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // by then the path may be a successor's
	}
	if err := errors.Join(os.Chmod(made, 0o600), os.Rename(made, path)); err != nil {
		return nil, errors.Join(err, l.Close())
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
