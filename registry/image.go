package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// maxConfigBytes bounds an image's config, as a manifest is bounded: large ones
// have a few hundred KiB.
const maxConfigBytes = 4 << 20

// core is what an image is made of here; partial does the rest.
type core struct {
	ctx       context.Context
	c         *Client
	r         repo
	raw       []byte
	mediaType types.MediaType
	manifest  *v1.Manifest

	mu     sync.Mutex
	config []byte // fetched at the first use
}

// image is a v1.Image whose layers stay *layer, with all that they can do.
type image struct {
	v1.Image
	core *core
}

func newImage(ctx context.Context, c *Client, r repo, raw []byte, desc v1.Descriptor) (v1.Image, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if d.Size < 0 {
			return nil, fmt.Errorf("blob %s has %d bytes", d.Digest, d.Size)
		}
	}
	co := &core{ctx: ctx, c: c, r: r, raw: raw, mediaType: desc.MediaType, manifest: m}
	inner, err := partial.CompressedToImage(co)
	if err != nil {
		return nil, err
	}
	return &image{Image: inner, core: co}, nil
}

func (i *image) Layers() ([]v1.Layer, error) {
	layers := make([]v1.Layer, 0, len(i.core.manifest.Layers))
	for _, d := range i.core.manifest.Layers {
		layers = append(layers, i.core.layer(d))
	}
	return layers, nil
}

func (i *image) LayerByDigest(h v1.Hash) (v1.Layer, error) {
	for _, d := range i.core.manifest.Layers {
		if d.Digest == h {
			return i.core.layer(d), nil
		}
	}
	if h == i.core.manifest.Config.Digest {
		return partial.ConfigLayer(i)
	}
	return nil, fmt.Errorf("%w: image has no layer %s", accel.ErrNotFound, h)
}

func (i *image) LayerByDiffID(h v1.Hash) (v1.Layer, error) {
	d, err := partial.DiffIDToBlob(i, h)
	if err != nil {
		return nil, err
	}
	return i.LayerByDigest(d)
}

func (co *core) RawManifest() ([]byte, error)        { return co.raw, nil }
func (co *core) MediaType() (types.MediaType, error) { return co.mediaType, nil }
func (co *core) Manifest() (*v1.Manifest, error)     { return co.manifest.DeepCopy(), nil }
func (co *core) ConfigFile() (*v1.ConfigFile, error) { return partial.ConfigFile(co) }
func (co *core) layer(d v1.Descriptor) *layer        { return &layer{core: co, desc: d} }
func (co *core) at(d v1.Descriptor) blob             { return blob{c: co.c, r: co.r, desc: d} }
func (co *core) ConfigName() (v1.Hash, error)        { return co.manifest.Config.Digest, nil }
func (co *core) LayerByDigest(v1.Hash) (partial.CompressedLayer, error) {
	return nil, errors.New("layers are made by image")
}

// RawConfigFile fetches the config. An error is not kept: the next call tries again.
func (co *core) RawConfigFile() ([]byte, error) {
	co.mu.Lock()
	defer co.mu.Unlock()
	if co.config != nil {
		return co.config, nil
	}
	raw, err := co.at(co.manifest.Config).whole(co.ctx, maxConfigBytes)
	if err != nil {
		return nil, err
	}
	co.config = raw
	return raw, nil
}

// Mountable is a layer that the registry may have in other repositories already.
// PushLayer asks for it to be mounted from there before it uploads anything; a
// layer that has no content of its own returns an error that wraps
// accel.ErrNotFound from Compressed.
type Mountable interface {
	// MountFrom names the repositories, "host/path", best first. Those of other
	// registries are passed over.
	MountFrom() []string
}

// layer is one layer of a pulled image.
type layer struct {
	core *core
	desc v1.Descriptor
}

var _ Mountable = (*layer)(nil)

