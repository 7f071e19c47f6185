package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"accel/install"
	"accel/trust"

	"github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/api/services/snapshots/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// overlayMagic is overlayfs (statfs(2)), on whose files the kernel mounts no EROFS.
const overlayMagic = 0x794c7630

// lazy looks at what lazy mounts need beside the kernel. Where it lacks, images are pulled in
// full, so that is a warning; but where containerd asks for snapshots nobody may be away.
func (o *Options) lazy(ctx context.Context) []Finding {
	s := o.Install.Snapshotter
	if s == nil {
		return []Finding{ok("lazy", "images are not mounted lazily (snapshotter.socket is empty)")}
	}
	var found []Finding
	if !o.Lazy {
		found = append(found, warn("lazy", "switched off: every new pull is an ordinary one", "lazy: on in the node's configuration"))
	}
	found = append(found, o.device("/dev/fuse", "fuse"))
	if v, known := kernelVersion(firstLine(filepath.Join(o.Root, "/proc/sys/kernel/osrelease"))); known && older(v, erofsByFile) {
		found = append(found, o.device("/dev/loop-control", "loop"))
	}
	found = append(found, o.runtimeDir(), o.mountable(), o.keys())
	found = append(found, o.served(ctx)...)
	return append(found, o.asked(ctx, *s)...)
}

// device looks for one that a module of the kernel makes.
func (o *Options) device(path, module string) Finding {
	st, err := os.Stat(filepath.Join(o.Root, path))
	switch {
	case err != nil:
		return warn("lazy", err.Error(), "modprobe "+module+"; in a container, give it the device")
	case st.Mode()&fs.ModeCharDevice == 0:
		return warn("lazy", path+" is no device", "remove it, and modprobe "+module)
	default:
		return ok("lazy", path+" is there")
	}
}

// fileSystemOf is the kind of file system (statfs(2)) that a folder is on, or will be.
func (o *Options) fileSystemOf(dir string) (int64, error) {
	at, _, err := nearest(filepath.Join(o.Root, dir))
	if err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", at, err)
	}
	return int64(st.Type), nil //nolint:unconvert // 32 bits on some machines
}

func (o *Options) runtimeDir() Finding {
	kind, err := o.fileSystemOf(o.RuntimeDir)
	switch {
	case err != nil:
		return warn("lazy", err.Error(), "run accel doctor as root, or choose another folder with snapshotter.runtime")
	case kind != memoryMagic:
		return warn("lazy", o.RuntimeDir+" is not on tmpfs: what it says of mounts outlives them when the machine is started again", "choose a folder below /run with snapshotter.runtime")
	default:
		return ok("lazy", o.RuntimeDir+" is on tmpfs")
	}
}

func (o *Options) mountable() Finding {
	kind, err := o.fileSystemOf(o.Dir)
	if err == nil && kind == overlayMagic {
		return warn("lazy", o.Dir+" is on overlayfs, from whose files the kernel mounts nothing: images are pulled in full", "choose a folder on a file system of its own with data")
	}
	if err != nil {
		return warn("lazy", err.Error(), "run accel doctor as root, or choose another folder with data")
	}
	return ok("lazy", "images can be mounted from "+o.Dir)
}

// keys looks for somebody whose mappings are believed.
func (o *Options) keys() Finding {
	if o.KeysFile == "" && o.Server == "" {
		return warn("lazy", "nobody's mappings are believed: only images that are eStargz themselves are mounted lazily", "set server.url, or snapshotter.keys to a file that accel keys export wrote")
	}
	if o.KeysFile == "" {
		return ok("lazy", "mappings of "+o.Server+" are believed")
	}
	text, err := os.ReadFile(filepath.Join(o.Root, o.KeysFile))
	if err != nil {
		return fail("lazy", "snapshotter.keys: "+err.Error(), "write the file with accel keys export, or take the key out")
	}
	if _, err := trust.NewVerifier(text); err != nil { // as the node reads it
		return fail("lazy", "snapshotter.keys: "+o.KeysFile+": "+err.Error(), "write the file with accel keys export; with this one the node answers containerd for no snapshots")
	}
	return ok("lazy", "mappings signed by the keys in "+o.KeysFile+" are believed")
}

