package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// TestRestart: live mounts are adopted, not made again.
func TestRestart(t *testing.T) {
	b := newBed(t)
	top := b.pull("r", b.layers.add(t, map[string]string{"a": "one"}), b.layers.add(t, map[string]string{"b": "two"}))
	before, mounts := b.layers.mounts, b.mountsBelow()
	held, err := os.Open(filepath.Join(mounts[0], "b")) // as a container's process
	b.check(err)
	defer held.Close()
	b.restart()
	if got := b.mountsBelow(); !slices.Equal(got, mounts) || b.layers.mounts != before {
		t.Errorf("mounted are %v after %v; %d mounts more", got, mounts, b.layers.mounts-before)
	}
	m, err := b.Prepare(b.ctx, "container", top)
	b.check(err)
	if got := b.mounted(m, "a") + b.mounted(m, "b"); got != "onetwo" {
		t.Errorf("the container reads %q", got)
	}
	b.consistent()
}

// TestReboot: all mounts are gone, and half of the directories too, which a power loss may take.
func TestReboot(t *testing.T) {
	b := newBed(t)
	var layers []digest.Digest
	for i := range 20 {
		layers = append(layers, b.layers.add(t, map[string]string{fmt.Sprint("f", i): fmt.Sprint(i)}))
	}
	top := b.pull("r", layers...)
	m, err := b.Prepare(b.ctx, "container", top)
	b.check(err)
	before := b.mounted(m, "f7")
	b.unmountAll()
	for i, s := range b.Lazy() {
		if i%2 == 0 {
			b.check(os.RemoveAll(b.folder(s.ID)))
		}
	}
	b.restart()
	b.consistent()
	m, err = b.Mounts(b.ctx, "container")
	b.check(err)
	if got := b.mounted(m, "f7"); got != before {
		t.Errorf("the container reads %q, before it was %q", got, before)
	}
}

// TestBad: one snapshot cannot be mounted. All else works, containers on it are refused with the reason, and when the
// layer is back they start.
func TestBad(t *testing.T) {
	b := newBed(t)
	lost, good := b.layers.add(t, map[string]string{"a": "lost"}), b.layers.add(t, map[string]string{"b": "good"})
	onLost, onGood := b.pull("lost", lost), b.pull("good", good)
	b.unmountAll()
	aside := filepath.Join(b.dir, "aside")
	b.check(os.Rename(b.layers.tree(lost), aside))
	b.restart()
	bad := b.Bad()
	if len(bad) != 1 || bad[0].Layer != lost || bad[0].Request.Reference != "lost" || bad[0].Reason == "" || bad[0].SetAside {
		t.Fatalf("bad are %+v", bad)
	}
	_, err := b.Prepare(b.ctx, "container", onLost)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "lost") {
		t.Errorf("a container on the lost layer: %v", err)
	}
	if _, err := b.Stat(b.ctx, "container"); !errdefs.IsNotFound(err) {
		t.Errorf("its snapshot: %v", err)
	}
	m, err := b.Prepare(b.ctx, "good", onGood)
	b.check(err)
	if got := b.mounted(m, "b"); got != "good" {
		t.Errorf("the good one reads %q", got)
	}
	b.check(os.Rename(aside, b.layers.tree(lost)))
	m, err = b.Prepare(b.ctx, "container", onLost)
	b.check(err)
	if got := b.mounted(m, "a"); got != "lost" || len(b.Bad()) != 0 {
		t.Errorf("the container reads %q; bad are %v", got, b.Bad())
	}
	b.consistent()
	// A bad one can be removed.
	b.check(b.Remove(b.ctx, "container"))
	b.unmountAll()
	b.check(os.RemoveAll(b.layers.tree(lost)))
	b.restart()
	b.check(b.Remove(b.ctx, onLost))
	if len(b.Bad()) != 0 {
		t.Errorf("bad are %v", b.Bad())
	}
	b.consistent()
}

// TestResolvedAgain: the content is lost, and what containerd once said of the layer brings another form of it.
func TestResolvedAgain(t *testing.T) {
	b := newBed(t)
	old := b.layers.add(t, map[string]string{"a": "old"})
	top := b.pull("registry.example/app:1", old)
	asked := b.layers.requests[0]
	b.unmountAll()
	b.check(os.RemoveAll(b.layers.tree(old)))
	anew := b.layers.add(t, map[string]string{"a": "new"})
	b.layers.answer = func(_ context.Context, r Request) (Lazy, error) { return Lazy{Layer: anew}, nil }
	b.restart()
	if got := b.layers.requests[len(b.layers.requests)-1]; fmt.Sprint(got) != fmt.Sprint(asked) {
		t.Errorf("Images was asked for\n%+v, want\n%+v", got, asked)
	}
	m, err := b.Prepare(b.ctx, "container", top)
	b.check(err)
	if got := b.mounted(m, "a"); got != "new" {
		t.Errorf("the container reads %q", got)
	}
	b.layers.answer = nil
	b.restart() // what is mounted now is what is pinned
	if l := b.Lazy(); len(l) != 1 || l[0].Layer != anew {
		t.Errorf("there are %+v", l)
	}
	b.consistent()
}

