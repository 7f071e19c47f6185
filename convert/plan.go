package convert

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// Bounds of what a source may consist of. Real images stay far below: overlayfs
// mounts at most 500 layers, registries take manifests of 4 MiB.
const (
	maxManifestBytes = 4 << 20
	maxLayers        = 500
	maxMembers       = 1000 // of an index with its nested ones
	maxDepthOfIndex  = 4
)

// Attestations, as BuildKit marks them in an index.
const (
	annotationReferenceType = "vnd.docker.reference.type"
	attestationManifest     = "attestation-manifest"
	unknownPlatform         = "unknown"
)

// run is one call of Convert.
type run struct {
	*Converter
	source     Source
	options    Options
	priorities priorities
	files      *files

	jobs    map[v1.Hash]*job // distinct layers by source digest
	order   []*job           // the same, as they were found
	images  []*imagePlan     // all platforms, as they were found
	members int
	windows int // images that were dropped for their operating system
	notes   []string
}

// planned is a manifest of the source that has a place in the result: one of
// image and index.
type planned struct {
	desc  v1.Descriptor // as the index describes it; of the source itself otherwise
	image *imagePlan
	index *indexPlan
}

type imagePlan struct {
	desc      v1.Descriptor // the source manifest
	index     digest.Digest // the source index that names it; empty without one
	source    v1.Image
	manifest  *v1.Manifest
	rawConfig []byte
	platform  v1.Platform
	name      string // "os/arch[/variant]"
	parts     []part
	// uncompressed counts the layers' bytes against the policy.
	uncompressed atomic.Int64
}

// part is one layer of an image: converted by a job, or foreign and passed on.
type part struct {
	desc   v1.Descriptor
	diffID digest.Digest
	layer  v1.Layer
	job    *job // nil: foreign
}

type indexPlan struct {
	desc     v1.Descriptor
	source   v1.ImageIndex
	manifest *v1.IndexManifest
	members  []planned
}

func (r *run) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// plan reads all manifests and configs of the source.
func (r *run) plan(ctx context.Context) (planned, error) {
	var top planned
	var err error
	if r.source.Image != nil {
		if top.desc, err = describe(r.source.Image); err == nil {
			top.image, err = r.planImage(r.source.Image, top.desc, nil)
		}
		if err == nil {
			err = r.allowed(top.image)
		}
		if err == nil {
			err = r.addImage(top.image)
		}
	} else {
		if top.desc, err = describe(r.source.Index); err == nil {
			top.index, err = r.planIndex(ctx, r.source.Index, top.desc, 0)
		}
		if err == nil && len(r.images) == 0 {
			err = r.nothingLeft()
		}
	}
	return top, err
}

func (r *run) nothingLeft() error {
	rule := "policy.platforms"
	if r.windows > 0 && r.windows == len(r.notes) {
		rule = "windows"
	}
	return &accel.Rejection{Rule: rule, Detail: "the index has nothing to convert: " + strings.Join(r.notes, "; ")}
}

// described is what images and indexes have in common.
type described interface {
	MediaType() (types.MediaType, error)
	Digest() (v1.Hash, error)
	RawManifest() ([]byte, error)
}

// describe gives the plain descriptor of a manifest, of which it checks the size.
func describe(m described) (v1.Descriptor, error) {
	raw, err := m.RawManifest()
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("read manifest: %w", err)
	}
	h, err := m.Digest()
	if err != nil {
		return v1.Descriptor{}, err
	}
	if len(raw) > maxManifestBytes {
		return v1.Descriptor{}, &accel.Rejection{Rule: "format.max_manifest_size", Detail: fmt.Sprintf("manifest %s has %d bytes, more than %d", h, len(raw), maxManifestBytes)}
	}
	mediaType, err := m.MediaType()
	return v1.Descriptor{MediaType: mediaType, Digest: h, Size: int64(len(raw))}, err
}

