package cache

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

func (b *bed) has(data []byte) bool {
	e, err := b.Stat(digest.FromBytes(data))
	return err == nil && e.Complete
}

func TestEviction(t *testing.T) {
	const budget = 20 * mib
	b := start(t, Options{BudgetBytes: budget})
	hot := content(50, 3*mib)
	mustGet(t, b.Store, hot, 0, -1, from(hot))
	pinned := content(51, 3*mib)
	if err := b.Pin("mount-1", digest.FromBytes(pinned)); err != nil { // before it is here
		t.Fatal(err)
	}
	mustGet(t, b.Store, pinned, 0, -1, from(pinned))
	cold := content(52, 3*mib)
	mustGet(t, b.Store, cold, 0, -1, from(cold))
	for i := range 20 { // a scan
		mustGet(t, b.Store, hot, 0, 1000, from(hot))
		data := content(1000+i, 3*mib)
		mustGet(t, b.Store, data, 0, -1, from(data))
		// What a commit is writing is not evicted, and on a slow disk that may be all but what is in use.
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
		if u := b.Usage(); u.UsedBytes > budget {
			t.Fatalf("%d bytes used of %d", u.UsedBytes, budget)
		}
	}
	if !b.has(hot) || !b.has(pinned) || b.has(cold) {
		t.Errorf("after a scan: what is in use %v, what is pinned %v, what was read once %v", b.has(hot), b.has(pinned), b.has(cold))
	}
	if u := b.Usage(); u.PinnedBytes < 3*mib || u.PinnedBytes > 4*mib || u.Blobs < 4 {
		t.Errorf("%+v", u)
	}
	if err := b.Remove(digest.FromBytes(pinned)); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("removing what is pinned: %v", err)
	}
	if err := b.Unpin("mount-1"); err != nil {
		t.Fatal(err)
	}
	if err := b.Unpin("mount-1"); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("unpinned twice: %v", err)
	}
	if err := errors.Join(b.Remove(digest.FromBytes(pinned)), b.Remove(digest.FromBytes(hot))); err != nil {
		t.Error(err)
	}
	if err := b.Remove(digest.FromBytes(hot)); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

// TestReadIsNotEvicted: what a client is reading stays, whatever comes.
func TestReadIsNotEvicted(t *testing.T) {
	b := start(t, Options{BudgetBytes: 8 * mib})
	data := content(53, 3*mib)
	mustGet(t, b.Store, data, 0, -1, from(data))
	r, err := b.OpenBlob(t.Context(), describe(data), 0, -1, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		other := content(1100+i, 3*mib)
		mustGet(t, b.Store, other, 0, -1, from(other))
	}
	c := &compared{data}
	if _, err := r.WriteTo(c); err != nil || len(c.left) > 0 {
		t.Errorf("%d bytes are missing, %v", len(c.left), err)
	}
	if err := b.Remove(digest.FromBytes(data)); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("removing what is read: %v", err)
	}
	r.Close()
	if !b.has(data) {
		t.Error("it was evicted under its reader")
	}
}

// TestNoRoom: what does not fit is served without caching; Ensure says so.
func TestNoRoom(t *testing.T) {
	b := start(t, Options{BudgetBytes: 5 * mib})
	small := content(54, 2*mib)
	mustGet(t, b.Store, small, 0, -1, from(small))
	data := content(55, 9*mib)
	f := from(data)
	f.cut = 3 * mib // the stream past the cache breaks off, too
	mustGet(t, b.Store, data, 0, -1, f)
	mustGet(t, b.Store, data, 7*mib, mib, from(data))
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() { mustGet(t, b.Store, data, 0, -1, from(data)) })
	}
	wg.Wait()
	if !b.has(small) {
		t.Error("something was evicted for what does not fit at all")
	}
	if _, err := b.Ensure(t.Context(), describe(data), from(data), false); !errors.Is(err, ErrNoSpace) {
		t.Errorf("Ensure: %v", err)
	}
	bad := bytes.Clone(data)
	bad[8*mib] ^= 1
	if got, _, err := get(b.Store, describe(data), 0, -1, from(bad)); !errors.Is(err, ErrDigest) || len(got) >= len(data) {
		t.Errorf("wrong content past the cache: %d bytes, %v", len(got), err)
	}
}

