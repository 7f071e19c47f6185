package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// mounted reads a file of what a snapshot's mounts make.
func (b *bed) mounted(m []mount.Mount, file string) string {
	b.Helper()
	at, err := os.MkdirTemp(b.dir, "m")
	b.check(err)
	b.check(mount.All(m, at))
	raw, err := os.ReadFile(filepath.Join(at, file))
	b.check(err)
	b.check(mount.UnmountAll(at, 0))
	b.check(os.Remove(at))
	return string(raw)
}

func TestLazyImage(t *testing.T) {
	b := newBed(t)
	layers := []digest.Digest{b.layers.add(t, map[string]string{"etc/a": "one"}), b.layers.add(t, map[string]string{"etc/b": "two"})}
	top := b.pull("registry.example/app:1", layers...)
	b.consistent()
	m, err := b.Prepare(b.ctx, "container", top)
	b.check(err)
	if got := b.mounted(m, "etc/a") + b.mounted(m, "etc/b"); got != "onetwo" {
		t.Errorf("the container reads %q", got)
	}
	if e := b.event(-1); e.Kind != KindPrepared || !slices.Equal(e.Layers, []digest.Digest{layers[1], layers[0]}) {
		t.Errorf("the last event is %+v", e)
	}
	view, err := b.View(b.ctx, "view", chain(layers, 0))
	b.check(err)
	if len(view) != 1 || view[0].Type != "bind" || b.mounted(view, "etc/a") != "one" {
		t.Errorf("the view of one layer is %v", view)
	}
	want := Request{
		Namespace: "test", Reference: "registry.example/app:1", Manifest: digest.FromString("registry.example/app:1"),
		Layer: layers[0], Layers: layers, DiffID: layers[0], Chain: digest.Digest(chain(layers, 0)),
	}
	if got := b.layers.requests[0]; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("Images was asked for\n%+v, want\n%+v", got, want)
	}
	if err := b.Remove(b.ctx, top); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removal below a container: %v", err)
	}
	for _, key := range []string{"view", "container", top, chain(layers, 0)} {
		b.check(b.Remove(b.ctx, key))
	}
	b.consistent()
	if left := b.mountsBelow(); len(left) > 0 || len(b.pins.all()) > 0 {
		t.Errorf("left are %v and %v", left, b.pins.all())
	}
}

// TestDeclined goes through everything that has containerd download a layer.
func TestDeclined(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name, cause string
		change      func(b *bed, labels map[string]string)
	}{
		{"by Images", CauseImage, func(b *bed, _ map[string]string) {
			b.layers.answer = func(context.Context, Request) (Lazy, error) { return Lazy{}, &Declined{Reason: "policy"} }
		}},
		{"Images fails", CauseError, func(b *bed, _ map[string]string) {
			b.layers.answer = func(context.Context, Request) (Lazy, error) { return Lazy{}, broken }
		}},
		{"Images answers with no digest", CauseError, func(b *bed, _ map[string]string) {
			b.layers.answer = func(context.Context, Request) (Lazy, error) { return Lazy{Layer: "sha256:short"}, nil }
		}},
		{"Images hangs", CauseTimeout, func(b *bed, _ map[string]string) {
			b.layers.answer = func(ctx context.Context, _ Request) (Lazy, error) { <-ctx.Done(); return Lazy{}, ctx.Err() }
		}},
		{"mount fails", CauseMount, func(b *bed, _ map[string]string) {
			b.layers.mount = func(digest.Digest, string) error { return broken }
		}},
		{"mount does nothing", CauseMount, func(b *bed, labels map[string]string) {
			b.o.Mounts = noMounts{}
		}},
		{"pin fails", CauseMount, func(b *bed, _ map[string]string) {
			b.pins.fail = func(string) error { return broken }
		}},
		{"no image label", CauseLabels, func(_ *bed, labels map[string]string) { delete(labels, snapshotters.TargetRefLabel) }},
		{"no layer label", CauseLabels, func(_ *bed, labels map[string]string) { delete(labels, snapshotters.TargetLayerDigestLabel) }},
		{"bad manifest label", CauseLabels, func(_ *bed, labels map[string]string) { labels[snapshotters.TargetManifestDigestLabel] = "x" }},
		{"bad list of layers", CauseLabels, func(_ *bed, labels map[string]string) { labels[snapshotters.TargetImageLayersLabel] = "x,y" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, func(o *Options) { o.Limit = 50 * time.Millisecond })
			layer := b.layers.add(t, map[string]string{"a": "lazy"})
			labels := labelsOf("registry.example/app:1", []digest.Digest{layer}, 0)
			c.change(b, labels)
			m, err := b.Prepare(b.ctx, "extract", "", snapshots.WithLabels(labels))
			b.check(err)
			if e := b.event(-1); e.Kind != KindDeclined || e.Cause != c.cause || e.Reason == "" {
				t.Errorf("the event is %+v, want cause %s", e, c.cause)
			}
			// containerd unpacks, and uses what it unpacked.
			b.check(os.WriteFile(filepath.Join(m[0].Source, "a"), []byte("unpacked"), 0o644))
			b.check(b.Commit(b.ctx, "ns/1/chain", "extract", snapshots.WithLabels(labels)))
			m, err = b.Prepare(b.ctx, "container", "ns/1/chain")
			b.check(err)
			if got := b.mounted(m, "a"); got != "unpacked" {
				t.Errorf("the container reads %q", got)
			}
			b.consistent()
			if n := len(b.Lazy()); n != 0 {
				t.Errorf("%d lazy snapshots are left", n)
			}
		})
	}
}

