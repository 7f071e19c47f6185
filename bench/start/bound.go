package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"accel/internal/testbed"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
)

// neededRoundTrips are those that no start can spare which begins with a tag, and knows
// nothing of the image: connect; the manifest; what refers to it, with the config beside it; the
// tables of contents with the first content.
const neededRoundTrips = 4

// hotSet is what a start was recorded to read, and how fast one core inflates and hashes it.
type hotSet struct {
	Image                 string  `json:"image"`
	Bytes                 int64   `json:"bytes"`
	Compression           float64 `json:"compression"` // compressed bytes for each, in the files that they are of
	InflateBytesPerSecond float64 `json:"inflateBytesPerSecond"`
	HashBytesPerSecond    float64 `json:"hashBytesPerSecond"` // SHA-256
}

// measureHot takes it from an optimised image: the files lie in front of the
// landmarks.
func measureHot(img v1.Image) (hot hotSet, err error) {
	m, err := img.Manifest()
	if err != nil {
		return hot, err
	}
	if hot.Bytes, err = strconv.ParseInt(m.Annotations[readAnnotation], 10, 64); err != nil {
		return hot, fmt.Errorf("annotation %s: %w", readAnnotation, err)
	}
	layers, err := img.Layers()
	if err != nil {
		return hot, err
	}
	var all inFront
	for _, l := range layers {
		file, size, err := toFile(l, "")
		if err != nil {
			return hot, err
		}
		err = all.add(file, size)
		if err := errors.Join(err, file.Close()); err != nil {
			return hot, err
		}
	}
	if all.plain == 0 {
		return hot, errors.New("an optimised image has nothing in front")
	}
	hot.Compression = float64(all.compressed) / float64(all.plain)
	hot.InflateBytesPerSecond = float64(all.plain) / all.inflating.Seconds()
	hot.HashBytesPerSecond = float64(all.plain) / all.hashing.Seconds()
	return hot, nil
}

// inFront is what lies in front of layers' landmarks.
type inFront struct {
	compressed, plain  int64
	inflating, hashing time.Duration
}

// add inflates and hashes what lies in front of a layer's landmark.
func (f *inFront) add(blob io.ReaderAt, size int64) error {
	r, err := estargz.Open(io.NewSectionReader(blob, 0, size))
	if err != nil {
		return err
	}
	mark, ok := r.Lookup(estargz.PrefetchLandmark)
	if !ok || mark.Offset == 0 { // a layer of which nothing was read
		return nil
	}
	zr, err := gzip.NewReader(io.NewSectionReader(blob, 0, mark.Offset))
	if err != nil {
		return err
	}
	f.compressed += mark.Offset
	h, buffer := sha256.New(), make([]byte, 1<<20)
	for {
		begin := time.Now()
		n, err := io.ReadFull(zr, buffer)
		f.inflating += time.Since(begin)
		begin = time.Now()
		h.Write(buffer[:n])
		f.hashing += time.Since(begin)
		f.plain += int64(n)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF) && n > 0:
			return nil
		case err != nil:
			return err
		}
	}
}

// bound is the least that a start takes, and how that was reckoned.
type bound struct {
	seconds float64
	how     string
}

// lowerBound is by the formula of docs/design.md, where a warm start takes so long.
func (h hotSet) lowerBound(speed testbed.LinkSpeed, cores int, warmStart float64) bound {
	network, inflating := h.network(speed), h.cpu()/float64(cores)
	return bound{
		3*speed.RoundTrip.Seconds() + max(network, inflating) + warmStart,
		fmt.Sprintf("3 round trips + max(%.1f MB over the link in %.2f s, %.1f MB inflated and hashed by %d cores in %.2f s) + warm start %.2f s",
			float64(h.Bytes)*h.Compression/megabyte, network, float64(h.Bytes)/megabyte, cores, inflating, warmStart),
	}
}

// countedBound adds up what has to be done at least: round trips, the link's time, and all the
// work, spread over all cores.
func (h hotSet) countedBound(speed testbed.LinkSpeed, cores int, warmCPU float64) bound {
	trips, network, working := neededRoundTrips*speed.RoundTrip.Seconds(), h.network(speed), (h.cpu()+warmCPU)/float64(cores)
	return bound{
		trips + network + working,
		fmt.Sprintf("%d round trips %.2f s + link %.2f s + (inflating and hashing %.2f s + a warm start's CPU %.2f s) / %d cores",
			neededRoundTrips, trips, network, h.cpu(), warmCPU, cores),
	}
}

func (h hotSet) network(speed testbed.LinkSpeed) float64 {
	return float64(h.Bytes) * h.Compression * 8 / float64(speed.BitsPerSecond)
}

func (h hotSet) cpu() float64 {
	return float64(h.Bytes)/h.InflateBytesPerSecond + float64(h.Bytes)/h.HashBytesPerSecond
}