// TestSlowRestore: a mount that hangs does not keep the node from starting.
func TestSlowRestore(t *testing.T) {
	b := newBed(t)
	top := b.pull("r", b.layers.add(t, map[string]string{"a": ""}))
	b.unmountAll()
	b.check(b.Close())
	slow := make(chan struct{})
	o := b.options()
	o.StartLimit, o.Limit = 50*time.Millisecond, 50*time.Millisecond
	o.Mounts = &hanging{trees: b.layers, open: slow}
	s, err := Open(b.ctx, o)
	b.check(err)
	b.Snapshotter = s
	b.check(s.Restore(b.ctx))
	if bad := s.Bad(); len(bad) != 1 {
		t.Fatalf("bad are %+v", bad)
	}
	if _, err := s.Prepare(b.ctx, "container", top); !errdefs.IsUnavailable(err) {
		t.Errorf("a container: %v", err)
	}
	close(slow)
	if _, err := s.Prepare(b.ctx, "container", top); err != nil {
		t.Errorf("a container when it is back: %v", err)
	}
	b.consistent()
}

// hanging mounts nothing until open is closed.
type hanging struct {
	*trees
	open chan struct{}
}

func (h *hanging) Mount(ctx context.Context, layer digest.Digest, target string) error {
	select {
	case <-h.open:
		return h.trees.Mount(ctx, layer, target)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func TestSetAside(t *testing.T) {
	b := newBed(t)
	layer := b.layers.add(t, map[string]string{"a": "lie"})
	top := b.pull("r", layer)
	m, err := b.Prepare(b.ctx, "running", top)
	b.check(err)
	if err := b.SetAside(b.ctx, "77", "x"); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("an unknown one: %v", err)
	}
	if err := b.SetAside(b.ctx, b.Lazy()[0].ID, ""); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("without a reason: %v", err)
	}
	b.check(b.SetAside(b.ctx, b.Lazy()[0].ID, "its DiffID is another one"))
	if got := b.mounted(m, "a"); got != "lie" {
		t.Errorf("what runs reads %q", got)
	}
	for range 2 {
		if bad := b.Bad(); len(bad) != 1 || !bad[0].SetAside || bad[0].Reason != "its DiffID is another one" {
			t.Fatalf("bad are %+v", bad)
		}
		if _, err := b.Prepare(b.ctx, "container", top); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "DiffID") {
			t.Errorf("a container: %v", err)
		}
		// Another namespace does not get it either.
		if _, err := b.Prepare(b.ctx, "extract", "", snapshots.WithLabels(labelsOf("r", []digest.Digest{layer}, 0))); err != nil {
			t.Errorf("another pull: %v, want an ordinary snapshot", err)
		}
		b.check(b.Remove(b.ctx, "extract"))
		b.consistent()
		b.restart()
	}
	b.check(b.Remove(b.ctx, "running"))
	b.check(b.Remove(b.ctx, top))
	b.consistent()
	b.pull("r", layer)
}

// TestRemount: what served a layer is gone, and new containers get a new mount.
func TestRemount(t *testing.T) {
	b := newBed(t)
	layer := b.layers.add(t, map[string]string{"a": "one"})
	top := b.pull("r", layer)
	path := filepath.Join(b.mountsBelow()[0], "a")
	old, err := os.Open(path)
	b.check(err)
	defer old.Close()
	b.check(os.Rename(b.layers.tree(layer), b.layers.tree(layer)+"-dead"))
	b.check(os.Mkdir(b.layers.tree(layer), 0o755))
	b.check(os.WriteFile(filepath.Join(b.layers.tree(layer), "a"), []byte("new"), 0o644))
	gaps := 0
	b.layers.set(func() { b.layers.unmount = func(string) error { gaps++; return nil } })
	b.check(b.Remount(b.ctx, layer))
	if b.layers.set(func() { b.layers.unmount = nil }); gaps > 0 {
		t.Error("there was a moment without either mount")
	}
	m, err := b.Prepare(b.ctx, "container", top)
	b.check(err)
	if got := b.mounted(m, "a"); got != "new" {
		t.Errorf("the container reads %q", got)
	}
	b.check(unix.Unmount(filepath.Dir(path), unix.MNT_DETACH)) // trees lay the new one over the old
	b.consistent()
}

