package snapshot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// patience bounds every wait of a test; none is expected to come near it.
const patience = 2 * time.Minute

// The test binary runs itself again as a snapshotter that is killed.
const roleVariable = "ACCEL_SNAPSHOT_TEST_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(roleVariable); dir != "" {
		beKilled(dir)
		return
	}
	logrus.SetLevel(logrus.PanicLevel)                                                                   // containerd's packages log to it
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/docker/go-events.(*Broadcaster).run")) // distribution never ends it
}

func needsRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: NOT TESTED here, because mounting needs root")
	}
}

// trees are unpacked layers in a directory, which are bind-mounted as if they were loaded lazily: real mounts,
// without a registry and without EROFS. It is Images and Mounts at once.
type trees struct {
	dir   string // of one directory for each layer, named by its digest's hex
	erofs bool   // mounts an EROFS image of the tree, as the node will

	mu       sync.Mutex
	answer   func(ctx context.Context, r Request) (Lazy, error) // in place of what is there
	mount    func(layer digest.Digest, target string) error     // fails before a mount
	unmount  func(target string) error                          // fails before an unmount
	requests []Request
	mounts   int
}

func (l *trees) tree(layer digest.Digest) string { return filepath.Join(l.dir, layer.Encoded()) }

func (l *trees) Layer(ctx context.Context, r Request) (Lazy, error) {
	l.mu.Lock()
	l.requests = append(l.requests, r)
	answer := l.answer
	l.mu.Unlock()
	if answer != nil {
		return answer(ctx, r)
	}
	if _, err := os.Stat(l.tree(r.Layer)); err != nil {
		return Lazy{}, &Declined{Reason: "no such tree"}
	}
	return Lazy{Layer: r.Layer}, nil
}