type noMounts struct{}

func (noMounts) Mount(context.Context, digest.Digest, string) error { return nil }
func (noMounts) Unmount(context.Context, string) error              { return nil }

// TestGivenUp: containerd ended its call, and nobody would use an ordinary snapshot.
func TestGivenUp(t *testing.T) {
	b := newBed(t)
	layer := b.layers.add(t, map[string]string{"a": ""})
	ctx, cancel := context.WithCancel(b.ctx)
	b.layers.answer = func(ctx context.Context, _ Request) (Lazy, error) { cancel(); <-ctx.Done(); return Lazy{}, ctx.Err() }
	_, err := b.Prepare(ctx, "extract", "", snapshots.WithLabels(labelsOf("r", []digest.Digest{layer}, 0)))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if _, err := b.Stat(b.ctx, "extract"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot: %v", err)
	}
	b.consistent()
}

// TestLazyOnOrdinary: a layer that Images gives although the one below was declined, in two namespaces. Its name may
// not be the same in both, for what is below it is not.
func TestLazyOnOrdinary(t *testing.T) {
	b := newBed(t)
	lower, upper := digest.FromString("downloaded"), b.layers.add(t, map[string]string{"b": "lazy"})
	layers := []digest.Digest{lower, upper}
	for _, ns := range []string{"one", "two"} {
		m, err := b.Prepare(b.ctx, ns+"-extract", "", snapshots.WithLabels(labelsOf("r", layers, 0)))
		b.check(err)
		b.check(os.WriteFile(filepath.Join(m[0].Source, "a"), []byte(ns), 0o644))
		b.check(b.Commit(b.ctx, ns+"/1/lower", ns+"-extract", snapshots.WithLabels(labelsOf("r", layers, 0))))
		_, err = b.Prepare(b.ctx, ns+"-upper", ns+"/1/lower", snapshots.WithLabels(labelsOf("r", layers, 1)))
		if !errdefs.IsAlreadyExists(err) {
			t.Fatalf("upper layer: %v", err)
		}
		// As containerd looks for it.
		var names []string
		filter := fmt.Sprintf(`labels.%q==%s,parent==%q`, snapshots.LabelSnapshotRef, chain(layers, 1), ns+"/1/lower")
		b.check(b.Walk(b.ctx, func(_ context.Context, i snapshots.Info) error { names = append(names, i.Name); return nil }, filter))
		if len(names) != 1 {
			t.Fatalf("containerd finds %v", names)
		}
		m, err = b.Prepare(b.ctx, ns+"-container", names[0])
		b.check(err)
		if got := b.mounted(m, "a") + b.mounted(m, "b"); got != ns+"lazy" {
			t.Errorf("the container reads %q", got)
		}
	}
	b.consistent()
}