func (r *run) planIndex(ctx context.Context, idx v1.ImageIndex, desc v1.Descriptor, depth int) (*indexPlan, error) {
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, accel.Permanent(fmt.Errorf("index %s: %w", desc.Digest, err))
	}
	if r.members += len(m.Manifests); r.members > maxMembers {
		return nil, &accel.Rejection{Rule: "format.max_members", Detail: fmt.Sprintf("the index has more than %d members", maxMembers)}
	}
	p := &indexPlan{desc: desc, source: idx, manifest: m}
	for _, d := range m.Manifests {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		mem, err := r.planMember(ctx, idx, desc, d, depth)
		if errors.Is(err, accel.ErrNotFound) {
			r.note("dropped %s: the source's registry does not have it", d.Digest)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("member %s of index %s: %w", d.Digest, desc.Digest, err)
		}
		if mem != nil {
			p.members = append(p.members, *mem)
		}
	}
	return p, nil
}

// planMember is nil for a member that has no place in the result; a note says
// why.
func (r *run) planMember(ctx context.Context, idx v1.ImageIndex, parent, d v1.Descriptor, depth int) (*planned, error) {
	switch {
	case isAttestation(d):
		r.note("dropped attestation %s: it is about the source's digest, and stays with the source index", d.Digest)
		return nil, nil
	case d.MediaType.IsIndex():
		if depth+1 >= maxDepthOfIndex {
			r.note("dropped index %s: nested more than %d deep", d.Digest, maxDepthOfIndex)
			return nil, nil
		}
		sub, err := idx.ImageIndex(d.Digest)
		if err != nil {
			return nil, err
		}
		own, err := describe(sub)
		if err != nil {
			return nil, err
		}
		p, err := r.planIndex(ctx, sub, own, depth+1)
		if err != nil || len(p.members) == 0 {
			return nil, err
		}
		return &planned{desc: d, index: p}, nil
	case !d.MediaType.IsImage():
		r.note("dropped %s: a %q is no image", d.Digest, d.MediaType)
		return nil, nil
	}
	if d.Platform != nil && d.Platform.OS != "" {
		if rejection := r.check(*d.Platform); rejection != nil {
			r.drop(d.Digest, rejection)
			return nil, nil
		}
	}
	img, err := idx.Image(d.Digest)
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, accel.Permanent(err)
	}
	if m.ArtifactType != "" || !m.Config.MediaType.IsConfig() {
		r.note("dropped %s: an artifact with config %q is no image", d.Digest, m.Config.MediaType)
		return nil, nil
	}
	own, err := describe(img)
	if err != nil {
		return nil, err
	}
	p, err := r.planImage(img, own, d.Platform)
	if err != nil {
		return nil, err
	}
	if rejection := r.check(p.platform); rejection != nil {
		r.drop(d.Digest, rejection)
		return nil, nil
	}
	p.index = digest.Digest(parent.Digest.String())
	return &planned{desc: d, image: p}, r.addImage(p)
}

func isAttestation(d v1.Descriptor) bool {
	return d.Annotations[annotationReferenceType] == attestationManifest ||
		d.Platform != nil && d.Platform.OS == unknownPlatform && d.Platform.Architecture == unknownPlatform
}

// check says which rule, if any, keeps a platform out.
func (r *run) check(p v1.Platform) *accel.Rejection {
	name := platformName(p)
	if p.OS == "windows" {
		return &accel.Rejection{Rule: "windows", Detail: name + ": Windows layers have no eStargz form"}
	}
	if len(r.Policy.Platforms) == 0 || slices.ContainsFunc(r.Policy.Platforms, func(allowed string) bool {
		return name == allowed || strings.HasPrefix(name, allowed+"/")
	}) {
		return nil
	}
	return &accel.Rejection{Rule: "policy.platforms", Detail: fmt.Sprintf("%s is not one of %s", name, strings.Join(r.Policy.Platforms, ", "))}
}

func (r *run) allowed(p *imagePlan) error {
	if rejection := r.check(p.platform); rejection != nil {
		return rejection
	}
	return nil
}

func (r *run) drop(d v1.Hash, why *accel.Rejection) {
	if why.Rule == "windows" {
		r.windows++
	}
	r.note("dropped %s by %s: %s", d, why.Rule, why.Detail)
}

func platformName(p v1.Platform) string {
	if p.OS == "" && p.Architecture == "" {
		return unknownPlatform // a config that does not say, as some tools write it
	}
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		name += "/" + p.Variant
	}
	return name
}