func (l *trees) Mount(_ context.Context, layer digest.Digest, target string) error {
	l.mu.Lock()
	fail := l.mount
	l.mounts++
	l.mu.Unlock()
	if fail != nil {
		if err := fail(layer, target); err != nil {
			return err
		}
	}
	if l.erofs {
		image := l.tree(layer) + ".erofs"
		if out, err := exec.Command("mkfs.erofs", "--quiet", image, l.tree(layer)).CombinedOutput(); err != nil {
			return fmt.Errorf("mkfs.erofs: %w: %s", err, out)
		}
		return unix.Mount(image, target, "erofs", unix.MS_RDONLY, "")
	}
	if err := unix.Mount(l.tree(layer), target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", layer, err)
	}
	return unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

func (l *trees) Unmount(_ context.Context, target string) error {
	l.mu.Lock()
	fail := l.unmount
	l.mu.Unlock()
	if fail != nil {
		if err := fail(target); err != nil {
			return err
		}
	}
	for {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (l *trees) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

// add makes a layer with the given files and returns its digest.
func (l *trees) add(t testing.TB, files map[string]string) digest.Digest {
	t.Helper()
	names := slices.Sorted(maps.Keys(files))
	var all strings.Builder
	for _, n := range names {
		fmt.Fprintf(&all, "%q %q\n", n, files[n])
	}
	d := digest.FromString(all.String())
	for _, n := range names {
		path := filepath.Join(l.tree(d), n)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(files[n]), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// pins keeps its pins in files, because a process that is killed must not take them with it.
type pins struct {
	dir  string
	mu   sync.Mutex
	fail func(owner string) error
}

func (p *pins) path(owner string) string {
	return filepath.Join(p.dir, strings.ReplaceAll(owner, "/", "+"))
}

func (p *pins) Pin(owner string, layers ...digest.Digest) error {
	if p.fail != nil {
		if err := p.fail(owner); err != nil {
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	held := p.held(owner)
	for _, d := range layers {
		if !slices.Contains(held, d) {
			held = append(held, d)
		}
	}
	var lines strings.Builder
	for _, d := range held {
		fmt.Fprintln(&lines, d)
	}
	staged := p.path(owner) + ".new"
	return errors.Join(os.WriteFile(staged, []byte(lines.String()), 0o600), os.Rename(staged, p.path(owner)))
}

func (p *pins) Unpin(owner string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := os.Remove(p.path(owner))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %s", accel.ErrNotFound, owner)
	}
	return err
}

func (p *pins) all() map[string][]digest.Digest {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.read()
}

func (p *pins) read() map[string][]digest.Digest {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		panic(err)
	}
	all := map[string][]digest.Digest{}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".new") {
			continue
		}
		owner := strings.ReplaceAll(e.Name(), "+", "/")
		all[owner] = p.held(owner)
	}
	return all
}

func (p *pins) held(owner string) []digest.Digest {
	raw, err := os.ReadFile(p.path(owner))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		panic(err)
	}
	var held []digest.Digest
	for line := range strings.FieldsSeq(string(raw)) {
		held = append(held, digest.Digest(line))
	}
	return held
}

// equalise is what a node does with Owners before it goes on.
func (p *pins) equalise(owners map[string][]digest.Digest) error {
	var errs []error
	for owner := range p.all() {
		errs = append(errs, p.Unpin(owner))
	}
	for owner, layers := range owners {
		errs = append(errs, p.Pin(owner, layers...))
	}
	return errors.Join(errs...)
}

// bed is a snapshotter with its layers and pins, in a directory that outlives it.
type bed struct {
	*testing.T
	*Snapshotter
	ctx    context.Context
	dir    string
	layers *trees
	pins   *pins
	events []Event
	mu     sync.Mutex
}

func newBed(t *testing.T, change ...func(*Options)) *bed {
	t.Helper()
	needsRoot(t)
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "test"), patience)
	t.Cleanup(cancel)
	// Not the test's own directory: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "accel-snapshot-")
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{T: t, ctx: ctx, dir: dir, layers: &trees{dir: filepath.Join(dir, "layers")}, pins: &pins{dir: filepath.Join(dir, "pins")}}
	for _, d := range []string{b.layers.dir, b.pins.dir} {
		b.check(os.Mkdir(d, 0o755))
	}
	t.Cleanup(func() {
		if b.Snapshotter != nil {
			b.check(b.Close())
		}
		for _, m := range b.mountsBelow() {
			b.check(unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
		}
		b.check(os.RemoveAll(dir))
	})
	b.open(change...)
	return b
}

func (b *bed) check(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bed) options() Options {
	return Options{
		Dir: filepath.Join(b.dir, "s"), Images: b.layers, Mounts: b.layers, Pins: b.pins, Log: slog.New(slog.DiscardHandler),
		Observe: func(e Event) { b.mu.Lock(); defer b.mu.Unlock(); b.events = append(b.events, e) },
	}
}

// open starts the snapshotter as a node does.
func (b *bed) open(change ...func(*Options)) {
	b.Helper()
	o := b.options()
	for _, c := range change {
		c(&o)
	}
	s, err := Open(b.ctx, o)
	b.check(err)
	b.Snapshotter = s
	b.check(b.pins.equalise(s.Owners()))
	b.check(s.Restore(b.ctx))
}

// restart ends the snapshotter and starts another in its place.
func (b *bed) restart(change ...func(*Options)) {
	b.Helper()
	b.check(b.Close())
	b.open(change...)
}

// unmountAll is what a reboot does to mounts.
func (b *bed) unmountAll() {
	b.Helper()
	for _, m := range b.mountsBelow() {
		b.check(unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
}

// mountsBelow are the mount points in the bed's directory, the innermost first.
func (b *bed) mountsBelow() []string {
	b.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(b.dir))
	b.check(err)
	var points []string
	for _, m := range slices.Backward(infos) {
		points = append(points, m.Mountpoint)
	}
	return points
}

func (b *bed) event(i int) Event {
	b.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if i < 0 {
		i += len(b.events)
	}
	if i < 0 || i >= len(b.events) {
		b.Fatalf("there are only %d events", len(b.events))
	}
	return b.events[i]
}

// labelsOf are what containerd gives for layer i of an image.
func labelsOf(reference string, layers []digest.Digest, i int) map[string]string {
	above := make([]string, 0, len(layers))
	for _, l := range layers[i:] {
		above = append(above, l.String())
	}
	return map[string]string{
		snapshots.LabelSnapshotRef:             chain(layers, i),
		snapshots.LabelSnapshotDiffID:          layers[i].String(),
		snapshotters.TargetRefLabel:            reference,
		snapshotters.TargetManifestDigestLabel: digest.FromString(reference).String(),
		snapshotters.TargetLayerDigestLabel:    layers[i].String(),
		snapshotters.TargetImageLayersLabel:    strings.Join(above, ","),
	}
}

// chain is the name of layer i's snapshot; the layers' digests stand for their DiffIDs.
func chain(layers []digest.Digest, i int) string {
	return identity.ChainID(slices.Clone(layers[:i+1])).String()
}

// pull asks for an image's layers one after the other, as containerd does, and returns the topmost snapshot's name;
// every layer has to be mounted lazily.
func (b *bed) pull(reference string, layers ...digest.Digest) string {
	b.Helper()
	parent := ""
	for i := range layers {
		_, err := b.Prepare(b.ctx, fmt.Sprintf("extract-%s-%d %s", reference, i, chain(layers, i)), parent, snapshots.WithLabels(labelsOf(reference, layers, i)))
		if !errdefs.IsAlreadyExists(err) {
			b.Fatalf("layer %d of %s: %v, want that it is there", i, reference, err)
		}
		parent = chain(layers, i)
	}
	return parent
}

// consistent requires that metastore, directories, mounts and pins say the same.
func (b *bed) consistent() {
	b.Helper()
	owners := b.Owners()
	if got := b.pins.all(); !maps.EqualFunc(got, owners, slices.Equal) {
		b.Errorf("pins are %v, want %v", got, owners)
	}
	var mounted []string
	for _, m := range b.mountsBelow() {
		if id, ok := strings.CutPrefix(m, b.snapshots()+"/"); ok {
			mounted = append(mounted, Owner(strings.TrimSuffix(id, "/fs")))
		}
	}
	slices.Sort(mounted)
	if want := slices.Sorted(maps.Keys(owners)); !slices.Equal(mounted, want) {
		b.Errorf("mounted are %v, want %v", mounted, want)
	}
	orphans, err := b.orphans(b.ctx)
	if err != nil || len(orphans) > 0 {
		b.Errorf("directories without a snapshot: %v, %v", orphans, err)
	}
}
