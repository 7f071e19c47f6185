package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"

	"accel/internal/testbed"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/sirupsen/logrus"
)

// This program plays the registry's and the clients' parts itself, as processes
// of their own: partVariable says which.
const (
	partVariable = "ACCEL_BENCH_PART"
	registryPart = "registry"
	clientsPart  = "clients"
)

const (
	user, password = "bench", "bench"
	repository     = "bench/image"
	tag            = "v1"
	layerCount     = 6
)

func playPart(p string) error {
	switch p {
	case registryPart:
		return serveRegistry(os.Args[1])
	case clientsPart:
		return pullAsClients(os.Args[1])
	}
	return fmt.Errorf("%s=%s: no such part", partVariable, p)
}

func self(ctx context.Context, part string, arg string) (*exec.Cmd, error) {
	path, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, arg)
	cmd.Env = append(os.Environ(), partVariable+"="+part)
	cmd.Stderr = os.Stderr
	return cmd, nil
}

// addresses is what the registry's process says first.
type addresses struct{ Registry, Control string }

// serveRegistry runs until standard input ends. Its control address answers with
// what was delivered since it was asked last.
func serveRegistry(dir string) error {
	logrus.SetOutput(io.Discard) // distribution's
	reg, err := testbed.StartRegistry(testbed.RegistryOptions{Dir: dir, Accounts: []testbed.Account{{Name: user, Password: password, Push: []string{repository}}}})
	if err != nil {
		return err
	}
	control, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return errors.Join(err, reg.Close())
	}
	go http.Serve(control, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { //nolint:errcheck // ends with the process
		d := reg.Delivered()
		reg.Reset()
		fmt.Fprint(w, d.BlobBytes()+d.ManifestBytes)
	}))
	if err := json.NewEncoder(os.Stdout).Encode(addresses{reg.Host(), control.Addr().String()}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return errors.Join(err, reg.Close())
}

// registryProcess is the registry as this process sees it.
type registryProcess struct {
	cmd     *exec.Cmd
	stdin   io.Closer
	host    string
	control string
}

func startRegistry(ctx context.Context, s setting) (*registryProcess, error) {
	dir, err := os.MkdirTemp(s.dir, "registry-")
	if err != nil {
		return nil, err
	}
	cmd, err := self(ctx, registryPart, dir)
	if err != nil {
		return nil, err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r := &registryProcess{cmd: cmd, stdin: in}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	var a addresses
	if err == nil {
		err = json.Unmarshal(line, &a)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("registry: %w", err), r.end())
	}
	r.host, r.control = a.Registry, a.Control
	return r, nil
}

func (r *registryProcess) end() error { return errors.Join(r.stdin.Close(), r.cmd.Wait()) }

// sent is how many bytes it delivered since it was asked last.
func (r *registryProcess) sent(ctx context.Context) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.control, nil)
	if err != nil {
		return 0, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	var n int64
	_, err = fmt.Fscan(res.Body, &n)
	return n, err
}

// pushImage fills the registry; size is all that a client is given in one pull.
func pushImage(host string, bytes int64) (size int64, err error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for i := range uint64(layerCount) {
		content := make([]byte, bytes/layerCount)
		if _, err := io.ReadFull(rand.NewChaCha8([32]byte{byte(i)}), content); err != nil {
			return 0, err
		}
		if img, err = mutate.AppendLayers(img, static.NewLayer(content, types.OCILayer)); err != nil {
			return 0, err
		}
	}
	ref, err := name.ParseReference(host+"/"+repository+":"+tag, name.Insecure)
	if err != nil {
		return 0, err
	}
	if err := remote.Write(ref, img, remote.WithAuth(&authn.Basic{Username: user, Password: password})); err != nil {
		return 0, err
	}
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	raw, err := img.RawManifest()
	size = int64(len(raw)) + m.Config.Size
	for _, l := range m.Layers {
		size += l.Size
	}
	return size, err
}

// pullAll has the clients pull from host, as user where they are to.
func (r *registryProcess) pullAll(ctx context.Context, s setting, host string, asUser bool) (outcome, error) {
	if _, err := r.sent(ctx); err != nil { // to zero
		return outcome{}, err
	}
	order, err := json.Marshal(order{Host: host, Pulls: s.pulls, AsUser: asUser})
	if err != nil {
		return outcome{}, err
	}
	cmd, err := self(ctx, clientsPart, string(order))
	if err != nil {
		return outcome{}, err
	}
	raw, err := cmd.Output()
	if err != nil {
		return outcome{}, err
	}
	var o outcome
	if err := json.Unmarshal(raw, &o); err != nil {
		return outcome{}, fmt.Errorf("the clients' answer %q: %w", strings.TrimSpace(string(raw)), err)
	}
	o.sent, err = r.sent(ctx)
	return o, err
}