// planImage reads one image's manifest and config. platform is what an index
// says, and may be nil.
func (r *run) planImage(img v1.Image, desc v1.Descriptor, platform *v1.Platform) (*imagePlan, error) {
	m, err := img.Manifest()
	if err != nil {
		return nil, accel.Permanent(fmt.Errorf("manifest %s: %w", desc.Digest, err))
	}
	if len(m.Layers) > maxLayers {
		return nil, &accel.Rejection{Rule: "format.max_layers", Detail: fmt.Sprintf("%d layers, more than %d", len(m.Layers), maxLayers)}
	}
	if m.Config.Size > maxManifestBytes {
		return nil, &accel.Rejection{Rule: "format.max_manifest_size", Detail: fmt.Sprintf("config %s has %d bytes, more than %d", m.Config.Digest, m.Config.Size, maxManifestBytes)}
	}
	p := &imagePlan{desc: desc, source: img, manifest: m}
	if p.rawConfig, err = img.RawConfigFile(); err != nil {
		return nil, fmt.Errorf("config of %s: %w", desc.Digest, err)
	}
	config, err := parseConfig(p.rawConfig)
	if err != nil {
		return nil, accel.Permanent(fmt.Errorf("config of %s: %w", desc.Digest, err))
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return nil, accel.Permanent(fmt.Errorf("%w: image %s has %d layers, but its config %d diff IDs", accel.ErrInvalid, desc.Digest, len(m.Layers), len(config.RootFS.DiffIDs)))
	}
	p.platform = v1.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant, OSVersion: config.OSVersion}
	if platform != nil && platform.OS != "" {
		p.platform = *platform
	}
	p.name = platformName(p.platform)
	for i, d := range m.Layers {
		if !d.MediaType.IsLayer() {
			return nil, &accel.Rejection{Rule: "format.layer_media_type", Detail: fmt.Sprintf("layer %s is a %q", d.Digest, d.MediaType)}
		}
		p.parts = append(p.parts, part{desc: d, diffID: digest.Digest(config.RootFS.DiffIDs[i].String())})
	}
	return p, nil
}

// addImage plans the conversion of an image's layers.
func (r *run) addImage(p *imagePlan) error {
	layers, err := p.source.Layers()
	if err != nil {
		return fmt.Errorf("layers of %s: %w", p.desc.Digest, err)
	}
	if len(layers) != len(p.parts) {
		return accel.Permanent(fmt.Errorf("%w: image %s gives %d layers, its manifest %d", accel.ErrInvalid, p.desc.Digest, len(layers), len(p.parts)))
	}
	r.images = append(r.images, p)
	for i := range p.parts {
		l := &p.parts[i]
		l.layer = layers[i]
		if !l.desc.MediaType.IsDistributable() {
			r.note("passed on foreign layer %s of %s", l.desc.Digest, p.name)
			continue
		}
		j := r.jobs[l.desc.Digest]
		if j == nil {
			j = &job{
				source: digest.Digest(l.desc.Digest.String()), sizeBytes: l.desc.Size, diffID: l.diffID,
				layer: l.layer, annotations: l.desc.Annotations, platform: p.name, index: i,
				limit: r.Policy.MaxUncompressedBytes, tell: r.options.Progress,
			}
			r.jobs[l.desc.Digest] = j
			r.order = append(r.order, j)
		}
		if j.diffID != l.diffID {
			return accel.Permanent(fmt.Errorf("%w: layer %s cannot have the diff IDs %s and %s", accel.ErrInvalid, l.desc.Digest, j.diffID, l.diffID))
		}
		l.job = j
		j.images = append(j.images, p)
	}
	return nil
}

// convertLayers converts the distinct layers side by side, big ones first.
func (r *run) convertLayers(ctx context.Context) error {
	bySize := slices.SortedStableFunc(slices.Values(r.order), func(a, b *job) int { return cmp.Compare(b.sizeBytes, a.sizeBytes) })
	group, gctx := errgroup.WithContext(ctx)
	for _, j := range bySize {
		if r.layers.Acquire(gctx, 1) != nil {
			break // the group has the error, or ctx
		}
		group.Go(func() error {
			err := func() error {
				defer r.layers.Release(1)
				return r.convertJob(gctx, j)
			}()
			// The upload does not hold the next layer up.
			if err == nil {
				err = r.layerDone(gctx, j)
			}
			if err != nil {
				return fmt.Errorf("layer %s of %s: %w", j.source, j.platform, err)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}
