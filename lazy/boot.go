package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"accel"
	"accel/bundle"
	"accel/lazyfs"
	"accel/prefetch"
	"accel/profile/artifact"
	"accel/registry"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

const (
	// bootListTime is how long it is waited to learn of a bundle, where the server has given the mapping before the
	// registry has told what refers to the image: a bundle saves more than that.
	bootListTime = 250 * time.Millisecond
	// maxBootTOCBytes bounds the JSON of all TOCs in a bundle, which is in memory at once.
	maxBootTOCBytes = 64 << 20
	// bootAheadBytes of frames are read before they are unpacked: layers are being opened, or the processors
	// are busy.
	bootAheadBytes = 16 << 20
	// boots at a time; what comes meanwhile is fetched by ranges.
	boots = 2
	// A bundle is worth its bytes where so many fourths of its content are of layers that the node has nothing of.
	bootLeastFourths = 3
	// maxUnpackers of frames.
	maxUnpackers = 4
)

// boot is an image's boot bundle on its way: the TOCs are taken by who opens the layers, the chunks are put into the
// layers. Whatever is wrong with it, what it has not brought comes by ranges. nil is one that there is not.
type boot struct {
	l       *Lazy
	img     *image
	source  *registry.Source
	d       bundle.Description
	content int64 // bytes at most

	got    chan struct{}            // closed when tocs is what it will be
	tocs   map[digest.Digest][]byte // by digest, which is not checked
	opened chan struct{}            // closed when the layers are open
	cancel context.CancelFunc
	done   chan struct{} // closed when nothing of it goes on

	// Readable when done is closed.
	chunks map[digest.Digest][]int // that it was to bring, by layer
}