// TestRemountInPlaceFails: where the old mount cannot be replaced it is taken away, and what is mounted then is the layer that stands
// for it now.
func TestRemountInPlaceFails(t *testing.T) {
	b := newBed(t)
	layer, next := b.layers.add(t, map[string]string{"a": "one"}), b.layers.add(t, map[string]string{"a": "two"})
	top := b.pull("r", layer)
	b.layers.set(func() {
		b.layers.mount = func(d digest.Digest, target string) error {
			if mounted, err := mountedAt(target); mounted || d != next {
				return errors.Join(errors.New("not here"), err)
			}
			return nil
		}
		b.layers.answer = func(context.Context, Request) (Lazy, error) { return Lazy{Layer: next}, nil }
	})
	b.check(b.Remount(b.ctx, layer))
	b.layers.set(func() { b.layers.mount = nil })
	m, err := b.Prepare(b.ctx, "container", top)
	b.check(err)
	if got := b.mounted(m, "a"); got != "two" {
		t.Errorf("the container reads %q", got)
	}
}

// TestVanishedMount: somebody unmounted a layer, and no container gets to see an empty one.
func TestVanishedMount(t *testing.T) {
	b := newBed(t)
	top := b.pull("r", b.layers.add(t, map[string]string{"a": "one"}), b.layers.add(t, map[string]string{"b": "two"}))
	_, err := b.Prepare(b.ctx, "container", top)
	b.check(err)
	for _, ask := range []func() (string, error){
		func() (string, error) { m, err := b.Mounts(b.ctx, "container"); return b.mounted(m, "a"), err },
		func() (string, error) { m, err := b.View(b.ctx, "view", top); return b.mounted(m, "a"), err },
	} {
		b.unmountAll()
		if got, err := ask(); err != nil || got != "one" {
			t.Errorf("it reads %q, %v", got, err)
		}
	}
	b.consistent()
}

// TestStackedMounts: a layer that became complete is mounted over its lazy mount.
func TestStackedMounts(t *testing.T) {
	b := newBed(t)
	layer := b.layers.add(t, map[string]string{"a": "one"})
	top := b.pull("r", layer)
	b.check(b.layers.Mount(b.ctx, layer, b.mountsBelow()[0]))
	b.restart()
	b.check(b.Remove(b.ctx, top))
	b.consistent()
}

// TestUnmountFails: for containerd the snapshot is gone, and the next clean-up takes what is left.
func TestUnmountFails(t *testing.T) {
	b := newBed(t)
	layer := b.layers.add(t, map[string]string{"a": "one"})
	for _, cleanUp := range []func() error{
		func() error { return b.Cleanup(b.ctx) },
		func() error { b.restart(); return nil },
	} {
		top := b.pull("r", layer)
		b.layers.set(func() { b.layers.unmount = func(string) error { return errors.New("busy") } })
		b.check(b.Remove(b.ctx, top))
		if len(b.mountsBelow()) != 1 || len(b.pins.all()) != 1 {
			t.Errorf("mounted are %v, pins %v: a layer that is mounted has to be pinned", b.mountsBelow(), b.pins.all())
		}
		if err := b.Cleanup(b.ctx); err == nil {
			t.Error("the clean-up says nothing of it")
		}
		b.layers.set(func() { b.layers.unmount = nil })
		b.check(cleanUp())
		b.consistent()
	}
	if raw, err := os.ReadFile(filepath.Join(b.layers.tree(layer), "a")); err != nil || string(raw) != "one" {
		t.Errorf("the layer's content was touched: %q, %v", raw, err)
	}
}

