package main

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"accel/internal/testbed"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
)

// hotSet is what a start was recorded to read, as whole files, and how fast one core
// inflates it.
type hotSet struct {
	compressedBytes, bytes int64
	inflateBytesPerSecond  float64
}

// measureHot takes it from an optimised image: what lies in front of the landmarks.
func measureHot(img v1.Image) (hotSet, error) {
	var hot hotSet
	layers, err := img.Layers()
	if err != nil {
		return hot, err
	}
	var took time.Duration
	for _, l := range layers {
		file, size, err := toFile(l, "")
		if err != nil {
			return hot, err
		}
		begin := time.Now()
		compressed, plain, err := inflateHot(file, size)
		took += time.Since(begin)
		if err := errors.Join(err, file.Close()); err != nil {
			return hot, err
		}
		hot.compressedBytes += compressed
		hot.bytes += plain
	}
	if hot.bytes > 0 {
		hot.inflateBytesPerSecond = float64(hot.bytes) / took.Seconds()
	}
	return hot, nil
}

func inflateHot(file io.ReaderAt, size int64) (compressed, plain int64, err error) {
	r, err := estargz.Open(io.NewSectionReader(file, 0, size))
	if err != nil {
		return 0, 0, err
	}
	mark, ok := r.Lookup(estargz.PrefetchLandmark)
	if !ok { // a layer of which nothing was read
		return 0, 0, nil
	}
	zr, err := gzip.NewReader(io.NewSectionReader(file, 0, mark.Offset))
	if errors.Is(err, io.EOF) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	plain, err = io.Copy(io.Discard, zr)
	return mark.Offset, plain, err
}

// lowerBound is the least that a start takes over a network, by the formula of
// docs/design.md, where a warm start takes so long.
func (h hotSet) lowerBound(speed testbed.LinkSpeed, warmStart float64) (seconds float64, how string) {
	network := float64(h.compressedBytes) * 8 / float64(speed.BitsPerSecond)
	inflating := float64(h.bytes) / (h.inflateBytesPerSecond * float64(runtime.NumCPU()))
	how = fmt.Sprintf("3 round trips + max(%.1f MB over the link, %.1f MB inflated by %d cores at %.0f MB/s) + warm start %.2f s",
		float64(h.compressedBytes)/megabyte, float64(h.bytes)/megabyte, runtime.NumCPU(), h.inflateBytesPerSecond/megabyte, warmStart)
	return 3*speed.RoundTrip.Seconds() + max(network, inflating) + warmStart, how
}
