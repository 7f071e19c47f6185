package main

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"accel/convert"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// giantLayer is generated while it is read: a file of 5 GB, and three more.
type giantLayer struct{ diffID v1.Hash }

func writeGiant(w io.Writer) error {
	random := rand.NewChaCha8([32]byte{1})
	block := make([]byte, 1<<20)
	for at := range block { // half of it noise, half of it compressing well
		if at%2 == 0 {
			block[at] = byte(random.Uint64())
		}
	}
	tw := tar.NewWriter(w)
	for i, n := range []int64{5e9, 1e9, 1e9, giantBytes - 7e9} {
		if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprint("file", i), Size: n, Mode: 0o644, ModTime: time.Unix(1, 0)}); err != nil {
			return err
		}
		for n > 0 {
			m, err := tw.Write(block[:min(n, int64(len(block)))])
			if err != nil {
				return err
			}
			n -= int64(m)
		}
	}
	return tw.Close()
}

func (g giantLayer) Digest() (v1.Hash, error)             { return g.diffID, nil }
func (g giantLayer) DiffID() (v1.Hash, error)             { return g.diffID, nil }
func (g giantLayer) Size() (int64, error)                 { return giantBytes, nil }
func (g giantLayer) MediaType() (types.MediaType, error)  { return types.OCILayer, nil }
func (g giantLayer) Uncompressed() (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

func (g giantLayer) Compressed() (io.ReadCloser, error) {
	r, w := io.Pipe()
	go func() {
		z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
		if err == nil {
			err = errors.Join(writeGiant(z), z.Close())
		}
		w.CloseWithError(err)
	}()
	return r, nil
}

// giant converts one layer of 8 GB, for the memory that it takes.
func giant(dir string) (outcome, error) {
	h := sha256.New()
	if err := writeGiant(h); err != nil {
		return outcome{}, err
	}
	img, err := mutate.AppendLayers(empty.Image, giantLayer{v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", h.Sum(nil))}})
	if err != nil {
		return outcome{}, err
	}
	began := time.Now()
	c := &convert.Converter{TempDir: dir}
	res, err := c.Convert(context.Background(), convert.Source{Image: img, Repository: "bench/giant"}, convert.Options{})
	if err != nil {
		return outcome{}, err
	}
	return outcome{Seconds: time.Since(began).Seconds(), Bytes: res.Stats.TargetBytes}, res.Close()
}