// served: only root may mount, and what serves the mounts has to live. Whether the node runs at all is another finding.
func (o *Options) served(ctx context.Context) []Finding {
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	s, err := o.Node.Status(ctx)
	if err != nil {
		return nil
	}
	st, err := os.Stat(filepath.Join("/proc", fmt.Sprint(s.PID)))
	if err != nil {
		return nil // it has ended meanwhile
	}
	if owner, known := st.Sys().(*syscall.Stat_t); known && owner.Uid != 0 {
		return []Finding{warn("lazy", fmt.Sprintf("the node runs as user %d, who may not mount: images are pulled in full", owner.Uid), "run it as root, as the unit of accel node install does")}
	}
	found := []Finding{ok("lazy", "the node runs as root")}
	if at := s.HolderDiedAt; at != nil {
		found = append(found, warn("lazy", "the process that serves lazy mounts died at "+at.Local().Format(time.DateTime)+": containers from before get I/O errors for what they had not read",
			"start them anew; new containers have mounts that work. The log of the node and the kernel's (out of memory?) say why. The finding goes with the daemon's next start"))
	}
	return found
}

// asked says whether containerd asks the node for snapshots, and the node answers.
func (o *Options) asked(ctx context.Context, s install.Snapshotter) []Finding {
	var found []Finding
	version, versionErr := o.containerdVersion(ctx)
	conf, err := install.ReadContainerd(o.Root, o.ContainerdConfig, version)
	if versionErr != nil && (err != nil || !conf.Exists) {
		return nil // containerd is not here, which is another finding
	}
	uses := err == nil && conf.Snapshotter == install.SnapshotterName
	switch problem, mend := conf.SnapshotterProblem(s); {
	case err != nil: // another finding
	case problem != "":
		found = append(found, warn("lazy", problem, mend))
	default:
		found = append(found, ok("lazy", "containerd's configuration asks for snapshots at "+s.Socket))
	}
	if versionErr == nil {
		switch loaded, err := o.loaded(ctx); {
		case err != nil:
			found = append(found, warn("lazy", "containerd does not say which snapshotters it has: "+err.Error(), "look at its log: journalctl -u containerd"))
		case loaded:
			found = append(found, ok("lazy", "containerd runs with the snapshotter "+install.SnapshotterName))
		case uses:
			found = append(found, fail("lazy", "containerd runs without the snapshotter that its configuration has", "systemctl restart containerd, while the node runs; containers go on"))
		}
	}
	socket := filepath.Join(o.Root, s.Socket)
	switch err := o.answers(ctx, socket); {
	case err == nil:
		found = append(found, ok("lazy", "the node answers for snapshots on "+s.Socket))
	case errors.Is(err, fs.ErrPermission):
		found = append(found, warn("lazy", fmt.Sprintf("the node's socket %s may not be used: %v", s.Socket, err), "run accel doctor as root"))
	case uses:
		found = append(found, fail("lazy", fmt.Sprintf("containerd asks for snapshots on %s, where nobody answers: no container starts (%v)", s.Socket, err), "systemctl start accel-node; its log says why it does not answer: journalctl -u accel-node"))
	default:
		found = append(found, warn("lazy", fmt.Sprintf("nobody answers for snapshots on %s (%v)", s.Socket, err), "systemctl start accel-node; its log says why it does not answer: journalctl -u accel-node"))
	}
	return found
}

// loaded: the running containerd has the plugin.
func (o *Options) loaded(ctx context.Context) (there bool, err error) {
	err = o.call(ctx, filepath.Join(o.Root, o.ContainerdSocket), func(ctx context.Context, conn *grpc.ClientConn) error {
		answer, err := introspection.NewIntrospectionClient(conn).Plugins(ctx, &introspection.PluginsRequest{
			Filters: []string{"type==io.containerd.snapshotter.v1,id==" + install.SnapshotterName},
		})
		there = err == nil && len(answer.Plugins) > 0
		return err
	})
	return there, err
}

// answers asks the node for a snapshot that there is not.
func (o *Options) answers(ctx context.Context, socket string) error {
	return o.call(ctx, socket, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := snapshots.NewSnapshotsClient(conn).Stat(ctx, &snapshots.StatSnapshotRequest{Snapshotter: install.SnapshotterName, Key: "accel doctor looks whether there is an answer"})
		if status.Code(err) == codes.NotFound {
			return nil
		}
		return err
	})
}

// call asks a gRPC service on a unix socket.
func (o *Options) call(ctx context.Context, socket string, ask func(context.Context, *grpc.ClientConn) error) error {
	if _, err := os.Stat(socket); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	err = ask(ctx, conn)
	_ = conn.Close()
	return err
}
