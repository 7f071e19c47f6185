package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"

	"accel/internal/unixsocket"
)

// ListenAdmin makes the socket of the admin API, which goes when it is closed; see unixsocket.Listen.
func ListenAdmin(ctx context.Context, path string) (net.Listener, error) {
	l, err := unixsocket.Listen(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("socket of the node: %w", err)
	}
	return &movedListener{l, path}, nil
}

// movedListener removes its socket when it is closed.
type movedListener struct {
	net.Listener
	path string
}

// Close implements net.Listener.
func (l *movedListener) Close() error {
	err := l.Listener.Close()
	if err != nil { // closed before: by now the path may be another's
		return err
	}
	if err := os.Remove(l.path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// refused reports whether nobody listens there.
func refused(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
}
