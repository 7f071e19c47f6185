package doctor

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The kernels from which on EROFS can be mounted with its data in other files: by loop
// devices, and from regular files themselves.
var (
	erofsByLoop = [2]int{5, 16}
	erofsByFile = [2]int{6, 12}
)

// kernel looks at what lazy mounts need. Without it, images are pulled in full, through the
// mirror, so nothing here is worse than a warning.
func (o *Options) kernel(context.Context) []Finding {
	release := firstLine(filepath.Join(o.Root, "/proc/sys/kernel/osrelease"))
	version, known := kernelVersion(release)
	var found []Finding
	switch {
	case !known:
		found = append(found, warn("kernel", fmt.Sprintf("release %q cannot be read", release), "lazy mounts want Linux 6.12 or later"))
	case older(version, erofsByLoop):
		found = append(found, warn("kernel", release+" is too old for lazy mounts: images are pulled in full", "use Linux 6.12 or later (5.16 at least)"))
	case older(version, erofsByFile):
		found = append(found, warn("kernel", release+" mounts EROFS through loop devices only", "use Linux 6.12 or later"))
	default:
		found = append(found, ok("kernel", release))
	}
	for _, fs := range []struct{ name, option, why string }{
		{"erofs", "CONFIG_EROFS_FS", "lazy mounts"},
		{"fuse", "CONFIG_FUSE_FS", "lazy mounts"},
		{"overlay", "CONFIG_OVERLAY_FS", "containers"},
	} {
		switch o.fileSystem(fs.name, release) {
		case inKernel:
			found = append(found, ok("kernel", "file system "+fs.name))
		case asModule:
			found = append(found, ok("kernel", "file system "+fs.name+" (a module, loaded when it is needed)"))
		default:
			found = append(found, warn("kernel", "no file system "+fs.name+", which "+fs.why+" need", "use a kernel with "+fs.option+", or load its module: modprobe "+fs.name))
		}
	}
	return found
}

type presence int

const (
	absent presence = iota
	inKernel
	asModule
)

// fileSystem says whether the kernel knows a file system, or could load it.
func (o *Options) fileSystem(name, release string) presence {
	for line := range lines(filepath.Join(o.Root, "/proc/filesystems")) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[len(fields)-1] == name {
			return inKernel
		}
	}
	modules := filepath.Join(o.Root, "/lib/modules", release)
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		for line := range lines(filepath.Join(modules, list)) {
			path, _, _ := strings.Cut(line, ":")
			if module, _, _ := strings.Cut(filepath.Base(path), "."); module == name {
				return asModule
			}
		}
	}
	return absent
}

// lines iterates over a file's lines; a file that cannot be read has none.
func lines(path string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		f, err := os.Open(path)
		if err != nil {
			return
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if !yield(s.Text()) {
				return
			}
		}
	}
}

func firstLine(path string) string {
	for line := range lines(path) {
		return line
	}
	return ""
}

// kernelVersion reads "6.12.3-arch1".
func kernelVersion(release string) (v [2]int, known bool) {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return v, false
	}
	for i := range v {
		digits := parts[i][:len(parts[i])-len(strings.TrimLeft(parts[i], "0123456789"))]
		n, err := strconv.Atoi(digits)
		if err != nil {
			return v, false
		}
		v[i] = n
	}
	return v, true
}

func older(v, than [2]int) bool {
	return v[0] < than[0] || v[0] == than[0] && v[1] < than[1]
}
