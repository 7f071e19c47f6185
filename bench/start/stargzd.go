package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	stargzconfig "github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/service"
	"google.golang.org/grpc"
)

// This program plays the stock snapshotter itself, as a process of its own:
// partVariable says so.
const (
	partVariable = "ACCEL_BENCH_PART"
	stargzPart   = "stargz"
)

func playPart(p string) error {
	if p != stargzPart {
		return fmt.Errorf("%s=%s: no such part", partVariable, p)
	}
	var o stargzOrder
	if err := json.Unmarshal([]byte(os.Args[1]), &o); err != nil {
		return err
	}
	return serveStargz(o)
}

// stargzOrder says how the stock snapshotter is to be.
type stargzOrder struct {
	Root   string
	Socket string
	Tuned  bool
}

// stargzConfig is what the stock daemon has at its defaults, some of which are
// not the library's zero values.
func stargzConfig(isTuned bool) *service.Config {
	c := &service.Config{Config: stargzconfig.Config{
		DirectoryCacheConfig: stargzconfig.DirectoryCacheConfig{Direct: true},
		FuseConfig:           stargzconfig.FuseConfig{MergeBufferSize: 400 << 20, MergeWorkerCount: 10},
	}}
	if isTuned {
		c.PassThrough = true
		c.MaxConcurrency = 8
		c.PrefetchAsyncSize = 1 // any prefetch goes on while the container starts
		c.PrefetchChunkSize = 5_000_000
	}
	return c
}

// serveStargz runs until standard input ends.
func serveStargz(o stargzOrder) error {
	sn, err := service.NewStargzSnapshotterService(context.Background(), o.Root, stargzConfig(o.Tuned))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(o.Socket), 0o700); err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", o.Socket)
	if err != nil {
		return err
	}
	rpc := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(rpc, snapshotservice.FromSnapshotter(sn))
	served := make(chan error, 1)
	go func() { served <- rpc.Serve(l) }()
	_, err = io.Copy(io.Discard, os.Stdin)
	rpc.Stop()
	return errors.Join(err, <-served, sn.Close()) // Close unmounts
}