func (l *layer) Digest() (v1.Hash, error)            { return l.desc.Digest, nil }
func (l *layer) Size() (int64, error)                { return l.desc.Size, nil }
func (l *layer) MediaType() (types.MediaType, error) { return l.desc.MediaType, nil }
func (l *layer) Descriptor() (*v1.Descriptor, error) { return l.desc.DeepCopy(), nil }
func (l *layer) DiffID() (v1.Hash, error)            { return partial.BlobToDiffID(l.core, l.desc.Digest) }
func (l *layer) MountFrom() []string                 { return []string{l.core.r.String()} }
func (l *layer) Compressed() (io.ReadCloser, error)  { return l.core.at(l.desc).open(l.core.ctx) }
func (l *layer) Uncompressed() (io.ReadCloser, error) {
	whole, err := partial.CompressedToLayer(l)
	if err != nil {
		return nil, err
	}
	return whole.Uncompressed()
}

// Exists reports whether the registry still has the layer; partial.Exists uses it.
func (l *layer) Exists() (bool, error) {
	_, err := l.core.at(l.desc).head(l.core.ctx)
	if errors.Is(err, accel.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// index is a pulled index. Its members are fetched when they are asked for.
type index struct {
	ctx      context.Context
	c        *Client
	r        repo
	raw      []byte
	desc     v1.Descriptor
	manifest *v1.IndexManifest
}

func newIndex(ctx context.Context, c *Client, r repo, raw []byte, desc v1.Descriptor) (v1.ImageIndex, error) {
	m, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	return &index{ctx: ctx, c: c, r: r, raw: raw, desc: desc, manifest: m}, nil
}

func (i *index) MediaType() (types.MediaType, error)       { return i.desc.MediaType, nil }
func (i *index) Digest() (v1.Hash, error)                  { return i.desc.Digest, nil }
func (i *index) Size() (int64, error)                      { return i.desc.Size, nil }
func (i *index) RawManifest() ([]byte, error)              { return i.raw, nil }
func (i *index) IndexManifest() (*v1.IndexManifest, error) { return i.manifest.DeepCopy(), nil }

func (i *index) Image(h v1.Hash) (v1.Image, error) {
	m, err := i.child(h)
	if err != nil {
		return nil, err
	}
	if m.Image == nil {
		return nil, fmt.Errorf("%w: %s@%s is a %q, no image", accel.ErrInvalid, i.r, h, m.Descriptor.MediaType)
	}
	return m.Image, nil
}

func (i *index) ImageIndex(h v1.Hash) (v1.ImageIndex, error) {
	m, err := i.child(h)
	if err != nil {
		return nil, err
	}
	if m.Index == nil {
		return nil, fmt.Errorf("%w: %s@%s is a %q, no index", accel.ErrInvalid, i.r, h, m.Descriptor.MediaType)
	}
	return m.Index, nil
}

func (i *index) child(h v1.Hash) (*Manifest, error) {
	for _, d := range i.manifest.Manifests {
		if d.Digest != h {
			continue
		}
		raw, desc, err := i.c.manifest(i.ctx, i.r, h.String())
		if err != nil {
			return nil, err
		}
		if desc.Size != d.Size {
			return nil, &corruptError{fmt.Sprintf("%s@%s has %d bytes, its index says %d", i.r, h, desc.Size, d.Size)}
		}
		return i.c.open(i.ctx, i.r, raw, desc)
	}
	return nil, fmt.Errorf("%w: index %s has no member %s", accel.ErrNotFound, i.desc.Digest, h)
}

// HasBlob returns the size of the blob d as the registry tells it (-1 where it
// does not); accel.ErrNotFound where the repository does not have it.
func (c *Client) HasBlob(ctx context.Context, repository string, d digest.Digest) (sizeBytes int64, err error) {
	r, err := c.target(repository, d.String())
	if err != nil {
		return 0, err
	}
	h, err := v1.NewHash(d.String())
	if err != nil {
		return 0, err
	}
	return blob{c: c, r: r, desc: v1.Descriptor{Digest: h}}.head(ctx)
}

// head asks whether the registry has the blob, and how large it says it is
// (-1 where it does not say).
func (b blob) head(ctx context.Context) (int64, error) {
	resp, err := b.c.do(ctx, b.r, request{
		method: http.MethodHead,
		url:    b.r.url("blobs/" + b.desc.Digest.String()),
		scopes: b.r.pull(),
		ok:     []int{http.StatusOK},
	})
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.ContentLength, nil
}
