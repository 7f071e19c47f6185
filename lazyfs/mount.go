package lazyfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// A mount carries all that we have to know about it: its source, as
// /proc/self/mountinfo tells it, is Dir/src/<holder's name, or "plain">/<layer in
// hex>, a symbolic link to the metadata. So there is no record of mounts that a crash
// could leave wrong.
const (
	sourcesDir  = "src"
	plainSource = "plain"
)

// MountInfo is one of our mounts.
type MountInfo struct {
	Digest digest.Digest
	Target string
	Lazy   bool // its content comes through a holder

	holder string // its holder's name
	id     int    // the kernel's
	parent int
}

// mountSpec is what a mount is made of.
type mountSpec struct {
	source string // the link; see sourcesDir
	meta   string
	data   string // the data file, or the holder's FUSE file
	lazy   bool   // it is the holder's
	loop   bool   // through loop devices
}

// makeMount makes a mount that is nowhere yet. Errors: ErrUnsupported, what the kernel gave with its words.
func makeMount(s mountSpec) (fd int, err error) {
	if s.loop {
		return makeLoopMount(s)
	}
	fd, err = newEROFS(s.source, s.meta, s.data, s.lazy)
	if errors.Is(err, unix.ENOTBLK) { // before Linux 6.12
		return makeLoopMount(s)
	}
	return fd, err
}

// newEROFS mounts what source is made to point to.
func newEROFS(source, meta, data string, lazy bool) (int, error) {
	if err := linkSource(source, meta); err != nil {
		return -1, err
	}
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOSYS) {
			err = fmt.Errorf("%w: no EROFS in this kernel: %w", ErrUnsupported, err)
		}
		return -1, err
	}
	defer closeFD(fs)
	if err = unix.FsconfigSetString(fs, "source", source); err == nil {
		err = unix.FsconfigSetFlag(fs, "ro")
	}
	if err == nil {
		err = unix.FsconfigSetString(fs, "device", data)
	}
	if err == nil {
		if lazy {
			// Reads ahead then do not wait for one another; older kernels do not
			// know it. A plain file is better read through its own page cache, which has what was
			// just filled.
			_ = unix.FsconfigSetFlag(fs, "directio")
		}
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return -1, fmt.Errorf("mount EROFS %s: %w%s", meta, err, kernelWords(fs))
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
}

// kernelWords is what the kernel says about a mount that failed.
func kernelWords(fs int) string {
	var words strings.Builder
	b := make([]byte, 1024)
	for range 16 { // it keeps 8 lines
		n, err := unix.Read(fs, b)
		if err != nil || n <= 0 {
			break
		}
		words.WriteString("; " + strings.TrimSpace(string(b[:n])))
	}
	return words.String()
}

// linkSource replaces the link at once: another mount may be about to follow it.
func linkSource(source, to string) error {
	if old, err := os.Readlink(source); err == nil && old == to {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(source), 0o700); err != nil {
		return err
	}
	temp := source + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, temp); err != nil {
		return err
	}
	return os.Rename(temp, source)
}

// moveBeneath is MOVE_MOUNT_BENEATH (Linux 6.5).
const moveBeneath = 0x200

// attach puts a mount made by makeMount at target.
func attach(fd int, target string, flags int) error {
	err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH|flags)
	if err != nil {
		return fmt.Errorf("attach mount at %s: %w", target, err)
	}
	return nil
}

// replace puts a mount in the place of the one that is at target. Who has that open,
// or has built an overlay on it, keeps it; who comes later gets the new one, and there
// is no moment without either. Where the kernel cannot put one beneath, the new one
// covers the old, which stays until both are unmounted.
func replace(fd int, target string) error {
	if err := attach(fd, target, moveBeneath); err == nil {
		return detach(target)
	}
	return attach(fd, target, 0)
}

func detach(target string) error {
	err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// canonical is target as the kernel tells it.
func canonical(target string) (string, error) {
	path, err := filepath.Abs(target)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real, nil
	}
	return path, nil // not there, or dead: as it was given
}

// mountsOf lists our mounts (of Options.Dir dir), and at which of their targets somebody else has
// mounted something too.
func mountsOf(ctx context.Context, dir string) (ours []MountInfo, foreign map[string]bool, err error) {
	if err := context.Cause(ctx); err != nil {
		return nil, nil, err
	}
	prefix := filepath.Join(dir, sourcesDir) + "/"
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, nil, err
	}
	places := map[string]bool{}
	for _, m := range all {
		rest, is := strings.CutPrefix(m.Source, prefix)
		holder, name, ok := strings.Cut(rest, "/")
		if !is || !ok || m.FSType != "erofs" {
			continue
		}
		info := MountInfo{Digest: digest.NewDigestFromEncoded(digest.SHA256, name), Target: m.Mountpoint, id: m.ID, parent: m.Parent}
		if holder != plainSource {
			info.Lazy, info.holder = true, holder
		}
		if info.Digest.Validate() != nil {
			continue
		}
		ours = append(ours, info)
		places[m.Mountpoint] = true
	}
	foreign = map[string]bool{}
	for _, m := range all {
		if places[m.Mountpoint] && !strings.HasPrefix(m.Source, prefix) {
			foreign[m.Mountpoint] = true
		}
	}
	return ours, foreign, nil
}

// stackAt is which of mounts are at target, the lowest first.
func stackAt(mounts []MountInfo, target string) []MountInfo {
	var stack []MountInfo
	for _, m := range mounts {
		if m.Target == target {
			stack = append(stack, m)
		}
	}
	// Each lies on its parent. The kernel lists them in no useful order: one that was put
	// beneath another is younger.
	slices.SortFunc(stack, func(a, b MountInfo) int { return depth(stack, a) - depth(stack, b) })
	return stack
}

func depth(stack []MountInfo, m MountInfo) int {
	n := 0
	for i := 0; i < len(stack); i++ {
		if stack[i].id == m.parent && n < len(stack) {
			n++
			m = stack[i]
			i = -1
		}
	}
	return n
}

// closeFD is for descriptors whose closing cannot fail in a way that matters.
func closeFD(fd int) { _ = unix.Close(fd) }