// TestLeftByCrash: each state in which a kill can leave a snapshot that was being made or removed.
func TestLeftByCrash(t *testing.T) {
	b := newBed(t)
	layer := b.layers.add(t, map[string]string{"a": "one"})
	labels := lazyLabels(labelsOf("r", []digest.Digest{layer}, 0), "test", layer)
	for _, c := range []struct {
		name  string
		leave func()
	}{
		{"staged directory", func() {
			b.check(makeInside(mustTemp(b, stagedPrefix), snapshots.KindActive))
		}},
		{"directory without a row, with the next ID", func() {
			b.check(os.MkdirAll(filepath.Join(b.folder(fmt.Sprint(nextID(b))), "fs", "x"), 0o755))
		}},
		{"row only", func() {
			_, _, err := b.create(b.ctx, snapshots.KindActive, "k", "", snapshots.WithLabels(labels))
			b.check(err)
		}},
		{"pinned", func() {
			sn, _, err := b.create(b.ctx, snapshots.KindActive, "k", "", snapshots.WithLabels(labels))
			b.check(errors.Join(err, b.pins.Pin(Owner(sn.ID), layer)))
		}},
		{"mounted", func() {
			sn, _, err := b.create(b.ctx, snapshots.KindActive, "k", "", snapshots.WithLabels(labels))
			b.check(errors.Join(err, b.pins.Pin(Owner(sn.ID), layer), b.layers.Mount(b.ctx, layer, b.upperPath(sn.ID))))
		}},
		{"row removed", func() {
			top := b.pull("r", layer)
			b.check(b.store.WithTransaction(b.ctx, true, func(ctx context.Context) error { _, _, err := storage.Remove(ctx, top); return err }))
		}},
		{"row removed, unmounted", func() {
			top := b.pull("r", layer)
			b.check(b.store.WithTransaction(b.ctx, true, func(ctx context.Context) error { _, _, err := storage.Remove(ctx, top); return err }))
			b.unmountAll()
		}},
		{"a pin of a snapshot that is no more", func() { b.check(b.pins.Pin(Owner("999"), layer)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.leave()
			b.restart()
			b.consistent()
			if len(b.mountsBelow()) > 0 || len(b.pins.all()) > 0 {
				t.Errorf("left are %v and %v", b.mountsBelow(), b.pins.all())
			}
			b.check(b.Walk(b.ctx, func(_ context.Context, i snapshots.Info) error {
				t.Errorf("left is snapshot %s", i.Name)
				return nil
			}))
			b.check(b.Remove(b.ctx, b.pull("r", layer))) // it can be pulled again
		})
	}
}

func mustTemp(b *bed, prefix string) string {
	b.Helper()
	dir, err := os.MkdirTemp(b.snapshots(), prefix)
	b.check(err)
	return dir
}

// nextID is the ID that the next snapshot gets.
func nextID(b *bed) int {
	b.Helper()
	sn, _, err := b.create(b.ctx, snapshots.KindActive, "probe", "")
	b.check(err)
	b.check(b.Remove(b.ctx, "probe"))
	var id int
	_, err = fmt.Sscan(sn.ID, &id)
	b.check(err)
	return id + 1
}

// TestDamagedMetadata: the error names the file and says what to do; nothing is deleted.
func TestDamagedMetadata(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(path string) error
	}{
		{"missing", os.Remove},
		{"noise", func(path string) error {
			return os.WriteFile(path, []byte(strings.Repeat("\xff\x13 noise ", 8000)), 0o600)
		}},
		{"cut short", func(path string) error { return os.Truncate(path, 5000) }},
		{"pages overwritten", func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			info, err := f.Stat()
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte(strings.Repeat("\xfe", int(info.Size())-8192)), 8192)
			return errors.Join(err, f.Close())
		}},
		{"died while reading it", func(path string) error {
			return os.WriteFile(path+".opening", []byte(strings.Repeat(".", openAttempts)), 0o600)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			top := b.pull("r", b.layers.add(t, map[string]string{"a": "one"}))
			_, err := b.Prepare(b.ctx, "container", top)
			b.check(err)
			before := b.mountsBelow()
			b.check(b.Close())
			b.Snapshotter = nil
			path := filepath.Join(b.dir, "s", storeName)
			b.check(c.damage(path))
			_, err = Open(b.ctx, b.options())
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "move the folder") {
				t.Errorf("error %v", err)
			}
			if got := b.mountsBelow(); !slices.Equal(got, before) {
				t.Errorf("mounted are %v, before there were %v", got, before)
			}
			// What the message says helps.
			b.check(os.Rename(filepath.Join(b.dir, "s"), filepath.Join(b.dir, "moved")))
			for _, m := range b.mountsBelow() {
				b.check(unix.Unmount(m, unix.MNT_DETACH))
			}
			for owner := range b.pins.all() {
				b.check(b.pins.Unpin(owner))
			}
			b.open()
			b.pull("r", b.layers.add(t, map[string]string{"a": "one"}))
			b.consistent()
		})
	}
}

// TestDamagedAtFirstStart: the power went before there was anything.
func TestDamagedAtFirstStart(t *testing.T) {
	b := newBed(t)
	b.check(b.Close())
	b.check(os.Truncate(filepath.Join(b.dir, "s", storeName), 3000))
	b.open()
	b.pull("r", b.layers.add(t, map[string]string{"a": "one"}))
	b.consistent()
}
