package worker

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"

	"accel"
	"accel/profile"
	"accel/registry"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

const (
	// maxViewChunkBytes is the largest chunk that is looked into: as large as convert makes any.
	maxViewChunkBytes = 16 << 20
	// A registry is asked for blocks of this size, since what a program needs lies side by
	// side; so many of them are kept for an image.
	blockBytes = 1 << 20
	maxBlocks  = 32
	// maxInflatedBytes of inflated chunks of an image are kept: files are read from their beginning in small
	// steps.
	maxInflatedBytes = 32 << 20
	// maxInflateBytes bounds what is inflated for an image in all: a chunk may stand behind many others in its gzip
	// member. Python with pandas and scipy takes 51 MB.
	maxInflateBytes = 2 << 30
	// maxFetchBytes bounds what a registry is asked for: small reads all over an image take a block each. TOCs come
	// with it.
	maxFetchBytes = 1 << 30
)

// layerView reads files out of one eStargz blob.
type layerView struct {
	blob io.ReaderAt
	end  int64 // of the chunks, where the TOC begins
}

// openLayer has a layer's TOC, checked against its digest, taken in by b as it is read.
func openLayer(ctx context.Context, b *profile.Builder, blob io.ReaderAt, m accel.LayerMapping) (*layerView, error) {
	n := m.TargetBytes - m.TOCOffset
	if m.TOCOffset < 0 || n <= 0 || n > accel.MaxPackedTOCBytes || m.TOCDigest.Validate() != nil {
		return nil, fmt.Errorf("%w: a TOC %.100q at %d of %d bytes", accel.ErrInvalid, m.TOCDigest, m.TOCOffset, m.TargetBytes)
	}
	z, err := gzip.NewReader(io.NewSectionReader(blob, m.TOCOffset, n))
	if err != nil {
		return nil, fmt.Errorf("TOC of layer %s: %w", m.Target, err)
	}
	z.Multistream(false)
	tr := tar.NewReader(z)
	h, err := tr.Next()
	if err != nil {
		return nil, fmt.Errorf("TOC of layer %s: %w", m.Target, err)
	}
	if h.Name != estargz.TOCTarName {
		return nil, fmt.Errorf("%w: TOC of layer %s is called %.100q", accel.ErrInvalid, m.Target, h.Name)
	}
	sum := m.TOCDigest.Verifier()
	if err := b.Add(ctx, io.TeeReader(tr, sum)); err != nil {
		return nil, fmt.Errorf("TOC of layer %s: %w", m.Target, err)
	}
	if !sum.Verified() {
		return nil, fmt.Errorf("%w: TOC of layer %s does not have the digest %s", accel.ErrInvalid, m.Target, m.TOCDigest)
	}
	return &layerView{blob: blob, end: m.TOCOffset}, nil
}

// chunk inflates one chunk. left is what may still be inflated.
func (v *layerView) chunk(c profile.FileChunk, left *int64) ([]byte, error) {
	if c.Member >= v.end || c.Bytes > maxViewChunkBytes || c.Inside > maxViewChunkBytes {
		return nil, fmt.Errorf("%w: a chunk of %d bytes at %d", accel.ErrInvalid, c.Bytes, c.Member)
	}
	if *left -= c.Inside + c.Bytes; *left < 0 {
		return nil, fmt.Errorf("%w: its chunks lie so that reading them takes too long", accel.ErrInvalid)
	}
	z, err := gzip.NewReader(io.NewSectionReader(v.blob, c.Member, v.end-c.Member))
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	if _, err := io.CopyN(io.Discard, z, c.Inside); err != nil {
		return nil, err
	}
	b := make([]byte, c.Bytes)
	if _, err := io.ReadFull(z, b); err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != c.SHA256 {
		return nil, fmt.Errorf("%w: a chunk at %d does not have its digest", accel.ErrInvalid, c.Member)
	}
	return b, nil
}

// imageView is the layers of one image, nil for those without a TOC. It is used by one
// goroutine.
type imageView struct {
	tree      *profile.Tree
	layers    []*layerView
	keep      map[inflatedKey][]byte
	order     []inflatedKey
	keptBytes int64
	left      int64 // that may still be inflated
}

