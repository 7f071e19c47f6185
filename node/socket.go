package node

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
)

// maxSocketPath is what the kernel takes (unix(7)), with the zero at its end.
const maxSocketPath = 107

// ListenAdmin makes the socket of the admin API. Only its owner may use it. Of a daemon that
// was killed it takes over the socket; one that answers makes it an error.
func ListenAdmin(ctx context.Context, path string) (net.Listener, error) {
	dir := filepath.Dir(path)
	// Made here under a name of its own, where nobody else gets in, and then moved: at no time is there
	// a socket at path that others may use.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("socket of the node: %w", err)
	}
	if _, err := os.Lstat(path); err == nil {
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path)
		if err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("%w: another node answers on %s; stop that one, or choose another socket", accel.ErrConflict, path)
		}
		if !refused(err) {
			return nil, fmt.Errorf("socket of the node: %w", err)
		}
	}
	private, err := os.MkdirTemp(dir, ".s")
	if err != nil {
		return nil, fmt.Errorf("socket of the node: %w", err)
	}
	l, err := listenAndMove(ctx, filepath.Join(private, "s"), path)
	if err = errors.Join(err, os.RemoveAll(private)); err != nil {
		if l != nil {
			_ = l.Close()
		}
		return nil, fmt.Errorf("socket of the node: %w", err)
	}
	return l, nil
}

func listenAndMove(ctx context.Context, made, path string) (net.Listener, error) {
	if n := max(len(made), len(path)); n > maxSocketPath {
		return nil, fmt.Errorf("%w: %s is too long a path for a socket", accel.ErrInvalid, path)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", made)
	if err != nil {
		return nil, err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	if err := errors.Join(os.Chmod(made, 0o600), os.Rename(made, path)); err != nil {
		return l, err
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
