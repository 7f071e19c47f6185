package testbed

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// endShims kills the shims of the containerd at socket, which outlive it, and
// what runs under them.
func endShims(socket string) error {
	children, shims, err := processes(socket)
	if err != nil {
		return err
	}
	var errs []error
	for len(shims) > 0 {
		pid := shims[0]
		shims = append(shims[1:], children[pid]...)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("kill %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// processes reads /proc: every process's children, and the shims that were told
// of the socket.
func processes(socket string) (children map[int][]int, shims []int, err error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, nil, err
	}
	children = map[int][]int{}
	for _, line := range lines {
		dir := filepath.Dir(line)
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue // the pattern lets through only numbers, and what merely begins as one
		}
		raw, err := os.ReadFile(line)
		if err != nil {
			continue // it has ended meanwhile
		}
		args := strings.Split(string(raw), "\x00")
		at := slices.Index(args, "-address")
		if strings.Contains(args[0], "containerd-shim") && at >= 0 && at+1 < len(args) && args[at+1] == socket {
			shims = append(shims, pid)
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		// "PID (name) state parent ...", and the name may have anything in it.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if parent, err := strconv.Atoi(fields[1]); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	return children, shims, nil
}

// UnmountBelow detaches every mount in dir, the innermost first.
func UnmountBelow(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}