type inflatedKey struct {
	layer        int
	member, from int64 // in the blob, and in what is inflated there
}

// read implements profile.View's Read.
func (v *imageView) read(ctx context.Context, layer int, e *profile.Entry, offset, n int64) ([]byte, error) {
	if layer >= len(v.layers) || v.layers[layer] == nil {
		return nil, fmt.Errorf("%w: layer %d", accel.ErrNotFound, layer)
	}
	out := make([]byte, 0, n)
	for int64(len(out)) < n && ctx.Err() == nil {
		at := offset + int64(len(out))
		i, ok := slices.BinarySearchFunc(e.Chunks, at, func(c profile.FileChunk, at int64) int { return cmp.Compare(c.Offset, at) })
		if !ok {
			i--
		}
		if i < 0 || at >= e.Chunks[i].Offset+e.Chunks[i].Bytes {
			return out, nil
		}
		b, err := v.inflated(layer, e.Chunks[i])
		if err != nil {
			return nil, err
		}
		b = b[at-e.Chunks[i].Offset:]
		out = append(out, b[:min(int64(len(b)), n-int64(len(out)))]...)
	}
	return out, context.Cause(ctx)
}

func (v *imageView) inflated(layer int, c profile.FileChunk) ([]byte, error) {
	key := inflatedKey{layer, c.Member, c.Inside}
	if b, ok := v.keep[key]; ok && int64(len(b)) == c.Bytes {
		return b, nil
	}
	b, err := v.layers[layer].chunk(c, &v.left)
	if err != nil {
		return nil, err
	}
	v.drop(key) // one of another length
	v.keep[key] = b
	v.order = append(v.order, key)
	for v.keptBytes += c.Bytes; v.keptBytes > maxInflatedBytes; {
		v.drop(v.order[0])
	}
	return b, nil
}

func (v *imageView) drop(key inflatedKey) {
	if b, ok := v.keep[key]; ok {
		v.keptBytes -= int64(len(b))
		delete(v.keep, key)
		v.order = slices.DeleteFunc(v.order, func(k inflatedKey) bool { return k == key })
	}
}

// remoteBlob reads a blob in a registry by blocks.
type remoteBlob struct {
	ctx       context.Context // of the prediction: an io.ReaderAt has none of its own
	source    *registry.Source
	digest    digest.Digest
	sizeBytes int64
	cache     *blocks
}

// blocks are what was fetched lately, of all layers of an image.
type blocks struct {
	keep  map[blockKey][]byte
	order []blockKey
	left  int64 // bytes that may still be fetched
}

type blockKey struct {
	digest digest.Digest
	at     int64
}

// ReadAt implements io.ReaderAt.
func (r *remoteBlob) ReadAt(p []byte, offset int64) (n int, err error) {
	for n < len(p) {
		at := offset + int64(n)
		if at >= r.sizeBytes {
			return n, io.EOF
		}
		b, err := r.block(at / blockBytes * blockBytes)
		if err != nil {
			return n, err
		}
		n += copy(p[n:], b[at%blockBytes:])
	}
	return n, nil
}

func (r *remoteBlob) block(at int64) ([]byte, error) {
	key := blockKey{r.digest, at}
	if b, ok := r.cache.keep[key]; ok {
		return b, nil
	}
	size := min(blockBytes, r.sizeBytes-at)
	if r.cache.left -= size; r.cache.left < 0 {
		return nil, fmt.Errorf("%w: its files lie so that reading them takes more than %d bytes of the registry", accel.ErrInvalid, maxFetchBytes)
	}
	from, err := r.source.Range(r.ctx, r.digest, r.sizeBytes, at, size)
	if err != nil {
		return nil, err
	}
	if from.Unranged {
		return nil, errors.Join(fmt.Errorf("%s knows no ranges", r.source.Host()), from.Close())
	}
	b := make([]byte, size)
	_, err = io.ReadFull(from, b)
	if err = errors.Join(err, from.Close()); err != nil {
		return nil, err
	}
	if len(r.cache.order) == maxBlocks {
		delete(r.cache.keep, r.cache.order[0])
		r.cache.order = r.cache.order[1:]
	}
	r.cache.keep[key] = b
	r.cache.order = append(r.cache.order, key)
	return b, nil
}
