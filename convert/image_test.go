package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"accel"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func gzLayer(entries ...tarEntry) *blobLayer {
	src := tarOf(entries...)
	return layerOf(gz(src), src)
}

var (
	amd64 = v1.Platform{OS: "linux", Architecture: "amd64"}
	arm64 = v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	win   = v1.Platform{OS: "windows", Architecture: "amd64"}
)

// TestDockerImage: schema 2 goes in, OCI comes out, and all but the layers' form
// stays.
func TestDockerImage(t *testing.T) {
	a, b := gzLayer(file("a", text(40_000, 1))), gzLayer(file("b", "2"))
	a.mediaType, b.mediaType = types.DockerLayer, types.DockerLayer
	foreign := layerOf([]byte("far away"), []byte("as well"))
	foreign.mediaType = types.DockerForeignLayer
	img := mutate.ConfigMediaType(mutate.MediaType(imageOf(t, a, b), types.DockerManifestSchema2), types.DockerConfigJSON)
	img, err := mutate.Append(img, mutate.Addendum{Layer: foreign, URLs: []string{"https://elsewhere.test/x"}, MediaType: types.DockerForeignLayer, History: v1.History{Comment: "f"}})
	must(err)
	img = mutate.Annotations(img, map[string]string{"org.opencontainers.image.title": "app"}).(v1.Image)

	var mu sync.Mutex
	var done []accel.LayerMapping
	var progress []Progress
	c := newConverter(t, 2)
	res, err := c.Convert(context.Background(), Source{Repository: "r.test/app", Image: img}, Options{
		LayerDone: func(_ context.Context, l v1.Layer, m accel.LayerMapping) error {
			mu.Lock()
			defer mu.Unlock()
			if h, _ := l.Digest(); h.String() != m.Target.String() {
				t.Errorf("layer %s told as %s", h, m.Target)
			}
			done = append(done, m)
			return nil
		},
		Progress: func(p Progress) {
			mu.Lock()
			defer mu.Unlock()
			progress = append(progress, p)
		},
	})
	must(err)
	defer res.Close()
	if res.Unchanged || res.Index != nil {
		t.Error("not a changed image")
	}
	m := manifest(t, res.Image)
	srcDigest, _ := img.Digest()
	if m.MediaType != types.OCIManifestSchema1 || m.Config.MediaType != types.OCIConfigJSON || m.Layers[0].MediaType != types.OCILayer || m.Layers[2].MediaType != types.OCIRestrictedLayer {
		t.Errorf("media types: %+v", m)
	}
	if m.Subject == nil || m.Subject.Digest != srcDigest || m.Subject.MediaType != types.DockerManifestSchema2 {
		t.Errorf("subject %+v", m.Subject)
	}
	for k, want := range map[string]string{
		"org.opencontainers.image.title": "app", accel.AnnotationSourceDigest: srcDigest.String(),
		accel.AnnotationSourceRepository: "r.test/app", accel.AnnotationParams: c.Params.Fingerprint(),
	} {
		if m.Annotations[k] != want {
			t.Errorf("annotation %s is %q, want %q", k, m.Annotations[k], want)
		}
	}
	if ha, _ := a.Digest(); m.Layers[0].Annotations[accel.AnnotationLayerSource] != ha.String() {
		t.Errorf("layer annotations %v", m.Layers[0].Annotations)
	}
	if hf, _ := foreign.Digest(); m.Layers[2].Digest != hf || !slices.Equal(m.Layers[2].URLs, []string{"https://elsewhere.test/x"}) {
		t.Errorf("foreign layer %+v", m.Layers[2])
	}
	before, _ := img.ConfigFile()
	after, _ := res.Image.ConfigFile()
	if after.RootFS.DiffIDs[2] != before.RootFS.DiffIDs[2] || after.RootFS.DiffIDs[0] == before.RootFS.DiffIDs[0] || len(after.History) != len(before.History) {
		t.Errorf("rootfs %+v, history %+v", after.RootFS, after.History)
	}
	if d, err := diffConfigs(img, res.Image); err != nil || len(d) > 0 {
		t.Errorf("config: %v %v", d, err)
	}
	if len(done) != 2 || len(res.Mappings) != 1 || len(res.Mappings[0].Layers) != 3 {
		t.Errorf("told %v, mappings %+v", done, res.Mappings)
	}
	target, _ := res.Image.Digest()
	mp := res.Mappings[0]
	if mp.TargetManifest.String() != target.String() || mp.SourceManifest.String() != srcDigest.String() || mp.Platform != "linux/amd64" || mp.SourceIndex != "" || mp.TargetRepository != "" {
		t.Errorf("mapping %+v", mp)
	}
	for i, l := range mp.Layers {
		if l.Target.String() != m.Layers[i].Digest.String() || l.DiffID.String() != before.RootFS.DiffIDs[i].String() || l.TargetBytes != m.Layers[i].Size {
			t.Errorf("layer mapping %d %+v", i, l)
		}
	}
	if n := slices.IndexFunc(progress, func(p Progress) bool { return p.Done && p.ReadBytes == p.TotalBytes }); n < 0 {
		t.Errorf("progress %+v", progress)
	}
	if s := res.Stats; s.UncompressedBytes != int64(len(a.tar)+len(b.tar)) || s.SourceBytes != int64(len(a.blob)+len(b.blob)) || s.TargetBytes != m.Layers[0].Size+m.Layers[1].Size || !slices.Equal(s.Platforms, []string{"linux/amd64"}) || len(s.Notes) != 1 {
		t.Errorf("stats %+v", s)
	}
}