func TestFreeFloor(t *testing.T) {
	dir := filepath.Join(smallDisk(t, 64), "cache")
	b := start(t, Options{Dir: dir, FreeFloorBytes: 24 * mib})
	for i := range 20 {
		data := content(1200+i, 4*mib)
		mustGet(t, b.Store, data, 0, -1, from(data))
		if u := b.Usage(); u.FreeBytes < 24*mib-256<<10 { // what the file system takes for itself
			t.Fatalf("%d bytes are left free", u.FreeBytes)
		}
	}
	if n := len(b.List()); n < 3 {
		t.Errorf("only %d blobs are there", n)
	}
	// Somebody else takes the space: content goes.
	if err := os.WriteFile(filepath.Join(dir, "..", "other"), make([]byte, 20*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "room is made", func() bool { u := b.Usage(); return u.FreeBytes >= 24*mib || u.Blobs == 0 })
}

// TestFullDisk: the file system is full in the middle of fills, and everybody is served.
func TestFullDisk(t *testing.T) {
	dir := filepath.Join(smallDisk(t, 48), "cache")
	b := start(t, Options{Dir: dir})
	seen := map[int][]byte{}
	for i := range 6 {
		seen[i] = content(1300+i, 7*mib+i)
	}
	for range 3 {
		var wg sync.WaitGroup
		for i := range seen {
			for range 3 {
				wg.Go(func() { mustGet(t, b.Store, seen[i], 0, -1, from(seen[i])) })
			}
		}
		wg.Wait()
	}
	kept := 0
	for _, data := range seen {
		if b.has(data) {
			kept++
		}
	}
	if kept == 0 {
		t.Error("nothing was kept")
	}
	t.Logf("%d of %d blobs were kept, free %d bytes", kept, len(seen), b.Usage().FreeBytes)
	// Larger than the disk.
	big := content(60, 60*mib)
	mustGet(t, b.Store, big, 0, -1, from(big))
	// Nothing at all is left, not even for the index.
	filler, err := os.Create(filepath.Join(dir, "..", "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	for block := make([]byte, mib); err == nil; {
		_, err = filler.Write(block)
	}
	other := content(61, 30*mib)
	mustGet(t, b.Store, other, 0, -1, from(other))
	if err := b.PutTag("registry.example/app", "v1", Tag{Digest: digest.FromBytes(other), CheckedAt: time.Now()}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(filler.Truncate(0), filler.Sync()); err != nil {
		t.Fatal(err)
	}
	small := content(62, 5*mib)
	until(t, "content is kept again", func() bool {
		mustGet(t, b.Store, small, 0, -1, from(small))
		return b.has(small)
	})
	b.close()
	b = start(t, Options{Dir: dir})
	mustGet(t, b.Store, small, 0, -1, nil)
	rep, err := b.Check(t.Context(), nil)
	if err != nil || len(rep.Damaged) > 0 {
		t.Errorf("after it was full: %+v, %v", rep, err)
	}
}

// smallDisk mounts a file system of so many MiB.
func smallDisk(t *testing.T, sizeMiB int64) string {
	t.Helper()
	mkfs, err := exec.LookPath("mkfs.ext4")
	if os.Geteuid() != 0 || err != nil {
		t.Skip("SKIPPED here: a small file system can only be mounted by root, with mkfs.ext4")
	}
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, sizeMiB<<20); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, out)
		}
	}
	run(mkfs, "-q", "-m", "0", image)
	run("mount", "-o", "loop", image, dir)
	t.Cleanup(func() { run("umount", dir) })
	return dir
}
