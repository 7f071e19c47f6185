package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// memoryMagic and networkMagics are the file systems (statfs(2)) on which a cache is of little
// use, or its index unsafe.
const memoryMagic = 0x01021994 // tmpfs

var networkMagics = map[int64]string{0x6969: "NFS", 0xff534d42: "CIFS", 0xfe534d42: "SMB2", 0x65735546: "FUSE"}

// disk looks at the file system of the node's folder.
func (o *Options) disk(context.Context) []Finding {
	dir := filepath.Join(o.Root, o.Dir)
	at, exists, err := nearest(dir)
	if errors.Is(err, fs.ErrPermission) {
		return []Finding{warn("disk", err.Error(), "run accel doctor as the node's user")}
	}
	if err != nil {
		return []Finding{fail("disk", err.Error(), "choose another folder with data")}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		return []Finding{fail("disk", fmt.Sprintf("%s: %v", at, err), "choose another folder with data")}
	}
	block := int64(st.Bsize) //nolint:unconvert // 32 bits on some machines
	free, total := int64(st.Bavail)*block, int64(st.Blocks)*block
	room := fmt.Sprintf("%s: %s free of %s", dir, gigabytes(free), gigabytes(total))
	var found []Finding
	switch {
	case free < o.FreeFloorBytes:
		found = append(found, fail("disk", fmt.Sprintf("%s, below the free floor of %s: nothing is cached", room, gigabytes(o.FreeFloorBytes)),
			"make room, lower cache.free_floor, or choose another file system with data"))
	case !exists && o.BudgetBytes > 0 && free-o.FreeFloorBytes < o.BudgetBytes:
		found = append(found, warn("disk", fmt.Sprintf("%s: the budget of %s will not be reached before the free floor of %s", room, gigabytes(o.BudgetBytes), gigabytes(o.FreeFloorBytes)),
			"lower cache.budget, or choose a larger file system with data"))
	default:
		found = append(found, ok("disk", room))
	}
	if st.Files > 0 && st.Ffree < st.Files/20 {
		found = append(found, warn("disk", fmt.Sprintf("%s: %d of %d inodes are free", dir, st.Ffree, st.Files), "remove small files from this file system"))
	}
	if name, network := networkMagics[int64(st.Type)]; network { //nolint:unconvert // 32 bits on some machines
		found = append(found, fail("disk", dir+" is on "+name+", on which the index is not safe", "choose a local file system with data"))
	} else if st.Type == memoryMagic {
		found = append(found, warn("disk", dir+" is in memory (tmpfs): the cache is gone with the machine, and takes its memory", "choose a file system on disk with data"))
	}
	if err := unix.Access(at, unix.W_OK); err != nil {
		found = append(found, warn("disk", at+" cannot be written by this user", "run accel doctor as the node's user, or give it the folder"))
	}
	return found
}

// nearest is dir, or where it does not exist yet, the folder above that does.
func nearest(dir string) (at string, exists bool, err error) {
	for at = dir; ; at = filepath.Dir(at) {
		st, err := os.Stat(at)
		switch {
		case err == nil && st.IsDir():
			return at, at == dir, nil
		case err == nil:
			return "", false, fmt.Errorf("%s is no folder", at)
		case !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at):
			return "", false, err
		}
	}
}

func gigabytes(n int64) string { return fmt.Sprintf("%.1f GB", float64(n)/1e9) }
