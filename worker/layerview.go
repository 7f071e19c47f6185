package worker

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
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
	maxBlocks  = 64
	// maxInflated is how many inflated chunks of an image are kept: files are read from
	// their beginning in small steps.
	maxInflated = 64
)

// layerView reads files out of one eStargz blob.
type layerView struct {
	blob  io.ReaderAt
	toc   []byte
	files map[string][]viewChunk // of regular files, by clean name, in their order
	ends  []int64                // where gzip members begin, and the TOC, ascending
}

// viewChunk is a run of a file's bytes.
type viewChunk struct {
	offset, bytes  int64 // in the file
	member, inside int64 // where its gzip member begins, and where it is in what that holds
	digest         digest.Digest
}

// openLayer reads a layer's TOC, checked against its digest.
func openLayer(blob io.ReaderAt, m accel.LayerMapping) (*layerView, error) {
	n := m.TargetBytes - m.TOCOffset
	if m.TOCOffset < 0 || n <= 0 || n > accel.MaxPackedTOCBytes {
		return nil, fmt.Errorf("%w: a TOC at %d of %d bytes", accel.ErrInvalid, m.TOCOffset, m.TargetBytes)
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
	if h.Name != estargz.TOCTarName || h.Size <= 0 || h.Size > accel.MaxTOCBytes {
		return nil, fmt.Errorf("%w: TOC of layer %s is %q of %d bytes", accel.ErrInvalid, m.Target, h.Name, h.Size)
	}
	var toc bytes.Buffer
	if _, err := io.Copy(&toc, tr); err != nil {
		return nil, fmt.Errorf("TOC of layer %s: %w", m.Target, err)
	}
	if m.TOCDigest.Validate() != nil || m.TOCDigest.Algorithm().FromBytes(toc.Bytes()) != m.TOCDigest {
		return nil, fmt.Errorf("%w: TOC of layer %s does not have the digest %s", accel.ErrInvalid, m.Target, m.TOCDigest)
	}
	v := &layerView{blob: blob, toc: toc.Bytes(), files: map[string][]viewChunk{}, ends: []int64{m.TOCOffset}}
	return v, v.index()
}

// index finds the chunks.
func (v *layerView) index() error {
	var toc struct {
		Entries []struct {
			Name        string        `json:"name"`
			Type        string        `json:"type"`
			Size        int64         `json:"size"`
			Offset      int64         `json:"offset"`
			InnerOffset int64         `json:"innerOffset"`
			ChunkOffset int64         `json:"chunkOffset"`
			ChunkSize   int64         `json:"chunkSize"`
			ChunkDigest digest.Digest `json:"chunkDigest"`
		} `json:"entries"`
	}
	if err := json.Unmarshal(v.toc, &toc); err != nil {
		return fmt.Errorf("%w: TOC: %w", accel.ErrInvalid, err)
	}
	sizes := map[string]int64{}
	for i := range toc.Entries {
		e := &toc.Entries[i]
		name := path.Clean("/" + e.Name)[1:]
		switch e.Type {
		case "reg":
			sizes[name] = e.Size
			delete(v.files, name) // a later entry replaces an earlier one
			if e.Size == 0 {
				continue
			}
		case "chunk":
		default:
			continue
		}
		c := viewChunk{offset: e.ChunkOffset, bytes: e.ChunkSize, member: e.Offset, inside: e.InnerOffset, digest: e.ChunkDigest}
		if c.bytes == 0 {
			c.bytes = sizes[name] - c.offset
		}
		if c.offset < 0 || c.bytes <= 0 || c.member <= 0 || c.inside < 0 {
			continue // read as missing
		}
		v.files[name] = append(v.files[name], c)
		v.ends = append(v.ends, c.member)
	}
	slices.Sort(v.ends)
	v.ends = slices.Compact(v.ends)
	return nil
}

// chunk inflates one chunk.
func (v *layerView) chunk(c viewChunk) ([]byte, error) {
	n, ok := slices.BinarySearch(v.ends, c.member)
	if !ok || n+1 == len(v.ends) || c.bytes > maxViewChunkBytes || c.inside > maxViewChunkBytes {
		return nil, fmt.Errorf("%w: a chunk of %d bytes at %d", accel.ErrInvalid, c.bytes, c.member)
	}
	z, err := gzip.NewReader(io.NewSectionReader(v.blob, c.member, v.ends[n+1]-c.member))
	if err != nil {
		return nil, err
	}
	if _, err := io.CopyN(io.Discard, z, c.inside); err != nil {
		return nil, err
	}
	b := make([]byte, c.bytes)
	if _, err := io.ReadFull(z, b); err != nil {
		return nil, err
	}
	if c.digest.Validate() != nil || c.digest.Algorithm().FromBytes(b) != c.digest {
		return nil, fmt.Errorf("%w: a chunk at %d does not have its digest", accel.ErrInvalid, c.member)
	}
	return b, nil
}

// imageView is the layers of one image, nil for those without a TOC. It is used by one
// goroutine.
type imageView struct {
	layers []*layerView
	keep   map[inflatedKey][]byte
	order  []inflatedKey
}

type inflatedKey struct {
	layer        int
	member, from int64
}

// read implements profile.View's Read.
func (v *imageView) read(ctx context.Context, layer int, e *profile.Entry, offset, n int64) ([]byte, error) {
	if layer >= len(v.layers) || v.layers[layer] == nil {
		return nil, fmt.Errorf("%w: layer %d", accel.ErrNotFound, layer)
	}
	chunks := v.layers[layer].files[e.Path]
	out := make([]byte, 0, n)
	for int64(len(out)) < n && ctx.Err() == nil {
		at := offset + int64(len(out))
		i, ok := slices.BinarySearchFunc(chunks, at, func(c viewChunk, at int64) int { return cmp.Compare(c.offset, at) })
		if !ok {
			i--
		}
		if i < 0 || at >= chunks[i].offset+chunks[i].bytes {
			return out, nil
		}
		b, err := v.inflated(layer, chunks[i])
		if err != nil {
			return nil, err
		}
		b = b[at-chunks[i].offset:]
		out = append(out, b[:min(int64(len(b)), n-int64(len(out)))]...)
	}
	return out, context.Cause(ctx)
}

func (v *imageView) inflated(layer int, c viewChunk) ([]byte, error) {
	key := inflatedKey{layer, c.member, c.offset}
	if b, ok := v.keep[key]; ok {
		return b, nil
	}
	b, err := v.layers[layer].chunk(c)
	if err != nil {
		return nil, err
	}
	if len(v.order) == maxInflated {
		delete(v.keep, v.order[0])
		v.order = v.order[1:]
	}
	v.keep[key] = b
	v.order = append(v.order, key)
	return b, nil
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