// boot begins to fetch an image's bundle, where one is known that is worth it. It is work of l that ends with ctx.
func (l *Lazy) boot(ctx context.Context, img *image, p *prospect) *boot {
	if l.starts.isPlain(img.manifest, time.Now()) {
		return nil
	}
	listed, stop := context.WithTimeout(ctx, bootListTime)
	at, list, err := p.profiles(listed)
	stop()
	if err != nil {
		return nil
	}
	d, ok := artifact.BundleIn(list, img.manifest)
	if !ok {
		return nil
	}
	content, err := l.worthwhile(img, d)
	if err != nil {
		l.o.Log.Debug("a boot bundle is left alone", "image", img.name, "manifest", img.manifest, "reason", err)
		return nil
	}
	select {
	case l.boots <- struct{}{}:
	default:
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	b := &boot{l: l, img: img, source: at.source, d: d, content: content, got: make(chan struct{}), opened: make(chan struct{}), cancel: cancel, done: make(chan struct{})}
	l.work.Go(func() {
		defer func() { <-l.boots }()
		defer close(b.done)
		defer cancel()
		began := time.Now()
		err := lazyfs.Guarded(func() error { return b.run(ctx) })
		result := "ok"
		switch {
		case err == nil:
			l.o.Log.Debug("a boot bundle has brought what a start reads", "image", img.name, "manifest", img.manifest, "size", d.SizeBytes, "took", time.Since(began))
		case ctx.Err() != nil:
			result = "canceled"
		default:
			result = "failed"
			l.o.Log.Warn("a boot bundle is given up; what it has not brought is fetched otherwise", "image", img.name, "manifest", img.manifest, "bundle", d.Digest, "error", err)
		}
		l.metrics.bundles.WithLabelValues(result).Inc()
	})
	return b
}

// worthwhile says why a bundle is not fetched, or how much content it may bring. Anybody could have attached it.
func (l *Lazy) worthwhile(img *image, d bundle.Description) (contentBytes int64, err error) {
	most := bundle.Bound(img.sizes())
	var all, missing int64
	lacks := map[digest.Digest]bool{} // TOCs of layers of which nothing is here
	for _, y := range img.layers {
		if _, err := l.o.Store.Layer(y.Digest); errors.Is(err, accel.ErrNotFound) && y.origin.TOCOffset >= 0 {
			lacks[y.origin.TOCDigest] = true
		}
	}
	for _, y := range d.Layers {
		if all += y.ContentBytes; lacks[y.TOCDigest] {
			missing += y.ContentBytes
		}
	}
	switch {
	case len(d.Layers) != len(img.layers):
		return 0, fmt.Errorf("it is of %d layers, and the image has %d", len(d.Layers), len(img.layers))
	case len(lacks) == 0 || 4*missing < bootLeastFourths*all:
		return 0, fmt.Errorf("%d of its %d bytes are of layers that are here, or of another image's", all-missing, all)
	case d.SizeBytes > most.SizeBytes || all > most.ContentBytes:
		return 0, fmt.Errorf("%d bytes with %d of content are more than such an image's may have", d.SizeBytes, all)
	}
	return most.ContentBytes, nil
}

// sizes are those of the image's layers, for bundle.Bound.
func (img *image) sizes() (layers []bundle.LayerSize) {
	for _, y := range img.layers {
		layers = append(layers, bundle.LayerSize{Bytes: y.origin.SizeBytes, TOCOffset: max(y.origin.TOCOffset, 0)})
	}
	return layers
}

// toc is a TOC from the bundle, or nil; it is not checked.
func (b *boot) toc(ctx context.Context, d digest.Digest) []byte {
	if b == nil {
		return nil
	}
	select {
	case <-b.got:
		return b.tocs[d]
	case <-ctx.Done():
		return nil
	}
}

// end waits until nothing of b goes on; where the layers could not be opened, that is soon.
func (b *boot) end(opened bool) {
	if b == nil {
		return
	}
	if !opened {
		b.cancel()
	}
	<-b.done
}

// Range implements prefetch.Source.
func (b *boot) Range(ctx context.Context, offset, length int64) (io.ReadCloser, error) {
	r, err := b.source.Range(ctx, b.d.Digest, b.d.SizeBytes, offset, length)
	if err != nil {
		return nil, err
	}
	if r.Unranged && length < b.d.SizeBytes {
		return nil, errors.Join(fmt.Errorf("%w: %s", prefetch.ErrUnranged, b.source.Host()), r.Close())
	}
	return r, nil
}

// run reads the bundle to its end.
func (b *boot) run(ctx context.Context) (err error) {
	got := sync.OnceFunc(func() { close(b.got) })
	defer got()
	s, err := b.l.filler.Stream(ctx, b.source.Host(), b, b.d.SizeBytes)
	if err != nil {
		return err
	}
	defer s.Close()
	r, err := bundle.NewReader(s, b.d.SizeBytes, bundle.Limits{TOCBytes: maxBootTOCBytes, ContentBytes: b.content})
	if err != nil {
		return err
	}
	defer r.Close()
	tocs, err := r.TOCs()
	if err != nil {
		return err
	}
	b.tocs = map[digest.Digest][]byte{}
	for n, y := range r.Layers() {
		b.tocs[y.TOCDigest] = tocs[n]
	}
	got()
	return b.stream(ctx, s, r)
}

// frame is one that was read.
type frame struct {
	bundle.Frame
	packed []byte
	first  int // of its chunks, in the order of all
}

// stream has what was read unpacked and put by others, so that the network is not waited for by the processors, nor the
// other way round.
func (b *boot) stream(ctx context.Context, s *prefetch.Stream, r *bundle.Reader) error {
	g, ctx := errgroup.WithContext(ctx)
	ahead := semaphore.NewWeighted(bootAheadBytes)
	frames := make(chan frame, len(r.Frames()))
	weight := func(f bundle.Frame) int64 { return min(f.PackedBytes, bootAheadBytes) }
	g.Go(func() error {
		defer close(frames)
		next := 0
		for _, f := range r.Frames() {
			if err := ahead.Acquire(ctx, weight(f)); err != nil {
				return err
			}
			_, packed, err := r.Next()
			if err != nil {
				return err
			}
			frames <- frame{f, packed, next} // it has room for all
			next += len(f.Chunks)
		}
		return nil
	})
	g.Go(func() error {
		select {
		case <-b.opened:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		places, err := b.promise(s, r)
		if err != nil {
			return err
		}
		for range min(max(runtime.GOMAXPROCS(0)-1, 1), maxUnpackers) { // one processor is left to the program
			g.Go(func() error {
				var buf []byte
				for f := range frames {
					err := ctx.Err()
					if err == nil {
						buf, err = b.put(s, r, f, places, buf)
					}
					if ahead.Release(weight(f.Frame)); err != nil {
						return err
					}
				}
				return nil
			})
		}
		return nil
	})
	return g.Wait()
}

// place is where a chunk of the bundle belongs; an empty layer: nowhere.
type place struct {
	layer digest.Digest
	chunk int
}

// promise finds where the chunks belong, and says that they come.
func (b *boot) promise(s *prefetch.Stream, r *bundle.Reader) ([]place, error) {
	layers := make([]*openLayer, len(r.Layers()))
	b.l.mu.Lock()
	for n, in := range r.Layers() {
		for _, y := range b.img.layers {
			if y.origin.TOCDigest == in.TOCDigest {
				layers[n] = b.l.open[y.Digest]
			}
		}
	}
	b.l.mu.Unlock()
	var places []place
	var promised []prefetch.Promised
	at := b.d.SizeBytes
	for _, f := range r.Frames() {
		at -= f.PackedBytes
	}
	b.chunks = map[digest.Digest][]int{}
	for _, f := range r.Frames() {
		at += f.PackedBytes
		for _, c := range f.Chunks {
			var p place
			if y := layers[c.Layer]; y != nil {
				i, ok := chunkAt(y, c)
				if !ok {
					return nil, fmt.Errorf("%w: layer %s has no chunk of %d bytes at %d", bundle.ErrFormat, y.Digest(), c.Bytes, c.BlobOffset)
				}
				p = place{y.Digest(), i}
				if !y.Has(i) {
					promised = append(promised, prefetch.Promised{Digest: p.layer, Chunk: i, At: at})
					b.chunks[p.layer] = append(b.chunks[p.layer], i)
				}
			}
			places = append(places, p)
		}
	}
	return places, s.Promise(promised)
}

// chunkAt finds a chunk by its place in the blob, in whose order layers have them.
func chunkAt(y *openLayer, want bundle.Chunk) (int, bool) {
	lo, hi := 0, y.Len()
	for lo < hi {
		mid := (lo + hi) / 2
		c := y.Chunk(mid)
		if c.BlobOffset < want.BlobOffset || c.BlobOffset == want.BlobOffset && c.InnerOffset < want.InnerOffset {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == y.Len() {
		return 0, false
	}
	c := y.Chunk(lo)
	return lo, c.BlobOffset == want.BlobOffset && c.InnerOffset == want.InnerOffset && c.Bytes == want.Bytes
}

// put unpacks a frame, and returns buf to be used again.
func (b *boot) put(s *prefetch.Stream, r *bundle.Reader, f frame, places []place, buf []byte) ([]byte, error) {
	data, err := r.Unpack(f.Frame, f.packed, buf)
	if err != nil {
		return buf, err
	}
	rest := data
	for n, c := range f.Chunks {
		p := places[f.first+n]
		chunk := rest[:c.Bytes]
		rest = rest[c.Bytes:]
		if p.layer == "" {
			continue
		}
		if err := s.Put(p.layer, p.chunk, chunk, f.PackedBytes*c.Bytes/f.Bytes); err != nil {
			return data, err
		}
	}
	return data, nil
}