// TestValid has go-containerregistry look at what it will push.
func TestValid(t *testing.T) {
	img := imageOf(t, gzLayer(file("a", "1")), gzLayer(), gzLayer(file("a", "1")))
	res := converted(t, newConverter(t, 2), img)
	checkImage(t, res.Image)
	none := converted(t, newConverter(t, 2), imageOf(t))
	if !none.Unchanged {
		t.Error("an image without layers has nothing to convert")
	}
}

// checkImage pushes to a registry and pulls from there.
func checkImage(t *testing.T, img v1.Image) {
	t.Helper()
	ref := testRegistry(t).Tag("image")
	if err := remote.Write(ref, img); err != nil {
		t.Fatal("push: ", err)
	}
	back, err := remote.Image(ref)
	if err != nil {
		t.Fatal("pull: ", err)
	}
	checkPulled(t, img, back)
}

func checkPulled(t *testing.T, img, back v1.Image) {
	t.Helper()
	h, err := img.Digest()
	must(err)
	if hb, err := back.Digest(); err != nil || hb != h {
		t.Errorf("pushed %s, pulled %s %v", h, hb, err)
	}
	for i, l := range layers(t, back) {
		blob := bytesOf(t, l)
		want := layers(t, img)[i]
		if d, _ := want.Digest(); hashOf(blob) != d {
			t.Errorf("layer %d is %s, want %s", i, hashOf(blob), d)
		}
		if d, _ := l.DiffID(); hashOf(inflateAll(t, blob)) != d {
			t.Errorf("layer %d has not the config's diff ID", i)
		}
	}
}

func checkIndex(t *testing.T, idx v1.ImageIndex) {
	t.Helper()
	ref := testRegistry(t).Tag("index")
	if err := remote.WriteIndex(ref, idx); err != nil {
		t.Fatal("push: ", err)
	}
	back, err := remote.Index(ref)
	if err != nil {
		t.Fatal("pull: ", err)
	}
	m, err := back.IndexManifest()
	must(err)
	for _, d := range m.Manifests {
		if d.MediaType.IsImage() {
			img, err := idx.Image(d.Digest)
			must(err)
			pulled, err := back.Image(d.Digest)
			must(err)
			checkPulled(t, img, pulled)
		}
	}
}

func testRegistry(t *testing.T) name.Repository {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	r, err := name.NewRepository(strings.TrimPrefix(s.URL, "http://") + "/app")
	must(err)
	return r
}

func addendum(t *testing.T, add mutate.Appendable, p *v1.Platform, annotations map[string]string) mutate.IndexAddendum {
	t.Helper()
	d, err := partial.Descriptor(add)
	must(err)
	d.Platform, d.Annotations = p, annotations
	return mutate.IndexAddendum{Add: add, Descriptor: *d}
}

