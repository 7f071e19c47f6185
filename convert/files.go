package convert

import (
	"errors"
	"fmt"
	"os"
	"sync"
)

// files are the temporary files of a conversion. They lose their names as soon
// as they are made, so that not even a crash leaves one behind.
type files struct {
	dir string

	mu   sync.Mutex
	open []*os.File
}

func (fs *files) create() (*os.File, error) {
	f, err := os.CreateTemp(fs.dir, "accel-layer-*")
	if err != nil {
		return nil, fmt.Errorf("spill a layer: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("spill a layer: %w", err)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.open = append(fs.open, f)
	return f, nil
}

func (fs *files) Close() error {
	if fs == nil {
		return nil
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	var errs []error
	for _, f := range fs.open {
		errs = append(errs, f.Close())
	}
	fs.open = nil
	return errors.Join(errs...)
}

// joinClose closes fs after err, whose kind stays what it is.
func joinClose(err error, fs *files) error {
	if cerr := fs.Close(); cerr != nil {
		return errors.Join(err, cerr)
	}
	return err
}
