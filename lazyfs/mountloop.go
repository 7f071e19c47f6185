package lazyfs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// loopTries bounds the race for free loop devices with other processes.
const loopTries = 64

// makeLoopMount goes through loop devices, for kernels whose EROFS wants block
// devices. They detach themselves with the mount.
func makeLoopMount(s mountSpec) (int, error) {
	meta, err := attachLoop(s.meta)
	if err != nil {
		return -1, err
	}
	defer meta.Close() // the mount has it open then
	data, err := attachLoop(s.data)
	if err != nil {
		return -1, err
	}
	defer data.Close()
	return newEROFS(s.source, meta.Name(), data.Name(), false)
}

// attachLoop makes path a read-only block device, which goes when its last user
// closes it.
func attachLoop(path string) (*os.File, error) {
	backing, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: no loop devices: %w", ErrUnsupported, err)
	}
	defer control.Close()
	for range loopTries {
		free, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", free), os.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		config := unix.LoopConfig{Fd: uint32(backing.Fd()), Size: BlockBytes}
		config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if errors.Is(err, unix.EINVAL) { // a file system without direct I/O
			config.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
			err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		}
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) { // EBUSY: somebody was faster
			return nil, fmt.Errorf("attach loop device to %s: %w", path, err)
		}
	}
	return nil, fmt.Errorf("attach loop device to %s: others are always faster", path)
}
