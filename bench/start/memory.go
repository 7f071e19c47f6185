package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

const (
	memoryImages  = 20
	filesEach     = 30_000
	filesInFolder = 100
)

// memorySample is what the daemons of a host have resident, anonymous, with all images
// mounted and nothing going on.
type memorySample struct {
	System   system  `json:"system"`
	DaemonMB float64 `json:"daemonMB"` // the snapshotter itself
	RestMB   float64 `json:"restMB"`   // what it has left to live by itself
}

// memoryRuns measures the lazy systems that are among the chosen variants.
func memoryRuns(ctx context.Context, b *bed, s setting, res *results) error {
	chosen := map[system]bool{}
	for _, v := range s.chosen(func(variant) bool { return true }) {
		chosen[v.system] = true
	}
	if !chosen[accelNode] && !chosen[stargz] {
		return nil
	}
	for i := range memoryImages {
		fmt.Fprintf(os.Stderr, "\rmemory: making image %d of %d", i+1, memoryImages)
		name := memoryImage(i)
		img, err := manyFiles(i)
		if err != nil {
			return err
		}
		if err := b.push(ctx, img, b.reference(name, plainForm)); err != nil {
			return err
		}
		if err := b.accelerate(ctx, img, startable{name: name}, nil); err != nil {
			return err
		}
	}
	fmt.Fprintln(os.Stderr)
	for _, system := range []system{stargz, accelNode} {
		if !chosen[system] {
			continue
		}
		fmt.Fprintf(os.Stderr, "memory: %d images on a host of %s\n", memoryImages, system)
		m, err := b.memoryOf(ctx, system)
		if err != nil {
			return fmt.Errorf("memory of %s: %w", system, err)
		}
		res.memory = append(res.memory, m)
	}
	return nil
}

func memoryImage(i int) string { return fmt.Sprint("memory-", i) }

// memoryOf pulls all images onto one host.
func (b *bed) memoryOf(ctx context.Context, s system) (m memorySample, err error) {
	m.System = s
	h, err := b.startHost(ctx, s)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	for i := range memoryImages {
		reference := b.reference(memoryImage(i), plainForm)
		if s == stargz { // has to be told of the converted image
			reference += convertedSuffix
		}
		if err := h.pull(ctx, reference); err != nil {
			return m, err
		}
	}
	if err := b.untilQuiet(ctx); err != nil {
		return m, err
	}
	pids, err := h.pids()
	if err != nil {
		return m, err
	}
	for i, pid := range pids[1:] { // without containerd
		mb, err := anonymousMB(pid)
		if err != nil {
			return m, err
		}
		if i == 0 {
			m.DaemonMB = mb
		} else {
			m.RestMB += mb
		}
	}
	return m, nil
}

// manyFiles is an image of one layer with filesEach small files; those of each
// number are different from all others.
func manyFiles(number int) (v1.Image, error) {
	var plain, packed bytes.Buffer
	tw := tar.NewWriter(&plain)
	stamp := time.Unix(1, 0)
	for i := range filesEach {
		folder := fmt.Sprintf("data/%03d/", i/filesInFolder)
		if i%filesInFolder == 0 {
			if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folder, Mode: 0o755, ModTime: stamp}); err != nil {
				return nil, err
			}
		}
		content := strings.Repeat(fmt.Sprintf("file %d of image %d\n", i, number), 1+i%20)
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%sfile-%d.txt", folder, i), Size: int64(len(content)), Mode: 0o644, ModTime: stamp}); err != nil {
			return nil, err
		}
		if _, err := tw.Write([]byte(content)); err != nil {
			return nil, err
		}
	}
	zw, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	if _, err := zw.Write(plain.Bytes()); err != nil {
		return nil, err
	}
	if err := zw.Close(); err != nil {
		return nil, err
	}
	diffID, _, err := v1.SHA256(&plain)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.AppendLayers(img, withDiffID{static.NewLayer(packed.Bytes(), types.OCILayer), diffID}); err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	return mutate.ConfigFile(img, cfg)
}

// withDiffID is a compressed layer whose plain form has that digest.
type withDiffID struct {
	v1.Layer
	diffID v1.Hash
}

func (l withDiffID) DiffID() (v1.Hash, error) { return l.diffID, nil }
