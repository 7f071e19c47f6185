package snapshot

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"accel"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
)

// CanRemapIDs reports whether the kernel maps owners in an overlay's lower layers, which RemapIDs
// and containerd's capability "remap-ids" need.
func CanRemapIDs() bool {
	ok, err := overlayutils.SupportsIDMappedMounts()
	return ok && err == nil
}

// overlayOptions are those of each overlay mount, as containerd's own snapshotter has them.
func overlayOptions(dir string, given []string, log *slog.Logger) ([]string, error) {
	options := append([]string(nil), given...)
	for _, o := range given {
		switch name, _, _ := strings.Cut(o, "="); name {
		case "lowerdir", "upperdir", "workdir":
			return nil, fmt.Errorf("%w: mount option %q is not for the configuration", accel.ErrInvalid, o)
		}
	}
	if !has(options, "userxattr") {
		needed, err := overlayutils.NeedsUserXAttr(dir)
		if err != nil {
			log.Warn("cannot tell whether overlayfs needs the option userxattr", "taken_to_be", needed, "error", err)
		}
		if needed {
			options = append(options, "userxattr")
		}
	}
	// The kernel takes the last of an option that comes twice, so one that was given must stay the only one.
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil && !has(options, "index") {
		options = append(options, "index=off") // a lower layer may be below several overlays at once
	}
	return options, nil
}

// has says whether an option is given, with or without a value.
func has(options []string, name string) bool {
	for _, o := range options {
		if n, _, _ := strings.Cut(o, "="); n == name {
			return true
		}
	}
	return false
}

// mounts is what containerd has to mount for an active snapshot or a view.
func (s *Snapshotter) mounts(sn storage.Snapshot, info snapshots.Info) []mount.Mount {
	var options []string
	if s.o.RemapIDs {
		if v, ok := info.Labels[snapshots.LabelSnapshotUIDMapping]; ok {
			options = append(options, "uidmap="+v)
		}
		if v, ok := info.Labels[snapshots.LabelSnapshotGIDMapping]; ok {
			options = append(options, "gidmap="+v)
		}
	}
	view := sn.Kind == snapshots.KindView
	switch {
	case len(sn.ParentIDs) == 0 && view: // overlayfs needs a lower layer
		return bind(s.upperPath(sn.ID), append(options, "ro", "rbind"))
	case len(sn.ParentIDs) == 0:
		return bind(s.upperPath(sn.ID), append(options, "rw", "rbind"))
	case len(sn.ParentIDs) == 1 && view: // nor does it do with a lower one alone
		return bind(s.upperPath(sn.ParentIDs[0]), append(options, "ro", "rbind"))
	case !view:
		options = append(options, "workdir="+s.workPath(sn.ID), "upperdir="+s.upperPath(sn.ID))
	}
	lower := make([]string, len(sn.ParentIDs))
	for i, id := range sn.ParentIDs {
		lower[i] = s.upperPath(id)
	}
	options = append(options, "lowerdir="+strings.Join(lower, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, s.options...)}}
}

func bind(source string, options []string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: options}}
}

// rootOwner is who owns a container's root directory on the host, by the labels that map owners:
// lines of "container:host:size", joined by commas. Without such labels there is none.
func rootOwner(labels map[string]string) (uid, gid int, mapped bool, err error) {
	users, hasUsers := labels[snapshots.LabelSnapshotUIDMapping]
	groups, hasGroups := labels[snapshots.LabelSnapshotGIDMapping]
	if !hasUsers && !hasGroups {
		return 0, 0, false, nil
	}
	if uid, err = hostID(users); err == nil {
		gid, err = hostID(groups)
	}
	return uid, gid, true, err
}

// hostID is what 0 is mapped to.
func hostID(mapping string) (int, error) {
	for one := range strings.SplitSeq(mapping, ",") {
		fields := strings.Split(one, ":")
		if len(fields) != 3 {
			break
		}
		var n [3]uint64
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return 0, fmt.Errorf("%w: mapping of owners %q: %w", accel.ErrInvalid, mapping, err)
			}
			n[i] = v
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, fmt.Errorf("%w: mapping of owners %q says nothing of 0", accel.ErrInvalid, mapping)
}