func indexOf(members ...mutate.IndexAddendum) v1.ImageIndex {
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.DockerManifestList), members...)
}

func TestIndex(t *testing.T) {
	shared := gzLayer(file("shared", text(50_000, 1)))
	x, a := imageFor(t, amd64, shared, gzLayer(file("x", "x"))), imageFor(t, arm64, shared, gzLayer(file("a", "a")))
	artifact := mutate.ConfigMediaType(imageOf(t, gzLayer(file("sbom", "s"))), "application/vnd.test+json")
	nested := indexOf(addendum(t, imageFor(t, v1.Platform{OS: "linux", Architecture: "s390x"}, shared), nil, nil))
	idx := indexOf(
		addendum(t, x, &amd64, map[string]string{"k": "v"}),
		addendum(t, imageFor(t, v1.Platform{}, gzLayer(file("att", "s"))), &v1.Platform{OS: "unknown", Architecture: "unknown"}, map[string]string{"vnd.docker.reference.type": "attestation-manifest"}),
		addendum(t, a, &arm64, nil),
		addendum(t, imageFor(t, win, gzLayer(file("Files/x", "x"))), &win, nil),
		addendum(t, artifact, nil, nil),
		addendum(t, nested, nil, nil),
	)
	res, err := newConverter(t, 2).Convert(context.Background(), Source{Repository: "r.test/app", Index: idx}, Options{})
	must(err)
	defer res.Close()
	if shared.opened.Load() != 1 {
		t.Errorf("a shared layer was read %d times", shared.opened.Load())
	}
	checkIndex(t, res.Index)
	m, err := res.Index.IndexManifest()
	must(err)
	h, _ := idx.Digest()
	if m.MediaType != types.OCIImageIndex || m.Subject == nil || m.Subject.Digest != h || len(m.Manifests) != 3 {
		t.Fatalf("index %+v", m)
	}
	if m.Manifests[0].Annotations["k"] != "v" || m.Manifests[1].Platform.String() != "linux/arm64/v8" || !m.Manifests[2].MediaType.IsIndex() {
		t.Errorf("members %+v", m.Manifests)
	}
	if len(res.Mappings) != 3 || res.Mappings[0].SourceIndex.String() != h.String() || res.Mappings[1].Platform != "linux/arm64/v8" || res.Mappings[2].Platform != "linux/s390x" {
		t.Errorf("mappings %+v", res.Mappings)
	}
	for _, want := range []string{"attestation", "windows", "artifact"} {
		if !slices.ContainsFunc(res.Stats.Notes, func(n string) bool { return strings.Contains(n, want) }) {
			t.Errorf("no note of %s in %q", want, res.Stats.Notes)
		}
	}
	if len(res.Stats.Notes) != 3 {
		t.Errorf("notes %q", res.Stats.Notes)
	}
}

func TestPlatforms(t *testing.T) {
	x, a, w := imageFor(t, amd64, gzLayer(file("x", "x"))), imageFor(t, arm64, gzLayer(file("a", "a"))), imageFor(t, win, gzLayer(file("w", "w")))
	for name, c := range map[string]struct {
		allowed []string
		source  Source
		want    []string
		rule    string
	}{
		"all":            {nil, Source{Index: indexOf(addendum(t, x, &amd64, nil), addendum(t, a, &arm64, nil))}, []string{"linux/amd64", "linux/arm64/v8"}, ""},
		"one":            {[]string{"linux/amd64"}, Source{Index: indexOf(addendum(t, x, &amd64, nil), addendum(t, a, &arm64, nil))}, []string{"linux/amd64"}, ""},
		"any variant":    {[]string{"linux/arm64"}, Source{Index: indexOf(addendum(t, x, nil, nil), addendum(t, a, nil, nil))}, []string{"linux/arm64/v8"}, ""},
		"none":           {[]string{"linux/s390x"}, Source{Index: indexOf(addendum(t, x, &amd64, nil))}, nil, "policy.platforms"},
		"single":         {[]string{"linux/s390x"}, Source{Image: x}, nil, "policy.platforms"},
		"windows":        {nil, Source{Image: w}, nil, "windows"},
		"windows only":   {nil, Source{Index: indexOf(addendum(t, w, &win, nil))}, nil, "windows"},
		"an empty index": {nil, Source{Index: indexOf()}, nil, "policy.platforms"},
	} {
		t.Run(name, func(t *testing.T) {
			conv := newConverter(t, 1)
			conv.Policy.Platforms = c.allowed
			res, err := conv.Convert(context.Background(), c.source, Options{})
			var r *accel.Rejection
			if errors.As(err, &r); c.rule != "" {
				if r == nil || r.Rule != c.rule {
					t.Errorf("%v, want %s", err, c.rule)
				}
				return
			}
			must(err)
			defer res.Close()
			if !slices.Equal(res.Stats.Platforms, c.want) {
				t.Errorf("%v, want %v", res.Stats.Platforms, c.want)
			}
		})
	}
}

