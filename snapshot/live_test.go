package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"accel/internal/testbed"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// TestDeclinedInTheMiddle: the layers below one that was declined stay lazy, and containerd downloads it and
// all above.
func TestDeclinedInTheMiddle(t *testing.T) {
	for _, version := range []string{testbed.Containerd2, testbed.Containerd16} {
		t.Run(version, func(t *testing.T) {
			n := newNode(t, version, "")
			image := n.app("team/app:v1", 5)
			asked := 0
			n.layers.set(func() {
				n.layers.answer = func(_ context.Context, r Request) (Lazy, error) {
					if asked++; asked == 3 || asked == 5 {
						return Lazy{}, &Declined{Reason: "just this one"}
					}
					return Lazy{Layer: r.Layer}, nil
				}
			})
			_, err := n.containerd.PullCRI(n.ctx, image, "", "")
			n.check(err)
			if lazy := len(n.Lazy()); lazy != 3 {
				t.Errorf("%d layers are lazy, want 3 of 5", lazy)
			}
			n.layers.set(func() { n.layers.answer = nil })
			pod, err := n.containerd.RunCRI(n.ctx, image, "/tool", "wait")
			n.check(err)
			want := "team/app:v1 0\n"
			command := []string{"/tool", "cat", "/first"}
			for i := 1; i < 5; i++ {
				command = append(command, fmt.Sprintf("/dir/file%d", i))
				want += fmt.Sprintf("team/app:v1 %d\n", i)
			}
			got, err := pod.Exec(n.ctx, command...)
			n.check(err)
			if got != want {
				t.Errorf("the container reads %q", got)
			}
			n.check(pod.Remove(n.ctx))
			n.consistent()
			n.check(n.containerd.RemoveCRI(n.ctx, image))
			n.until("the image's layers are gone", func() bool { return !strings.Contains(fmt.Sprint(n.Lazy()), "team/app") })
			n.consistent()
		})
	}
}

// TestNothingLazy: where everything is declined, or the node cannot answer, images are pulled as ever.
func TestNothingLazy(t *testing.T) {
	n := newNode(t, testbed.Containerd2, "")
	n.layers.set(func() {
		n.layers.answer = func(context.Context, Request) (Lazy, error) { return Lazy{}, errors.New("no network") }
	})
	image := n.app("team/app:v1", 3)
	n.check(n.pullCtr(image))
	if got := n.runCtr(image, "one", "cat", "/first", "/dir/file2"); !strings.HasSuffix(got, "team/app:v1 0\nteam/app:v1 2\n") {
		t.Errorf("the container reads %q", got)
	}
	if len(n.Lazy()) != 0 {
		t.Errorf("lazy are %v", n.Lazy())
	}
	_, err := n.containerd.Ctr(n.ctx, "images", "rm", "--sync", image)
	n.check(err)
	n.consistent()
}

// TestRestartWhileRunning: containers go on while the snapshotter is away, and new ones start when it is back.
func TestRestartWhileRunning(t *testing.T) {
	for _, version := range []string{testbed.Containerd2, testbed.Containerd16} {
		t.Run(version, func(t *testing.T) {
			n := newNode(t, version, "")
			image := n.app("team/app:v1", 3)
			_, err := n.containerd.PullCRI(n.ctx, image, "", "")
			n.check(err)
			pod, err := n.containerd.RunCRI(n.ctx, image, "/tool", "wait")
			n.check(err)
			mounts, made := n.mountsBelow(), n.layers.mounts
			reads := func(what string) {
				t.Helper()
				got, err := pod.Exec(n.ctx, "/tool", "cat", "/first", "/dir/file2")
				if err != nil || got != "team/app:v1 0\nteam/app:v1 2\n" {
					t.Errorf("%s the container reads %q, %v", what, got, err)
				}
			}
			for range 3 {
				n.stop()
				n.check(n.Close())
				reads("without a snapshotter")
				n.open()
				n.serve()
				reads("with a new one")
			}
			if got := n.mountsBelow(); !slices.Equal(got, mounts) || n.layers.mounts != made {
				t.Errorf("mounted are %v, before there were %v", got, mounts)
			}
			// containerd 1.6 fails calls until it connects again, some seconds later; a kubelet repeats them.
			var second *testbed.Pod
			n.until("containerd has connected again", func() bool {
				second, err = n.containerd.RunCRI(n.ctx, image, "/tool", "wait")
				if err != nil && !strings.Contains(err.Error(), n.socket()) {
					t.Fatal(err)
				}
				return err == nil
			})
			n.check(second.Remove(n.ctx))
			n.check(pod.Remove(n.ctx))
			n.check(n.containerd.RemoveCRI(n.ctx, image))
			n.until("the image's layers are gone", func() bool { return !strings.Contains(fmt.Sprint(n.Lazy()), "team/app") })
			n.consistent()
		})
	}
}

