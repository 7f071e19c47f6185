package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"accel"
	"accel/api"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/sirupsen/logrus"
)

// patience bounds every wait; it is no measure of speed.
const patience = 3 * time.Minute

// binary builds the program once. It has no race detector, under which
// compression is twenty times slower: the packages' own tests run with it, and
// one test here with raced.
var binary = sync.OnceValues(func() (string, error) { return build("accel") })

// raced is the program with the race detector.
var raced = sync.OnceValues(func() (string, error) { return build("accel-race", "-race") })

func build(as string, flags ...string) (string, error) {
	_, here, _, _ := runtime.Caller(0)
	path := filepath.Join(scratch, as)
	cmd := exec.Command("go", append(append([]string{"build", "-o", path}, flags...), "./cmd/accel")...)
	cmd.Dir = filepath.Join(filepath.Dir(here), "..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build accel: %w\n%s", err, out)
	}
	return path, nil
}

// scratch holds the programs; TestMain makes and removes it.
var scratch string

func TestMain(m *testing.M) {
	logrus.SetOutput(io.Discard) // the distribution registry's
	var err error
	if scratch, err = os.MkdirTemp("", "accel-e2e-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(scratch)
	os.Exit(code)
}

// up is one run of `accel up`.
type up struct {
	t        *testing.T
	cmd      *exec.Cmd
	registry string
	client   *api.Client
	log      *lockedBuffer
	ended    chan error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var addresses = regexp.MustCompile(`(?s)registry +(\S+).*API +(http://\S+)`)

// start runs `accel up` over data and waits until it says where it listens.
func start(t *testing.T, data, registryListen string, args ...string) *up {
	t.Helper()
	path, err := binary()
	must(t, err)
	return startProgram(t, path, data, registryListen, args...)
}

func startProgram(t *testing.T, path, data, registryListen string, args ...string) *up {
	t.Helper()
	u := &up{t: t, log: &lockedBuffer{}, ended: make(chan error, 1)}
	u.cmd = exec.Command(path, append([]string{"up", "--data", data, "--listen", "127.0.0.1:0", "--registry-listen", registryListen}, args...)...)
	u.cmd.Stderr = u.log
	out, err := u.cmd.StdoutPipe()
	must(t, err)
	must(t, u.cmd.Start())
	said := make(chan []string, 1)
	go func() {
		var text strings.Builder
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			text.WriteString(lines.Text() + "\n")
			if m := addresses.FindStringSubmatch(text.String()); m != nil {
				said <- m
				break
			}
		}
		io.Copy(io.Discard, out)
		u.ended <- u.cmd.Wait()
	}()
	t.Cleanup(u.kill)
	select {
	case m := <-said:
		u.registry = m[1]
		u.client, err = api.NewClient(m[2])
		must(t, err)
	case err := <-u.ended:
		u.ended <- err
		t.Fatalf("accel up ended: %v\n%s", err, u.log)
	case <-time.After(patience):
		t.Fatalf("accel up says nothing\n%s", u.log)
	}
	return u
}

// kill ends the process as a power cut would. Killing twice is fine.
func (u *up) kill() {
	if err := u.cmd.Process.Kill(); err == nil {
		<-u.ended
	}
}

// stop asks the process to end and requires that it does so well.
func (u *up) stop() {
	u.t.Helper()
	must(u.t, u.cmd.Process.Signal(syscall.SIGTERM))
	if err := <-u.ended; err != nil {
		u.t.Errorf("accel up ended with %v after SIGTERM\n%s", err, u.log)
	}
}

func (u *up) reference(path string) name.Reference {
	u.t.Helper()
	ref, err := name.ParseReference(u.registry+"/"+path, name.Insecure)
	must(u.t, err)
	return ref
}

func (u *up) push(path string, what remote.Taggable) {
	u.t.Helper()
	var err error
	if idx, ok := what.(v1.ImageIndex); ok {
		err = remote.WriteIndex(u.reference(path), idx)
	} else {
		err = remote.Write(u.reference(path), what.(v1.Image))
	}
	if err != nil {
		u.t.Fatalf("push %s: %v\n%s", path, err, u.log)
	}
}

func (u *up) ready(path string) api.Image {
	u.t.Helper()
	img, err := u.client.Wait(context.Background(), u.registry+"/"+path, patience)
	if err != nil {
		u.t.Fatalf("wait for %s: %v (%s %s)\n%s", path, err, img.State, img.Reason, u.log)
	}
	if img.State != accel.Ready {
		u.t.Fatalf("%s is %s: %s %s\n%s", path, img.State, img.Rule, img.Reason, u.log)
	}
	return img
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
