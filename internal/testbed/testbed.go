// Package testbed starts the real parts that accel lives between, for the
// end-to-end tests and the benchmarks: a distribution registry with token
// authentication that counts what it delivers, and private containerds of two
// versions. Everything is in directories of its own, and only processes that it
// started are ended. internal/e2e/setup.sh installs the programs.
package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ErrMissing: a program that setup.sh installs is not there.
var ErrMissing = errors.New("run `make setup`")

// Versions of containerd that can be started: a new one built from source, and
// the one that Debian stable has.
const (
	Containerd2  = "2.4.2"
	Containerd16 = "1.6"
)

const crane = "crane-0.22.1"

// Crane is the path of the crane program.
func Crane() (string, error) { return tool(crane) }

// tool finds a program under .tools of the checkout that the working directory is in.
func tool(name string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, ".tools", name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w (%w)", err, ErrMissing)
	}
	return path, nil
}

// Root is the directory of the checkout: the nearest one above the working
// directory with a go.mod.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		_, err := os.Stat(filepath.Join(dir, "go.mod"))
		if err == nil {
			return dir, nil
		}
		if up := filepath.Dir(dir); !errors.Is(err, fs.ErrNotExist) || up == dir {
			return "", fmt.Errorf("find the checkout: %w", err)
		} else {
			dir = up
		}
	}
}
