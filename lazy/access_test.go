package lazy

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/cache"
	"accel/trust"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// answerWith has the registry answer some requests with a status.
func (b *bed) answerWith(code int, isOne func(r *http.Request) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = nil
	b.refuse = func(r *http.Request) int {
		if isOne(r) {
			return code
		}
		return 0
	}
}

// questions are the requests that the registry has had since answerWith, by a part of their path.
func (b *bed) questions(part string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.asked {
		if strings.Contains(p, part) {
			n++
		}
	}
	return n
}

func inside(repository string) func(*http.Request) bool {
	return func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v2/"+repository+"/") }
}

// TestLayersOfOthersAreNotGivenAway: a manifest that names a layer of another repository opens nothing, whether the layer
// is in the store or not.
func TestLayersOfOthersAreNotGivenAway(t *testing.T) {
	b := newBed(t)
	secret := b.layerWith("secret", []byte("for team/private alone"))
	private := b.push("team/private", true, secret)
	must(t, b.ask(private))
	// The registry of the tests looks for blobs everywhere, as some real ones do for pushes; this one does not have it there.
	b.answerWith(http.StatusNotFound, func(r *http.Request) bool {
		return inside("team/thief")(r) && strings.Contains(r.URL.Path, secret.digest.String())
	})
	b.requireDeclined(b.ask(b.push("team/thief", false, secret)), "does not have layer")
	b.requireDeclined(b.ask(b.push("team/thief", false, secret, b.layerWith("more", nil))), "does not have layer")
	must(t, b.ask(private))
}

// TestMappingsOpenWhatTheSourceOpens: a mapping that is signed opens the converted layers to who can read the source's
// layers, and not to who has put the source's manifest somewhere else.
func TestMappingsOpenWhatTheSourceOpens(t *testing.T) {
	ring, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	b := newBed(t)
	b.start(func(o *Options) {
		v, err := trust.NewVerifier(ring.Export())
		must(t, err)
		o.Keys.trusted = []*trust.Verifier{v}
		o.Stargz = nil
	})
	source, target := b.layerWith("source", []byte("s")), b.layerWith("target", []byte("t"))
	b.putBlob("team/fast", target.packed)
	private := b.push("team/private", true, source)
	at, err := tocOffset(target.packed, int64(len(target.packed)))
	must(t, err)
	m := accel.Mapping{
		SourceRepository: b.host + "/team/private", SourceManifest: private.manifest, Platform: "linux/amd64",
		TargetRepository: b.host + "/team/fast", TargetManifest: digest.FromString("t"), Params: "p",
		Layers: []accel.LayerMapping{{Source: source.digest, Target: target.digest, TargetBytes: int64(len(target.packed)), TOCDigest: target.toc, TOCOffset: at, DiffID: source.diffID}},
	}
	envelope, err := ring.Sign(t.Context(), m)
	must(t, err)
	for _, repository := range []string{"team/private", "team/thief"} {
		b.attach(repository, private.manifest, accel.MediaTypeMapping, map[string]string{accel.AnnotationMapping: string(envelope)})
	}
	stolen := b.push("team/thief", false, source)
	if stolen.manifest != private.manifest {
		t.Fatal("they are not the same image")
	}
	b.answerWith(http.StatusNotFound, func(r *http.Request) bool {
		return inside("team/thief")(r) && strings.Contains(r.URL.Path, "/blobs/"+source.digest.String())
	})
	b.requireDeclined(b.ask(stolen), "does not have layer")
	must(t, b.ask(private))
}