// TestShared: another namespace, or a second pull at the same time, takes the snapshot that is there; but only
// from the same layer.
func TestShared(t *testing.T) {
	b := newBed(t)
	layer := b.layers.add(t, map[string]string{"a": "one"})
	labels := labelsOf("r", []digest.Digest{layer}, 0)
	const pulls = 8
	var wg sync.WaitGroup
	for i := range pulls {
		wg.Go(func() {
			ctx := namespaces.WithNamespace(b.ctx, fmt.Sprint("ns", i))
			if _, err := b.Prepare(ctx, fmt.Sprint("extract", i), "", snapshots.WithLabels(maps.Clone(labels))); !errdefs.IsAlreadyExists(err) {
				t.Errorf("pull %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := len(b.Lazy()); n != 1 {
		t.Errorf("%d snapshots of one layer", n)
	}
	b.consistent()
	other := b.layers.add(t, map[string]string{"a": "two"})
	b.layers.answer = func(context.Context, Request) (Lazy, error) { return Lazy{Layer: other}, nil }
	if _, err := b.Prepare(b.ctx, "other", "", snapshots.WithLabels(labels)); err != nil {
		t.Errorf("the chain from another layer: %v, want an ordinary snapshot", err)
	}
	if e := b.event(-1); e.Cause != CauseConflict {
		t.Errorf("the event is %+v", e)
	}
}

// TestUpdateKeeps: containerd's updates may not take what a later daemon needs.
func TestUpdateKeeps(t *testing.T) {
	b := newBed(t)
	layers := []digest.Digest{b.layers.add(t, map[string]string{"a": "one"})}
	top := b.pull("registry.example/app:1", layers...)
	want := b.Lazy()
	for _, paths := range [][]string{nil, {"labels"}, {"labels." + snapshotters.TargetRefLabel, "labels.new"}, {"labels." + labelLayer, "labels.new"}} {
		info, err := b.Update(b.ctx, snapshots.Info{Name: top, Labels: map[string]string{"new": "x"}}, paths...)
		b.check(err)
		if info.Labels["new"] != "x" {
			t.Errorf("the update of %v did not come to be: %v", paths, info.Labels)
		}
		b.restart()
		if got := b.Lazy(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("after the update of %v there is\n%+v, want\n%+v", paths, got, want)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	b := newBed(t)
	if _, err := Open(b.ctx, Options{Dir: b.dir}); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("without its parts: %v", err)
	}
	o := b.options()
	o.Dir, o.MountOptions = filepath.Join(b.dir, "other"), []string{"lowerdir=/"}
	if _, err := Open(b.ctx, o); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("with a lowerdir: %v", err)
	}
	b.pull("r", b.layers.add(t, map[string]string{"a": ""})) // it has its file open now
	if _, err := Open(b.ctx, b.options()); !errors.Is(err, ErrLocked) {
		t.Errorf("a second one: %v", err)
	}
	l, err := Listen(b.ctx, filepath.Join(b.dir, "sock"))
	b.check(err)
	if _, err := Listen(b.ctx, filepath.Join(b.dir, "sock")); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("a second socket: %v", err)
	}
	b.check(l.Close())
	l, err = Listen(b.ctx, filepath.Join(b.dir, "sock")) // what a daemon that was killed left
	b.check(err)
	b.check(l.Close())
	if _, err := Listen(b.ctx, filepath.Join(b.dir, strings.Repeat("x", 100))); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a long socket: %v", err)
	}
}

func TestMountOptions(t *testing.T) {
	b := newBed(t, func(o *Options) { o.MountOptions, o.RemapIDs = []string{"index=on", "xino=off"}, true })
	top := b.pull("r", b.layers.add(t, map[string]string{"a": ""}), b.layers.add(t, map[string]string{"b": ""}))
	ids := map[string]string{snapshots.LabelSnapshotUIDMapping: "0:1000:65536", snapshots.LabelSnapshotGIDMapping: "1:1:5,0:2000:1"}
	m, err := b.Prepare(b.ctx, "container", top, snapshots.WithLabels(ids))
	b.check(err)
	for _, o := range []string{"index=on", "xino=off", "uidmap=0:1000:65536", "gidmap=1:1:5,0:2000:1"} {
		if !slices.Contains(m[0].Options, o) {
			t.Errorf("option %s is not in %v", o, m[0].Options)
		}
	}
	if slices.Contains(m[0].Options, "index=off") {
		t.Errorf("index is there twice: %v", m[0].Options)
	}
	ids[snapshots.LabelSnapshotUIDMapping] = "5:1:1"
	if _, err := b.Prepare(b.ctx, "second", top, snapshots.WithLabels(ids)); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a mapping without root: %v", err)
	}
	if _, err := b.Stat(b.ctx, "second"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot that was refused: %v", err)
	}
}
