package lazy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync/atomic"

	"accel"
	"accel/cache"
	"accel/lazyfs"
	"accel/registry"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// annotationTOC is the stock library's name for the digest of a layer's TOC
	// (estargz.TOCJSONDigestAnnotation).
	annotationTOC = "containerd.io/snapshot/stargz/toc.digest"
	// maxLayers bounds an image's layers; overlayfs takes fewer.
	maxLayers = 500
	// maxConfigBytes bounds an image's config.
	maxConfigBytes = 8 << 20
)

// image is an image whose every layer can be mounted.
type image struct {
	name       string // as it was asked for
	repository string // "host/path"
	manifest   digest.Digest
	layers     []layer
	chains     map[digest.Digest]int // chain ID -> index into layers
	layouts    []*lazyfs.Layout      // of layers whose files were made just now, until the start is planned
	planned    chan struct{}         // closed when wave is what it will be
	cold       bool                  // something of it was missing when it was looked at
	wave       atomic.Pointer[wave]  // nil: nothing was fetched ahead
}

// layer is one layer of an image in the form that is mounted.
type layer struct {
	Digest digest.Digest // of the eStargz blob
	source digest.Digest // of the layer that containerd asks for
	diffID digest.Digest // what the image's config claims it to be; empty where a mapping is trusted
	origin origin
}

func declined(format string, args ...any) error {
	return &Declined{Reason: fmt.Sprintf(format, args...)}
}

