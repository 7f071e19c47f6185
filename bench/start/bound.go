package main

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"time"

	"accel/internal/testbed"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
)

// hotSet is what a start was recorded to read, and how fast one core inflates it.
type hotSet struct {
	bytes                 int64
	compression           float64 // compressed bytes for each, in the files that they are of
	inflateBytesPerSecond float64
}

// measureHot takes it from an optimised image: the files lie in front of the
// landmarks.
func measureHot(img v1.Image) (hot hotSet, err error) {
	m, err := img.Manifest()
	if err != nil {
		return hot, err
	}
	if hot.bytes, err = strconv.ParseInt(m.Annotations[readAnnotation], 10, 64); err != nil {
		return hot, fmt.Errorf("annotation %s: %w", readAnnotation, err)
	}
	layers, err := img.Layers()
	if err != nil {
		return hot, err
	}
	var took time.Duration
	var inFront, plain int64
	for _, l := range layers {
		file, size, err := toFile(l, "")
		if err != nil {
			return hot, err
		}
		from, to, spent, err := inflateHot(file, size)
		if err := errors.Join(err, file.Close()); err != nil {
			return hot, err
		}
		inFront, plain, took = inFront+from, plain+to, took+spent
	}
	if plain == 0 {
		return hot, errors.New("an optimised image has nothing in front")
	}
	hot.compression = float64(inFront) / float64(plain)
	hot.inflateBytesPerSecond = float64(plain) / took.Seconds()
	return hot, nil
}

// inflateHot inflates what lies in front of a layer's landmark.
func inflateHot(file io.ReaderAt, size int64) (compressed, plain int64, took time.Duration, err error) {
	r, err := estargz.Open(io.NewSectionReader(file, 0, size))
	if err != nil {
		return 0, 0, 0, err
	}
	mark, ok := r.Lookup(estargz.PrefetchLandmark)
	if !ok || mark.Offset == 0 { // a layer of which nothing was read
		return 0, 0, 0, nil
	}
	begin := time.Now()
	zr, err := gzip.NewReader(io.NewSectionReader(file, 0, mark.Offset))
	if err != nil {
		return 0, 0, 0, err
	}
	plain, err = io.Copy(io.Discard, zr)
	return mark.Offset, plain, time.Since(begin), err
}

// lowerBound is the least that a start takes over a network, by the formula of
// docs/design.md, where a warm start takes so long.
func (h hotSet) lowerBound(speed testbed.LinkSpeed, warmStart float64) (seconds float64, how string) {
	compressed := float64(h.bytes) * h.compression
	network := compressed * 8 / float64(speed.BitsPerSecond)
	inflating := float64(h.bytes) / (h.inflateBytesPerSecond * float64(runtime.NumCPU()))
	how = fmt.Sprintf("3 round trips + max(%.1f MB over the link, %.1f MB inflated by %d cores at %.0f MB/s) + warm start %.2f s",
		compressed/megabyte, float64(h.bytes)/megabyte, runtime.NumCPU(), h.inflateBytesPerSecond/megabyte, warmStart)
	return 3*speed.RoundTrip.Seconds() + max(network, inflating) + warmStart, how
}
