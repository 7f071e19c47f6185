package convert

import (
	"bytes"
	"encoding/json"
	"fmt"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// encoded is what image and index have in common: a manifest's bytes.
type encoded struct {
	raw       []byte
	digest    v1.Hash
	mediaType types.MediaType
}

func (e *encoded) encode(manifest any, mediaType types.MediaType) (err error) {
	if e.raw, err = json.Marshal(manifest); err != nil {
		return err
	}
	e.mediaType = mediaType
	e.digest, _, err = v1.SHA256(bytes.NewReader(e.raw))
	return err
}

func (e *encoded) describe() (types.MediaType, v1.Hash, int64) {
	return e.mediaType, e.digest, int64(len(e.raw))
}

func (e *encoded) MediaType() (types.MediaType, error) { return e.mediaType, nil }
func (e *encoded) Digest() (v1.Hash, error)            { return e.digest, nil }
func (e *encoded) Size() (int64, error)                { return int64(len(e.raw)), nil }
func (e *encoded) RawManifest() ([]byte, error)        { return e.raw, nil }

// image is a converted image. Its layers stay what they are, with the methods
// that pushing looks for.
type image struct {
	encoded
	manifest  *v1.Manifest
	rawConfig []byte
	config    *v1.ConfigFile
	layers    []v1.Layer
}

var _ v1.Image = (*image)(nil)

func (i *image) Layers() ([]v1.Layer, error)         { return i.layers, nil }
func (i *image) ConfigName() (v1.Hash, error)        { return i.manifest.Config.Digest, nil }
func (i *image) ConfigFile() (*v1.ConfigFile, error) { return i.config.DeepCopy(), nil }
func (i *image) RawConfigFile() ([]byte, error)      { return i.rawConfig, nil }
func (i *image) Manifest() (*v1.Manifest, error)     { return i.manifest.DeepCopy(), nil }
func (i *image) LayerByDiffID(h v1.Hash) (v1.Layer, error) {
	for n, d := range i.config.RootFS.DiffIDs {
		if d == h {
			return i.layers[n], nil
		}
	}
	return nil, fmt.Errorf("%w: image %s has no layer with diff ID %s", accel.ErrNotFound, i.digest, h)
}

func (i *image) LayerByDigest(h v1.Hash) (v1.Layer, error) {
	if h == i.manifest.Config.Digest {
		return partial.ConfigLayer(i)
	}
	for n, d := range i.manifest.Layers {
		if d.Digest == h {
			return i.layers[n], nil
		}
	}
	return nil, fmt.Errorf("%w: image %s has no layer %s", accel.ErrNotFound, i.digest, h)
}

// index is a converted index.
type index struct {
	encoded
	manifest *v1.IndexManifest
	images   map[v1.Hash]*image
	indexes  map[v1.Hash]*index
}

var _ v1.ImageIndex = (*index)(nil)

func (i *index) IndexManifest() (*v1.IndexManifest, error) { return i.manifest.DeepCopy(), nil }

func (i *index) Image(h v1.Hash) (v1.Image, error) {
	if img := i.images[h]; img != nil {
		return img, nil
	}
	return nil, fmt.Errorf("%w: index %s has no image %s", accel.ErrNotFound, i.digest, h)
}

func (i *index) ImageIndex(h v1.Hash) (v1.ImageIndex, error) {
	if sub := i.indexes[h]; sub != nil {
		return sub, nil
	}
	return nil, fmt.Errorf("%w: index %s has no index %s", accel.ErrNotFound, i.digest, h)
}