// resolve finds out how an image is mounted. The source manifest is asked for in every case, and that its repository
// holds its layers: who cannot read them there may not have what stands in for them either.
func (l *Lazy) resolve(ctx context.Context, name string, p *prospect) (*image, error) {
	source, manifest := p.there.source, p.there.manifest
	var (
		g       errgroup.Group
		content ocispec.Manifest
		m       accel.Mapping
		mapErr  error
	)
	g.Go(func() (err error) {
		content, err = l.manifest(ctx, source, manifest)
		return err
	})
	g.Go(func() error {
		m, mapErr = p.mapping(ctx)
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("the node cannot read manifest %s of %s: %w", manifest, source.Repository(), err)
	}
	img := &image{name: name, repository: source.Repository(), manifest: manifest}
	var err error
	switch {
	case mapErr == nil:
		if err = img.fromMapping(m, content); err == nil && !l.same(source, m.SourceRepository) {
			// The manifest alone opens nothing: whoever knows its bytes can put it anywhere.
			err = l.holds(ctx, source, content.Layers)
		}
	case errors.Is(mapErr, accel.ErrNotFound):
		err = l.fromStargz(ctx, img, source, content)
	default:
		err = mapErr
	}
	return img, err
}

// fromMapping takes a mapping at its word, which is signed, as far as it speaks of this manifest.
func (img *image) fromMapping(m accel.Mapping, content ocispec.Manifest) error {
	if len(m.Layers) != len(content.Layers) {
		return declined("the mapping of %s has %d layers, the manifest %d", img.manifest, len(m.Layers), len(content.Layers))
	}
	diffIDs := make([]digest.Digest, len(m.Layers))
	for i, lm := range m.Layers {
		if lm.Source != content.Layers[i].Digest {
			return declined("the mapping of %s has %s as layer %d, the manifest %s", img.manifest, lm.Source, i, content.Layers[i].Digest)
		}
		if lm.TOCDigest == "" {
			return declined("layer %s was not converted", lm.Source)
		}
		diffIDs[i] = lm.DiffID
		img.layers = append(img.layers, layer{Digest: lm.Target, source: lm.Source, origin: origin{
			Repositories: []string{m.TargetRepository}, SizeBytes: lm.TargetBytes, TOCDigest: lm.TOCDigest, TOCOffset: lm.TOCOffset, Signed: true,
		}})
	}
	img.chain(diffIDs)
	return nil
}

// chain notes by which chain IDs containerd asks for the layers.
func (img *image) chain(diffIDs []digest.Digest) {
	img.chains = make(map[digest.Digest]int, len(diffIDs))
	for i, id := range identity.ChainIDs(slices.Clone(diffIDs)) {
		img.chains[id] = i
	}
}

// fromStargz takes an image that is eStargz itself. Its config says which DiffIDs its layers have, and is not
// believed for good. That the manifest names a layer which is here, for another image, is no reason to give it away: its
// own repository has to hold it.
func (l *Lazy) fromStargz(ctx context.Context, img *image, source *registry.Source, content ocispec.Manifest) error {
	if !l.allows(l.o.Stargz, source.Repository()) {
		return declined("no converted form of %s is known, and repository %s is not allowed to be mounted as it is", img.manifest, source.Repository())
	}
	for _, d := range content.Layers {
		toc, err := digest.Parse(d.Annotations[annotationTOC])
		if err != nil {
			return declined("no converted form of %s is known, and layer %s is not eStargz", img.manifest, d.Digest)
		}
		o := origin{Repositories: []string{source.Repository()}, SizeBytes: d.Size, TOCDigest: toc, TOCOffset: -1}
		if at, err := strconv.ParseInt(d.Annotations[accel.AnnotationTOCOffset], 10, 64); err == nil && at > 0 && at < d.Size {
			o.TOCOffset = at
		}
		img.layers = append(img.layers, layer{Digest: d.Digest, source: d.Digest, origin: o})
	}
	g, ctx := errgroup.WithContext(ctx)
	var diffIDs []digest.Digest
	g.Go(func() (err error) {
		diffIDs, err = l.diffIDs(ctx, source, content.Config)
		return err
	})
	g.Go(func() error { return l.holds(ctx, source, content.Layers) })
	if err := g.Wait(); err != nil {
		return err
	}
	if len(diffIDs) != len(img.layers) {
		return declined("image %s has %d layers and %d DiffIDs", img.manifest, len(img.layers), len(diffIDs))
	}
	img.chain(diffIDs)
	for i, d := range diffIDs {
		img.layers[i].diffID = d
	}
	for chain, i := range img.chains {
		img.layers[i].origin.Claims = append(img.layers[i].origin.Claims, claim{DiffID: diffIDs[i], Chain: chain})
	}
	return nil
}

// diffIDs reads them from the image's config.
func (l *Lazy) diffIDs(ctx context.Context, source *registry.Source, config ocispec.Descriptor) ([]digest.Digest, error) {
	if config.Digest.Validate() != nil || config.Size <= 0 || config.Size > maxConfigBytes {
		return nil, declined("config %q of %d bytes", config.Digest, config.Size)
	}
	raw, err := l.small(ctx, source, config.Digest, config.Size)
	if err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	var image ocispec.Image
	if err := json.Unmarshal(raw, &image); err != nil {
		return nil, declined("config %s: %v", config.Digest, err)
	}
	for _, d := range image.RootFS.DiffIDs {
		if d.Validate() != nil || d.Algorithm() != digest.SHA256 { // which is what is compared with it
			return nil, declined("config %s: DiffID %q", config.Digest, d)
		}
	}
	return image.RootFS.DiffIDs, nil
}

// small brings a blob of a few MiB, checked against its digest.
func (l *Lazy) small(ctx context.Context, source *registry.Source, d digest.Digest, sizeBytes int64) ([]byte, error) {
	r, err := source.Range(ctx, d, sizeBytes, 0, sizeBytes)
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(r, sizeBytes))
	if err := errors.Join(err, r.Close()); err != nil {
		return nil, err
	}
	if d.Algorithm().FromBytes(raw) != d {
		return nil, fmt.Errorf("%w: blob %s", cache.ErrDigest, d)
	}
	return raw, nil
}

// allows reports whether one of the globs matches.
func (l *Lazy) allows(globs []string, repository string) bool {
	return slices.ContainsFunc(globs, func(g string) bool { return accel.MatchRepository(g, repository) })
}
