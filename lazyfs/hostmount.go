package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// readAheadBytes is what the kernel reads at once of a lazy mount, where reading is
// sequential and around a page fault. Present content came through FUSE at 1.2 GB/s
// with the kernel's default of 128 KiB, at 1.8 with this and at 2.9 with 512 KiB; but a
// fault waits for all chunks that the range touches, and with more it would often be two.
const readAheadBytes = 256 << 10

// Mount mounts a layer at target: from the data file where that is complete and durable, else through a
// holder. It waits until Run has adopted what a former daemon left. Mounting what is there
// already is nothing; where that is dead (see Options.HolderDied) it is replaced. Errors:
// ErrUnknown, ErrInUse where something else is mounted at target, ErrUnsupported, ctx's cause, what the kernel gave.
func (h *Host) Mount(ctx context.Context, d digest.Digest, target string) error {
	return h.mount(ctx, d, target, false)
}

// MountWatched is Mount through a holder in any case, so that Layer.Reads tells what is read.
func (h *Host) MountWatched(ctx context.Context, d digest.Digest, target string) error {
	return h.mount(ctx, d, target, true)
}

func (h *Host) mount(ctx context.Context, d digest.Digest, target string, watched bool) error {
	target, err := canonical(target)
	if err != nil {
		return err
	}
	l, unlock, err := h.locked(ctx, d)
	if err != nil {
		return err
	}
	defer unlock()
	mounts, foreign, err := mountsOf(ctx, h.o.Dir)
	if err != nil {
		return err
	}
	stack := stackAt(mounts, target)
	put := func(fd int) error { return attach(fd, target, 0) }
	if len(stack) > 0 {
		top := stack[len(stack)-1]
		switch {
		case foreign[target] || top.Digest != d:
			return fmt.Errorf("%w: %s has a mount of something else", ErrInUse, target)
		case !top.Lazy || h.alive(top.holder):
			return nil
		}
		put = func(fd int) error { return replace(fd, target) }
	}
	lazy := watched || !l.durable()
	fd, err := h.make(ctx, l, lazy)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	if err = put(fd); err == nil && lazy {
		h.readAhead(target)
	}
	return err
}

func (h *Host) make(ctx context.Context, l *Layer, lazy bool) (int, error) {
	if !lazy {
		return h.makePlain(l)
	}
	const tries = 3 // a holder may die or end at any moment
	for try := 1; ; try++ {
		link, err := h.holder(ctx)
		if err != nil {
			return -1, err
		}
		if err = link.add(ctx, l); err == nil {
			var fd int
			fd, err = makeMount(mountSpec{
				source: filepath.Join(h.o.Dir, sourcesDir, link.name, fileName(l.digest)), meta: l.files.Meta,
				data: filepath.Join(link.dir, holderFuse, fileName(l.digest)), lazy: true, loop: h.o.ForceLoop,
			})
			if err == nil {
				return fd, nil
			}
		}
		if try == tries || h.alive(link.name) && !errors.Is(err, errGone) && !link.leaves(ctx, l.digest) || ctx.Err() != nil {
			return -1, fmt.Errorf("mount layer %s: %w", l.digest, err)
		}
	}
}

func (h *Host) makePlain(l *Layer) (int, error) {
	return makeMount(mountSpec{
		source: filepath.Join(h.o.Dir, sourcesDir, plainSource, fileName(l.digest)), meta: l.files.Meta,
		data: l.files.Data, loop: h.o.ForceLoop,
	})
}

// readAhead tunes the mount at target. Without it all works, only slower.
func (h *Host) readAhead(target string) {
	name, err := sysfsName(target)
	if err == nil {
		path := filepath.Join("/sys/class/bdi", filepath.Base(name), "read_ahead_kb")
		err = os.WriteFile(path, []byte(strconv.Itoa(readAheadBytes>>10)), 0)
	}
	if err != nil {
		h.o.Log.Debug("read-ahead stays as it is", "target", target, "error", err)
	}
}

// sysfsName is FS_IOC_GETFSSYSFSPATH (Linux 6.9): a file-backed EROFS tells the name of
// its backing device, and nothing else does.
func sysfsName(path string) (string, error) {
	const getSysfsPath = 0x80811501
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer closeFD(fd)
	var name struct {
		length uint8
		bytes  [128]byte
	}
	_, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), getSysfsPath, uintptr(unsafe.Pointer(&name)))
	if no != 0 {
		return "", no
	}
	return string(name.bytes[:min(int(name.length), len(name.bytes))]), nil
}

// Unmount takes away all that Mount and Complete put at target. Who has it open keeps it. Nothing
// mounted there is no error; ErrInUse where something else lies on it. The kernel waits for
// reads that are under way, fills too; when ctx ends before that, target is free already.
func (h *Host) Unmount(ctx context.Context, target string) error {
	target, err := canonical(target)
	if err != nil {
		return err
	}
	mounts, _, err := mountsOf(ctx, h.o.Dir)
	if err != nil {
		return err
	}
	stack := stackAt(mounts, target)
	if len(stack) == 0 {
		return nil
	}
	unlock, err := h.byDigest.Lock(ctx, string(stack[0].Digest))
	if err != nil {
		return err
	}
	defer unlock()
	mounts, foreign, err := mountsOf(ctx, h.o.Dir) // Complete may have been at it
	if err != nil {
		return err
	}
	if foreign[target] {
		return fmt.Errorf("%w: %s has a mount of something else", ErrInUse, target)
	}
	done := make(chan error, 1)
	go func() { // ends with the last read
		var err error
		for range stackAt(mounts, target) {
			err = errors.Join(err, detach(target))
		}
		done <- err
	}()
	select {
	case err = <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// locked waits until Run has adopted what there was, and until nobody else changes the mounts of a layer.
func (h *Host) locked(ctx context.Context, d digest.Digest) (l *Layer, unlock func(), err error) {
	select {
	case <-h.adopted:
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	if unlock, err = h.byDigest.Lock(ctx, string(d)); err != nil {
		return nil, nil, err
	}
	l, ok := h.Layer(d)
	if !ok {
		unlock()
		return nil, nil, fmt.Errorf("%w: %s", ErrUnknown, d)
	}
	return l, unlock, nil
}

// Complete puts plain mounts in the places of the lazy mounts of a layer of which all is
// there, and synced: who opens it from now on needs no holder, who has it open keeps the old one.
// Errors: ErrUnknown, ErrIncomplete, what the kernel gave; then some of the places may be done.
func (h *Host) Complete(ctx context.Context, d digest.Digest) error {
	l, unlock, err := h.locked(ctx, d)
	if err != nil {
		return err
	}
	defer unlock()
	if !l.durable() {
		return fmt.Errorf("%w: %s", ErrIncomplete, d)
	}
	mounts, _, err := mountsOf(ctx, h.o.Dir)
	if err != nil {
		return err
	}
	var errs []error
	done := map[string]bool{}
	for _, m := range mounts {
		if m.Digest != d || done[m.Target] {
			continue
		}
		done[m.Target] = true
		errs = append(errs, h.complete(l, m.Target, stackAt(mounts, m.Target)))
	}
	return errors.Join(errs...)
}

func (h *Host) complete(l *Layer, target string, stack []MountInfo) error {
	if !stack[len(stack)-1].Lazy {
		return nil
	}
	for _, m := range stack {
		if !m.Lazy { // a crash between putting it beneath and taking the upper away
			return detach(target)
		}
	}
	fd, err := h.makePlain(l)
	if err != nil {
		return err
	}
	defer closeFD(fd)
	return replace(fd, target)
}
