package convert

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// bytesAnnotations begin the names of layer annotations that describe the
// source's bytes, and would lie about the target's.
var bytesAnnotations = []string{
	"containerd.io/snapshot/",
	"io.containers.estargz.",
	"io.github.containers.zstd-chunked.",
	"com.amazon.soci.",
	"dev.accel.",
}

// parseConfig reads what matters here of an image config.
func parseConfig(raw []byte) (*v1.ConfigFile, error) {
	return v1.ParseConfigFile(bytes.NewReader(raw))
}

// assemble makes the manifests of the result.
func (r *run) assemble(top planned) (*Result, error) {
	res := &Result{files: r.files}
	unchanged := true
	for _, p := range r.images {
		unchanged = unchanged && p.unchanged()
	}
	res.Unchanged = unchanged
	r.stats(&res.Stats)
	var err error
	if unchanged {
		for _, p := range r.images {
			res.Mappings = append(res.Mappings, r.mapping(p, p.desc.Digest))
		}
		res.Image, res.Index = r.source.Image, r.source.Index
		return res, nil
	}
	if top.image != nil {
		res.Image, err = r.image(top.image, res)
	} else {
		res.Index, err = r.index(top.index, res)
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}

// unchanged says that the source's own manifest serves lazily as it is.
func (p *imagePlan) unchanged() bool {
	for _, l := range p.parts {
		if l.job != nil && (!l.job.kept() || l.desc.Annotations[estargz.TOCJSONDigestAnnotation] != l.job.memo.TOCDigest.String()) {
			return false
		}
	}
	return true
}

func (r *run) stats(s *accel.Result) {
	for _, j := range r.order {
		s.SourceBytes += j.sizeBytes
		s.TargetBytes += j.memo.TargetBytes
		if j.kept() {
			r.note("kept layer %s of %s: it is eStargz already", j.source, j.platform)
		}
	}
	for _, p := range r.images {
		s.UncompressedBytes = max(s.UncompressedBytes, p.uncompressed.Load())
		s.Platforms = append(s.Platforms, p.name)
	}
	s.Notes = r.notes
}

// annotate adds what our own manifests carry to the source's annotations.
func (r *run) annotate(source map[string]string, d v1.Hash) map[string]string {
	a := maps.Clone(source)
	if a == nil {
		a = map[string]string{}
	}
	a[accel.AnnotationSourceRepository] = r.source.Repository
	a[accel.AnnotationSourceDigest] = d.String()
	a[accel.AnnotationParams] = r.fingerprint()
	return a
}

func (r *run) image(p *imagePlan, res *Result) (*image, error) {
	diffIDs := make([]string, 0, len(p.parts))
	out := &image{}
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Layers:        []v1.Descriptor{},
		Annotations:   r.annotate(p.manifest.Annotations, p.desc.Digest),
		Subject:       subject(p.desc),
	}
	for _, l := range p.parts {
		d, diffID, layer := l.target()
		m.Layers = append(m.Layers, d)
		diffIDs = append(diffIDs, diffID.String())
		out.layers = append(out.layers, layer)
	}
	var err error
	if out.rawConfig, err = replaceDiffIDs(p.rawConfig, diffIDs); err != nil {
		return nil, accel.Permanent(fmt.Errorf("config of %s: %w", p.desc.Digest, err))
	}
	if out.config, err = parseConfig(out.rawConfig); err != nil {
		return nil, accel.Permanent(fmt.Errorf("config of %s: %w", p.desc.Digest, err))
	}
	h, n, err := v1.SHA256(bytes.NewReader(out.rawConfig))
	if err != nil {
		return nil, err
	}
	m.Config = v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: h, Size: n}
	out.manifest = &m
	if err := out.encode(&m, types.OCIManifestSchema1); err != nil {
		return nil, err
	}
	res.Mappings = append(res.Mappings, r.mapping(p, out.digest))
	return out, nil
}