// TestRebootOfNode: with the mounts gone, containers start on the images that are there, without a registry. One image's layer
// is lost: its containers are refused with the reason, until it is back.
func TestRebootOfNode(t *testing.T) {
	n := newNode(t, testbed.Containerd2, "")
	image, other := n.app("team/app:v1", 3), n.push("team/other:v1", map[string]string{"x": "y"})
	for _, i := range []string{image, other} {
		_, err := n.containerd.PullCRI(n.ctx, i, "", "")
		n.check(err)
	}
	pod, err := n.containerd.RunCRI(n.ctx, image, "/tool", "wait") // brings the sandbox's image
	n.check(err)
	n.check(pod.Remove(n.ctx))
	n.stop()
	n.check(n.Close())
	for _, m := range n.mountsBelow() {
		n.check(unix.Unmount(m, unix.MNT_DETACH))
	}
	lost := n.lost(other)
	n.layers.set(func() {
		n.layers.mount = func(l digest.Digest, _ string) error {
			if l == lost {
				return errors.New("its content is lost")
			}
			return nil
		}
	})
	n.check(n.registry.Stop())
	n.open()
	n.serve()
	pod, err = n.containerd.RunCRI(n.ctx, image, "/tool", "wait")
	n.check(err)
	got, err := pod.Exec(n.ctx, "/tool", "cat", "/first", "/dir/file2")
	if err != nil || got != "team/app:v1 0\nteam/app:v1 2\n" {
		t.Errorf("the container reads %q, %v", got, err)
	}
	n.check(pod.Remove(n.ctx))
	if _, err := n.containerd.RunCRI(n.ctx, other, "/x"); err == nil || !strings.Contains(err.Error(), "its content is lost") {
		t.Errorf("a container on the lost layer: %v", err)
	}
	n.check(n.containerd.RemoveCRI(n.ctx, other)) // a bad one can be removed
	n.until("the lost layer is gone", func() bool { return len(n.Bad()) == 0 && n.lost(other) == "" })
	n.consistent()
}

// lost is the layer of an image of one.
func (n *node) lost(image string) digest.Digest {
	for _, l := range n.Lazy() {
		if l.Request.Reference == image {
			return l.Layer
		}
	}
	return ""
}

// TestTwoNamespaces: an image in two of containerd's namespaces is mounted once, and goes with the second.
func TestTwoNamespaces(t *testing.T) {
	n := newNode(t, testbed.Containerd2, "")
	image := n.app("team/app:v1", 3)
	for _, ns := range []string{"one", "two", "two"} { // of what a namespace has, nothing is asked for
		_, err := n.containerd.Ctr(n.ctx, "-n", ns, "images", "pull", "--snapshotter", "accel", image)
		n.check(err)
	}
	n.mu.Lock()
	var told []string
	for _, e := range n.events {
		told = append(told, fmt.Sprintf("%s %s, %d with those above, %t", e.Request.Namespace, e.Kind, len(e.Request.Layers), e.Request.Manifest == n.events[0].Request.Manifest))
	}
	n.mu.Unlock()
	if want := []string{
		"one mounted, 3 with those above, true", "one mounted, 2 with those above, true", "one mounted, 1 with those above, true",
		"two shared, 3 with those above, true", "two shared, 2 with those above, true", "two shared, 1 with those above, true",
	}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
	n.requireLazy()
	if lazy := len(n.Lazy()); lazy != 3 {
		t.Errorf("%d lazy snapshots, want 3", lazy)
	}
	_, err := n.containerd.Ctr(n.ctx, "-n", "one", "images", "rm", "--sync", image)
	n.check(err)
	if lazy := len(n.Lazy()); lazy != 3 {
		t.Errorf("%d lazy snapshots after the first removal, want 3", lazy)
	}
	out, err := n.containerd.Ctr(n.ctx, "-n", "two", "run", "--rm", "--snapshotter", "accel", image, "c", "/tool", "cat", "/dir/file1")
	if err != nil || !strings.HasSuffix(out, "team/app:v1 1\n") {
		t.Errorf("the container reads %q, %v", out, err)
	}
	_, err = n.containerd.Ctr(n.ctx, "-n", "two", "images", "rm", "--sync", image)
	n.check(err)
	n.consistent()
	if lazy := len(n.Lazy()); lazy != 0 {
		t.Errorf("%d lazy snapshots after the second removal", lazy)
	}
}

// TestRemappedOwners: a container in a user namespace sees the layers' files as its own, over EROFS, without a copy.
func TestRemappedOwners(t *testing.T) {
	if !CanRemapIDs() {
		t.Skip("SKIPPED: NOT TESTED here, because this kernel cannot map owners of an overlay's layers")
	}
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("SKIPPED: NOT TESTED here, because mkfs.erofs is missing (erofs-utils)")
	}
	n := newNode(t, testbed.Containerd2, "", func(o *Options) { o.RemapIDs = true })
	n.layers.set(func() { n.layers.erofs = true })
	image := n.app("team/app:v1", 2)
	n.check(n.pullCtr(image))
	n.requireLazy()
	out, err := n.containerd.Ctr(n.ctx, "run", "--rm", "--snapshotter", "accel", "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536",
		"--remap-labels", image, "c", "/tool", "owner", "/first", "/dir/file1")
	n.check(err)
	if !strings.HasSuffix(out, "/first <nil> 0 0\n/dir/file1 <nil> 0 0\n") {
		t.Errorf("the container says %q", out)
	}
	n.consistent()
}
