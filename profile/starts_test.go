package profile_test

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"accel"
	"accel/profile"

	"golang.org/x/sys/unix"
)

// readAheadKB is what the kernel reads around a fault, its default.
const readAheadKB = 128

// record starts p on a file system of its own that was never read, and says which of
// the files' pages are in the kernel's cache once it is up. That knows no order, but it
// sees mapped pages, which a trace of system calls does not.
func (p program) record(t *testing.T, dirs []string, tree *profile.Tree) accel.Profile {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("recording a start needs root")
	}
	lookPath(t, "mke2fs", "mount", "chroot", "losetup", "blockdev")
	work := t.TempDir()
	for _, d := range []string{"merged", "disk", "upper", "scratch", "root"} {
		must(t, os.Mkdir(filepath.Join(work, d), 0o755))
	}
	merged, disk, root, image := filepath.Join(work, "merged"), filepath.Join(work, "disk"), filepath.Join(work, "root"), filepath.Join(work, "image")
	run(t, "mount", "-t", "overlay", "overlay", "-o", "ro,lowerdir="+dirs[2]+":"+dirs[1]+":"+dirs[0], merged)
	err := exec.CommandContext(t.Context(), "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", merged, image, "2G").Run()
	unmount(t, merged)
	must(t, err)
	out, err := exec.CommandContext(t.Context(), "losetup", "--show", "-r", "-f", image).Output()
	must(t, err)
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command("losetup", "-d", loop).Run() })
	run(t, "blockdev", "--setra", strconv.Itoa(2*readAheadKB), loop)
	run(t, "mount", "-o", "ro", loop, disk)
	defer unmount(t, disk)
	run(t, "mount", "-t", "overlay", "overlay", "-o", "lowerdir="+disk+",upperdir="+filepath.Join(work, "upper")+",workdir="+filepath.Join(work, "scratch"), root)
	defer unmount(t, root)
	for _, m := range []string{"proc", "dev"} {
		must(t, os.MkdirAll(filepath.Join(root, m), 0o755))
	}
	run(t, "mount", "-t", "proc", "proc", filepath.Join(root, "proc"))
	defer unmount(t, filepath.Join(root, "proc"))
	run(t, "mount", "--bind", "/dev", filepath.Join(root, "dev"))
	defer unmount(t, filepath.Join(root, "dev"))

	cmd := exec.CommandContext(t.Context(), p.command[0], p.command[1:]...)
	if !strings.Contains(p.command[0], "/") {
		e, real := tree.Resolve("usr/bin/" + p.command[0])
		if e == nil {
			if e, real = tree.Resolve("usr/sbin/" + p.command[0]); e == nil {
				t.Fatalf("no %s in the image", p.command[0])
			}
		}
		cmd.Path = "/" + real
	}
	cmd.Err = nil
	cmd.Env = []string{"PATH=" + debianPath}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Setpgid: true}
	log := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	defer func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
	}()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if exec.CommandContext(t.Context(), "sh", "-c", p.ready).Run() == nil {
			break
		}
		if time.Now().After(deadline) {
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			cmd.Wait()
			t.Fatalf("%s does not come up: %s", p.name, log)
		}
	}
	return resident(t, disk, tree)
}

// resident is which pages of a file system's files are in the kernel's cache.
func resident(t *testing.T, disk string, tree *profile.Tree) accel.Profile {
	t.Helper()
	p := accel.Profile{Manifest: imageA, Origin: accel.ProfileRecorded, Starts: 1, RecordedAt: dayOne}
	err := filepath.WalkDir(disk, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() == 0 {
			return err
		}
		rel, err := filepath.Rel(disk, name)
		if err != nil {
			return err
		}
		e, _ := tree.Lookup(rel)
		if e == nil {
			return fmt.Errorf("%s is not in the tree", rel)
		}
		pages, err := cached(name, info.Size())
		if err != nil {
			return fmt.Errorf("%s: %w", rel, err)
		}
		for n := 0; n < len(pages); n++ {
			first := n
			for n < len(pages) && pages[n]&1 != 0 {
				n++
			}
			if n > first {
				from, to := int64(first)*4096, min(int64(n)*4096, info.Size())
				p.Items = append(p.Items, accel.ProfileItem{Layer: e.Layer, Path: e.Path, Offset: from, Bytes: to - from, Content: e.Content})
			}
		}
		return nil
	})
	must(t, err)
	return p
}

func cached(name string, size int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOATIME, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(m)
	pages := make([]byte, (size+4095)/4096)
	if _, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(size), uintptr(unsafe.Pointer(&pages[0]))); e != 0 {
		return nil, e
	}
	return pages, nil
}