// target is the part's descriptor and layer in the result.
func (l *part) target() (v1.Descriptor, digest.Digest, v1.Layer) {
	d := v1.Descriptor{MediaType: types.OCILayer, Annotations: map[string]string{}}
	for k, v := range l.desc.Annotations {
		d.Annotations[k] = v
		for _, prefix := range bytesAnnotations {
			if strings.HasPrefix(k, prefix) {
				delete(d.Annotations, k)
			}
		}
	}
	d.Annotations[accel.AnnotationLayerSource] = l.desc.Digest.String()
	if l.job == nil {
		d.MediaType, d.Digest, d.Size, d.URLs = l.desc.MediaType, l.desc.Digest, l.desc.Size, l.desc.URLs
		if d.MediaType == types.DockerForeignLayer {
			d.MediaType = types.OCIRestrictedLayer
		}
		return d, l.diffID, l.layer
	}
	m := l.job.memo
	d.Digest, _ = v1.NewHash(m.Target.String()) // checked where it came from
	d.Size = m.TargetBytes
	d.Annotations[estargz.TOCJSONDigestAnnotation] = m.TOCDigest.String()
	d.Annotations[estargz.StoreUncompressedSizeAnnotation] = strconv.FormatInt(m.UncompressedBytes, 10)
	d.Annotations[accel.AnnotationTOCOffset] = strconv.FormatInt(m.TOCOffset, 10)
	return d, m.DiffID, l.job.out
}

func subject(d v1.Descriptor) *v1.Descriptor {
	return &v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// replaceDiffIDs changes nothing else of a config, fields that we do not know
// included.
func replaceDiffIDs(raw []byte, diffIDs []string) ([]byte, error) {
	var config map[string]json.RawMessage
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, err
	}
	for k := range config {
		if strings.EqualFold(k, "rootfs") { // encoding/json does not mind the case
			delete(config, k)
		}
	}
	if diffIDs == nil {
		diffIDs = []string{}
	}
	rootfs, err := json.Marshal(struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}{"layers", diffIDs})
	if err != nil {
		return nil, err
	}
	config["rootfs"] = rootfs
	return json.Marshal(config)
}

func (r *run) mapping(p *imagePlan, target v1.Hash) accel.Mapping {
	m := accel.Mapping{
		SourceRepository: r.source.Repository,
		SourceManifest:   digest.Digest(p.desc.Digest.String()),
		SourceIndex:      p.index,
		Platform:         p.name,
		TargetManifest:   digest.Digest(target.String()),
		Params:           r.fingerprint(),
		Layers:           []accel.LayerMapping{},
	}
	for _, l := range p.parts {
		if l.job != nil {
			m.Layers = append(m.Layers, l.job.mapping())
			continue
		}
		d := digest.Digest(l.desc.Digest.String())
		m.Layers = append(m.Layers, accel.LayerMapping{Source: d, DiffID: l.diffID, Target: d, TargetBytes: l.desc.Size})
	}
	return m
}

func (r *run) index(p *indexPlan, res *Result) (*index, error) {
	out := &index{images: map[v1.Hash]*image{}, indexes: map[v1.Hash]*index{}}
	m := v1.IndexManifest{
		SchemaVersion: 2,
		MediaType:     types.OCIImageIndex,
		Manifests:     []v1.Descriptor{},
		Annotations:   r.annotate(p.manifest.Annotations, p.desc.Digest),
		Subject:       subject(p.desc),
		ArtifactType:  p.manifest.ArtifactType,
	}
	for _, mem := range p.members {
		d := v1.Descriptor{Annotations: mem.desc.Annotations, Platform: mem.desc.Platform}
		if mem.image != nil {
			img, err := r.image(mem.image, res)
			if err != nil {
				return nil, err
			}
			out.images[img.digest] = img
			d.MediaType, d.Digest, d.Size = img.describe()
			if d.Platform == nil {
				d.Platform = &mem.image.platform
			}
		} else {
			sub, err := r.index(mem.index, res)
			if err != nil {
				return nil, err
			}
			out.indexes[sub.digest] = sub
			d.MediaType, d.Digest, d.Size = sub.describe()
		}
		m.Manifests = append(m.Manifests, d)
	}
	out.manifest = &m
	return out, out.encode(&m, types.OCIImageIndex)
}
