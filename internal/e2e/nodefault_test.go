package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"accel/cache"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func TestNodeKilledAtManyInstants(t *testing.T) { nodeKillLoop(t, 20) }

func TestLongNodeKilledAtManyInstants(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("SKIPPED here: the long kill loop runs in `make test-long`")
	}
	nodeKillLoop(t, 200)
	t.Log("killed 200 times")
}

// nodeKillLoop has several clients pull an image, kills the node at a random
// instant of that, starts it again, has it check its whole cache, and pulls again.
func nodeKillLoop(t *testing.T, kills int) {
	reg := startRegistry(t)
	n := newNode(t, reg, "", reader, readerPassword).start()
	const seed, clients = 4, 4
	rnd := rand.New(rand.NewPCG(seed, seed))
	push := func(i int) (ref string) {
		path := fmt.Sprintf("team/app-%d:v1", i)
		pushTo(t, reg, path, opaque(t, uint64(i), 2<<20, 2<<20, 1<<20))
		return n.mirror + "/" + path
	}
	first := push(0)
	begin := time.Now()
	must(t, pullWhole(first))
	span := max(time.Since(begin), 10*time.Millisecond)

	images, early := []string{first}, 0
	for i := 1; i <= kills; i++ {
		ref := push(i)
		images = append(images, ref)
		var pulls sync.WaitGroup
		failed := make([]error, clients)
		for c := range clients {
			pulls.Go(func() { failed[c] = pullWhole(ref) })
		}
		time.Sleep(time.Duration(rnd.Int64N(int64(span)))) // the instant of the kill, not a wait for anything
		n.kill()
		pulls.Wait()
		if anyFailed(failed) {
			early++
			span += span / 10
		} else {
			span -= span / 10 // too late: the instants are to lie within the pulls
		}
		n.start()
		n.requireSound()
		if err := pullWhole(ref); err != nil {
			t.Fatalf("kill %d: pull after it: %v\n%s", i, err, n.log)
		}
	}
	t.Logf("killed %d times, %d of them before the pulls were done", kills, early)
	if early < kills/4 {
		t.Errorf("only %d of %d kills came before the pulls were done", early, kills)
	}
	// What came within the last second before a kill may be gone; all of it can be
	// had again, and stays.
	for _, when := range []string{"with the registry", "with the registry stopped"} {
		for _, ref := range images {
			if err := pullWhole(ref); err != nil {
				t.Errorf("%s: %s: %v", when, ref, err)
			}
		}
		must(t, reg.Stop())
		n.stop()
		n.start()
	}
	n.stop()
}

// opaque is an image whose layers are random bytes.
func opaque(t *testing.T, seed uint64, layerBytes ...int) v1.Image {
	t.Helper()
	var layers []v1.Layer
	for i, n := range layerBytes {
		b := make([]byte, n)
		rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(i)}).Read(b)
		layers = append(layers, static.NewLayer(b, types.OCILayer))
	}
	img, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), layers...)
	must(t, err)
	return img
}

func anyFailed(errs []error) bool {
	for _, err := range errs {
		if err != nil {
			return true
		}
	}
	return false
}

// requireSound reads all of a live node's cache again.
func (n *nodeRun) requireSound() cache.Report {
	n.t.Helper()
	var r cache.Report
	must(n.t, json.Unmarshal([]byte(n.accel("cache", "check", "-o", "json")), &r))
	if len(r.Damaged) > 0 {
		n.t.Errorf("damaged: %v\n%s", r.Damaged, n.log)
	}
	return r
}

// pullWhole reads an image's layers and checks them.
func pullWhole(image string) error {
	ref, err := name.ParseReference(image, name.Insecure)
	if err != nil {
		return err
	}
	img, err := remote.Image(ref, remote.WithRetryStatusCodes(), remote.WithRetryBackoff(remote.Backoff{Steps: 1}))
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		rc, err := l.Compressed() // its reader checks the digest
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, rc)
		rc.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func TestSecondNodeOnOneDirectory(t *testing.T) {
	reg := startRegistry(t)
	n := newNode(t, reg, "", "", "").start()
	out, err := accelCommand("node", "--config", n.config, "--listen", "127.0.0.1:0", "--socket", filepath.Join(n.dir, "second.sock"))
	if pid := fmt.Sprint(n.cmd.Process.Pid); err == nil || !strings.Contains(err.Error(), pid) {
		t.Errorf("a second node on the same folder, which process %s has: %v\n%s", pid, err, out)
	}
	n.stop()
}

func TestNodeOnFullFileSystem(t *testing.T) {
	needsMounts(t)
	reg := startRegistry(t)
	n := newNode(t, reg, "", reader, readerPassword)
	must(t, os.Mkdir(filepath.Join(n.dir, "data"), 0o700))
	mountSmall(t, filepath.Join(n.dir, "data"), 48<<20)
	t.Cleanup(n.kill) // before the unmounting
	n.start()
	var images []string
	for i, bytes := range []int{12 << 20, 20 << 20, 12 << 20, 60 << 20, 12 << 20} {
		path := fmt.Sprintf("team/app-%d:v1", i)
		pushTo(t, reg, path, opaque(t, uint64(i), bytes))
		images = append(images, n.mirror+"/"+path)
	}
	var pulls sync.WaitGroup
	failed := make([]error, len(images))
	for range 3 {
		for i, ref := range images {
			pulls.Go(func() { failed[i] = pullWhole(ref) })
		}
		pulls.Wait()
		for i, err := range failed {
			if err != nil {
				t.Errorf("%s: %v", images[i], err)
			}
		}
		n.requireSound()
	}
	n.stop()
	n.start()
	for _, ref := range images {
		must(t, pullWhole(ref))
	}
	n.requireSound()
	n.stop()
}

// mountSmall mounts a file system of so many bytes at dir.
func mountSmall(t *testing.T, dir string, bytes int64) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, bytes))
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, dir}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount %s: %v: %s", dir, err, out)
		}
	})
}