// TestGrantsOfClientsOpenNothing: that a client's credential opened a repository to the mirror says nothing about the node's.
func TestGrantsOfClientsOpenNothing(t *testing.T) {
	b := newBed(t)
	b.start(func(o *Options) { o.Own = "node" })
	img := b.push("team/private", true, b.layerWith("file", []byte("content")))
	repository := b.host + "/team/private"
	raw := b.get("/v2/team/private/manifests/" + img.manifest.String())
	must(t, b.stored.PutManifest(cache.Manifest{Digest: img.manifest, MediaType: ocispec.MediaTypeImageManifest, Raw: raw}))
	must(t, b.stored.Link(repository, img.manifest, img.layers[0].digest))
	must(t, b.stored.Grant(repository, "a client's", time.Now()))

	b.answerWith(http.StatusForbidden, inside("team/private"))
	if err := b.ask(img); err == nil || !strings.Contains(err.Error(), "the node cannot read manifest") {
		t.Errorf("opened by a client's grant: %v", err)
	}

	b.forgetAnswers()
	must(t, b.stored.Grant(repository, "node", time.Now()))
	b.answerWith(http.StatusForbidden, func(r *http.Request) bool {
		return inside("team/private")(r) && strings.Contains(r.URL.Path, "/manifests/sha256:")
	})
	if err := b.ask(img); err != nil || b.questions("/team/private/manifests/"+img.manifest.String()) > 0 {
		t.Errorf("with a grant of the node's own: %v", err)
	}

	b.forgetAnswers()
	must(t, b.stored.Grant(repository, "node", time.Now().Add(-time.Hour)))
	b.answerWith(http.StatusServiceUnavailable, func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/"+img.manifest.String()) })
	if err := b.ask(img); err != nil {
		t.Errorf("with an old grant and the registry away: %v", err)
	}
	b.forgetAnswers()
	b.answerWith(http.StatusUnauthorized, inside("team/private"))
	if err := b.ask(img); err == nil {
		t.Error("with an old grant that the registry does not know any more")
	}
	if _, known := b.stored.Granted(repository, "node"); known {
		t.Error("a grant outlives its refusal")
	}
}

// TestNonsenseKeepsNobodyOut: what an image said of a layer that was never here does not count against another's word; what the
// layer was found to be does.
func TestNonsenseKeepsNobodyOut(t *testing.T) {
	b := newBed(t)
	layer := b.layerWith("file", []byte("content"))
	wrong := layer
	wrong.toc = digest.FromString("another table of contents")
	if err := b.ask(b.push("team/wrong", true, wrong)); err == nil {
		t.Fatal("a layer with another TOC than the manifest says is mounted")
	}
	if err := b.ask(b.push("team/right", true, layer)); err != nil {
		t.Error("after somebody's nonsense:", err)
	}
	wrong.toc = digest.FromString("yet another")
	b.requireDeclined(b.ask(b.push("team/wrong", true, wrong)), "the layer is known with")
	b.forgetAnswers()
	if err := b.ask(b.push("team/right", true, layer)); err != nil {
		t.Error("after more nonsense:", err)
	}
}

// TestWhatIsKnownOfEvictedLayersGoes: and stays of those that are open.
func TestWhatIsKnownOfEvictedLayersGoes(t *testing.T) {
	b := newBed(t)
	layer := b.layerWith("file", []byte("content"))
	must(t, b.ask(b.push("team/app", true, layer)))
	gone := digest.FromString("gone")
	must(t, b.lazy.origins.put(gone, someOrigin()))
	must(t, b.lazy.sweepOrigins(t.Context()))
	if _, err := b.lazy.origins.get(gone); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("of a layer that is gone: %v", err)
	}
	if _, err := b.lazy.origins.get(layer.digest); err != nil {
		t.Errorf("of a layer that is open: %v", err)
	}
}

// TestLayersAreDigests: what a manifest names becomes the name of a file.
func TestLayersAreDigests(t *testing.T) {
	b := newBed(t)
	good := b.layerWith("file", []byte("content"))
	for _, bad := range []string{"", "sha256", "sha256:../../../escaped", "sha512:" + strings.Repeat("0", 128), ":"} {
		y := good
		y.digest = digest.Digest(bad)
		b.requireDeclined(b.ask(b.push("team/bad", false, good, y)), "names a layer")
	}
}

// attach lets something refer to a manifest.
func (b *bed) attach(repository string, subject digest.Digest, artifactType string, annotations map[string]string) {
	b.t.Helper()
	empty := []byte("{}")
	b.putBlob(repository, empty)
	m := ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType, Annotations: annotations,
		Config:  ocispec.Descriptor{MediaType: artifactType, Digest: digest.FromBytes(empty), Size: int64(len(empty))},
		Layers:  []ocispec.Descriptor{{MediaType: ocispec.MediaTypeEmptyJSON, Digest: digest.FromBytes(empty), Size: int64(len(empty))}},
		Subject: &ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: subject, Size: 1},
	}
	m.SchemaVersion = 2
	raw, err := json.Marshal(m)
	must(b.t, err)
	b.put("/v2/"+repository+"/manifests/"+digest.FromBytes(raw).String(), ocispec.MediaTypeImageManifest, raw)
}
