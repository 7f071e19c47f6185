// Package unixsocket makes the sockets on which a daemon is asked by its own machine.
package unixsocket

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

// maxPathBytes is what the kernel takes (unix(7)), with the zero at its end.
const maxPathBytes = 107

// Listen makes a socket that only its owner may use, and the folder (mode 0700) that it is in. Of a daemon that was killed it
// takes the socket over; where one answers, the error is accel.ErrConflict. The socket stays when the listener is closed: by then it may
// be a successor's.
func Listen(ctx context.Context, path string) (_ net.Listener, err error) {
	// Made here under a name of its own, where nobody else gets in, and then moved: at no time is there
	// a socket at path that others may use.
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return nil, errors.Join(fmt.Errorf("%w: another process answers on %s; stop that one, or choose another socket", accel.ErrConflict, path), conn.Close())
	case len(path) > maxPathBytes:
		return nil, fmt.Errorf("%w: %s is too long a path for a socket", accel.ErrInvalid, path)
	case !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	private, err := os.MkdirTemp(dir, ".s")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(private)) }()
	made := filepath.Join(private, "s")
	if len(made) > maxPathBytes {
		return nil, fmt.Errorf("%w: %s, where the socket is made, is too long a path for one", accel.ErrInvalid, made)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", made)
	if err != nil {
		return nil, err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	if err := errors.Join(os.Chmod(made, 0o600), os.Rename(made, path)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
