package lazyfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// bury clears away what a dead holder left, and tells whose mounts died with it.
func (h *Host) bury(r *run, name string, open map[digest.Digest]int) {
	dir := filepath.Join(h.o.Dir, name)
	mounts, _, err := mountsOf(context.Background(), h.o.Dir)
	if err != nil {
		h.o.Log.Error("list mounts", "error", err)
	}
	died := map[digest.Digest]bool{}
	for _, m := range mounts {
		if m.holder == name {
			died[m.Digest] = true
		}
	}
	for d, opens := range open { // in places that we do not see, such as a container's
		if opens > 0 {
			died[d] = true
		}
	}
	err = unix.Unmount(filepath.Join(dir, holderFuse), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	switch {
	case err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT): // EINVAL: not mounted
		if err = os.RemoveAll(dir); err != nil {
			h.o.Log.Warn("remove a dead holder's directory", "error", err)
		}
	default:
		h.o.Log.Error("unmount a dead holder's FUSE", "holder", name, "error", err)
	}
	if err = os.RemoveAll(filepath.Join(h.o.Dir, sourcesDir, name)); err != nil {
		h.o.Log.Warn("remove", "error", err)
	}
	if len(died) == 0 {
		return
	}
	version, _, _ := strings.Cut(name, "@")
	h.o.Log.Error("a holder died, its mounts give errors", "holder", name, "layers", len(died), "log", h.lastWords(version))
	if h.o.HolderDied != nil {
		digests := make([]digest.Digest, 0, len(died))
		for d := range died {
			digests = append(digests, d)
		}
		slices.Sort(digests)
		r.working.Go(func() {
			select { // it may want to mount
			case <-h.adopted:
				h.o.HolderDied(digests)
			case <-r.ctx.Done():
			}
		})
	}
}

// lastWords is the end of what a holder said.
func (h *Host) lastWords(version string) string {
	const most = 2 << 10
	f, err := os.Open(h.logPath(version))
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, most)
	from := int64(0)
	if info, err := f.Stat(); err == nil {
		from = max(0, info.Size()-most)
	}
	n, _ := f.ReadAt(b, from) // io.EOF: it is shorter
	return strings.TrimSpace(string(b[:n]))
}

func (h *Host) logPath(version string) string { return filepath.Join(h.o.Dir, version+".log") }
