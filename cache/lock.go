package cache

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// lockDir takes the directory for this process; the lock goes with the process, however that ends.
func lockDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the cache directory: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		pid := make([]byte, 32)
		n, _ := f.ReadAt(pid, 0) // io.EOF: it is shorter
		f.Close()
		return nil, fmt.Errorf("%w: %s, by process %s", ErrLocked, path, strings.TrimSpace(string(pid[:n])))
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	if err != nil && !noSpace(err) { // on a full disk the lock holds without the pid
		f.Close()
		return nil, fmt.Errorf("lock the cache directory: %w", err)
	}
	return f, nil
}
