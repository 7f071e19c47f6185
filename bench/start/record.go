package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// recordReadAhead is the kernel's default. Machines set far more for large disks, which
// would count as read what only lay near.
const recordReadAhead = "128" // KiB

// recording is what one start of an image read.
type recording struct {
	files         []string // opened or read, in the order of their first use
	residentBytes int64    // of them, in the page cache afterwards: with a read-ahead of recordReadAhead
}

// record starts the plain image once, with a cold page cache, until its program
// answers. The stock optimiser records the same events.
func (b *bed) record(ctx context.Context, s startable, src v1.Image) (r recording, err error) {
	cfg, err := src.ConfigFile()
	if err != nil {
		return r, err
	}
	h, err := b.startHost(ctx, overlayfs)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	reference := b.reference(s.name, plainForm)
	if err := h.pull(ctx, reference); err != nil {
		return r, err
	}
	// Mounted first and told to containerd as a root that is there already, so that the
	// whole start can be watched.
	root := filepath.Join(h.containerd.Dir, "watched")
	if err := os.Mkdir(root, 0o755); err != nil {
		return r, err
	}
	if _, err := h.containerd.Ctr(ctx, "images", "mount", "--rw", reference, root); err != nil {
		return r, err
	}
	restore, err := setReadAhead(h.containerd.Dir)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, restore()) }()
	if err := dropCaches(); err != nil {
		return r, err
	}
	w, err := watch(root)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	id := newID()
	args := append(h.runArgs(), "--rootfs")
	if !s.ends() {
		args = append(args, "--detach")
	}
	for _, e := range cfg.Config.Env {
		args = append(args, "--env", e)
	}
	if _, err := h.containerd.Ctr(ctx, append(append(args, root, id), cfg.Config.Cmd...)...); err != nil {
		return r, err
	}
	if !s.ends() {
		if err := h.untilReady(ctx, id, s.ready); err != nil {
			return r, err
		}
	}
	r.files, err = w.stop()
	if err := errors.Join(err, h.end(ctx, id, s.ends())); err != nil {
		return r, err
	}
	for _, name := range r.files {
		n, err := residentBytes(filepath.Join(root, name))
		if err != nil {
			return r, err
		}
		r.residentBytes += n
	}
	return r, nil
}

// setReadAhead sets recordReadAhead for the disk that dir is on, until restore is called.
func setReadAhead(dir string) (restore func() error, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	device := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	path := filepath.Join(device, "queue", "read_ahead_kb")
	if _, err := os.Stat(filepath.Join(device, "partition")); err == nil {
		path = device + "/../queue/read_ahead_kb" // of the whole disk
	}
	was, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read-ahead of the disk of %s: %w", dir, err)
	}
	set := func(to []byte) error { return os.WriteFile(path, to, 0) }
	return func() error { return set(was) }, set([]byte(recordReadAhead))
}

// residentBytes of a file are in the page cache. It is asked by mincore, because
// cachestat knows nothing of what overlayfs has below.
func residentBytes(path string) (_ int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close() // read only
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return 0, err
	}
	mapped, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_NONE, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("mmap %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(mapped)) }()
	page := int64(os.Getpagesize())
	pages := make([]byte, (info.Size()+page-1)/page)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), uintptr(len(mapped)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		return 0, fmt.Errorf("mincore %s: %w", path, errno)
	}
	var resident int64
	for _, p := range pages {
		resident += int64(p&1) * page // the other bits are reserved
	}
	return min(resident, info.Size()), nil
}

// watcher notes the first use of every file of a mounted file system.
type watcher struct {
	notify *os.File
	root   string
	done   chan error
	files  []string
	seen   map[string]bool
}

func watch(root string) (*watcher, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	w := &watcher{notify: os.NewFile(uintptr(fd), "fanotify"), root: root, done: make(chan error, 1), seen: map[string]bool{}}
	// Of the file system, not of the mount: the container has a mount of its own.
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN|unix.FAN_ACCESS, unix.AT_FDCWD, root); err != nil {
		return nil, errors.Join(fmt.Errorf("fanotify of %s: %w", root, err), w.notify.Close())
	}
	go func() { w.done <- w.read() }()
	return w, nil
}

// stop gives the files.
func (w *watcher) stop() ([]string, error) {
	if err := w.close(); err != nil {
		return nil, err
	}
	return w.files, nil
}

// close may be called again.
func (w *watcher) close() error {
	if w.notify == nil {
		return nil
	}
	err := w.notify.Close()
	w.notify = nil
	return errors.Join(err, <-w.done)
}

// read takes events until the watcher is closed.
func (w *watcher) read() error {
	notify := w.notify
	buffer := make([]byte, 64<<10)
	for {
		n, err := notify.Read(buffer)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read fanotify: %w", err)
		}
		for rest := buffer[:n]; len(rest) > 0; {
			// struct fanotify_event_metadata: length at 0, the file's descriptor at 16.
			length, fd := binary.NativeEndian.Uint32(rest), int(int32(binary.NativeEndian.Uint32(rest[16:])))
			if length < uint32(unsafe.Sizeof(unix.FanotifyEventMetadata{})) || int(length) > len(rest) {
				return fmt.Errorf("fanotify: an event of %d bytes", length)
			}
			rest = rest[length:]
			if fd < 0 {
				return errors.New("fanotify: events were lost")
			}
			if err := errors.Join(w.note(fd), unix.Close(fd)); err != nil {
				return err
			}
		}
	}
}

// note takes in a regular file. The container's own view of it has the path in the
// image; the runtime's, before it has changed its root, has that of the mount before it.
func (w *watcher) note(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return err
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return err
	}
	name := cleanName(strings.TrimPrefix(path, w.root))
	if !w.seen[name] && !strings.HasSuffix(path, " (deleted)") {
		w.seen[name] = true
		w.files = append(w.files, name)
	}
	return nil
}