// absent is an index with a member that the registry does not have.
type absent struct {
	sourceIndex
	gone v1.Hash
}

// sourceIndex has another name than its method ImageIndex, as embedding wants.
type sourceIndex = v1.ImageIndex

func (a absent) Image(h v1.Hash) (v1.Image, error) {
	if h == a.gone {
		return nil, fmt.Errorf("%w: %s", accel.ErrNotFound, h)
	}
	return a.sourceIndex.Image(h)
}

func TestAbsentMember(t *testing.T) {
	x, a := imageFor(t, amd64, gzLayer(file("x", "x"))), imageFor(t, arm64, gzLayer(file("a", "a")))
	h, _ := a.Digest()
	res, err := newConverter(t, 1).Convert(context.Background(), Source{Index: absent{indexOf(addendum(t, x, &amd64, nil), addendum(t, a, &arm64, nil)), h}}, Options{})
	must(err)
	defer res.Close()
	if len(res.Mappings) != 1 || len(res.Stats.Notes) != 1 || !strings.Contains(res.Stats.Notes[0], "does not have it") {
		t.Errorf("%+v", res.Stats)
	}
}

func TestBadSource(t *testing.T) {
	good := gzLayer(file("a", "a"))
	img := imageOf(t, good)
	noDiffIDs, _ := img.ConfigFile()
	noDiffIDs = noDiffIDs.DeepCopy()
	noDiffIDs.RootFS.DiffIDs = nil
	mismatch, err := mutate.ConfigFile(img, noDiffIDs)
	must(err)
	encrypted := gzLayer(file("a", "a"))
	encrypted.mediaType = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
	var many []v1.Layer
	for range maxLayers + 1 {
		many = append(many, good)
	}
	for name, c := range map[string]struct {
		source Source
		want   string
	}{
		"neither":     {Source{}, "exactly one"},
		"both":        {Source{Image: img, Index: empty.Index}, "exactly one"},
		"no diff IDs": {Source{Image: mismatch}, "1 layers, but its config 0 diff IDs"},
		"encrypted":   {Source{Image: imageOf(t, encrypted)}, "format.layer_media_type"},
		"many layers": {Source{Image: imageOf(t, many...)}, "format.max_layers"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newConverter(t, 1).Convert(context.Background(), c.source, Options{})
			if err == nil || !accel.IsPermanent(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
	for _, p := range []Params{{ChunkBytes: 1}, {Level: 10}, {Format: "zstd"}} {
		c := newConverter(t, 1)
		c.Params = p
		if _, err := c.Convert(context.Background(), Source{Image: img}, Options{}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%+v: %v", p, err)
		}
	}
}

func TestReplaceDiffIDs(t *testing.T) {
	got, err := replaceDiffIDs([]byte(`{"unknown":{"deep":[1,2.50]},"RootFS":{"type":"x"},"os":"linux"}`), []string{"sha256:aa"})
	must(err)
	var m map[string]json.RawMessage
	must(json.Unmarshal(got, &m))
	if string(m["unknown"]) != `{"deep":[1,2.50]}` || string(m["rootfs"]) != `{"type":"layers","diff_ids":["sha256:aa"]}` || len(m) != 3 {
		t.Errorf("%s", got)
	}
}
