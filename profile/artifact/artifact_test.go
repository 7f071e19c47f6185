package artifact_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/profile"
	"accel/profile/artifact"
	"accel/registry"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bed is a registry with one image.
type bed struct {
	t          *testing.T
	client     *registry.Client
	source     *registry.Source
	repository string
	subject    v1.Descriptor
}

func newBed(t *testing.T, o ...ggcr.Option) *bed {
	t.Helper()
	server := httptest.NewServer(ggcr.New(append(o, ggcr.Logger(log.New(io.Discard, "", 0)))...))
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	b := &bed{t: t, repository: host + "/team/app"}
	var err error
	b.client, err = registry.New(registry.Options{Hosts: []registry.Host{{Name: host, PlainHTTP: true}}, Attempts: 1})
	must(t, err)
	t.Cleanup(b.client.Close)
	b.source, err = b.client.Source(b.repository, "")
	must(t, err)
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	must(t, b.client.PushImage(t.Context(), b.repository, img))
	h, err := img.Digest()
	must(t, err)
	n, err := img.Size()
	must(t, err)
	b.subject = v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: h, Size: n}
	return b
}

func (b *bed) manifest() digest.Digest { return digest.Digest(b.subject.Digest.String()) }

// profile is one of n parts of random names, which do not compress well.
func (b *bed) profile(origin accel.ProfileOrigin, n int) accel.Profile {
	p := accel.Profile{Manifest: b.manifest(), Origin: origin, Items: []accel.ProfileItem{}}
	if origin == accel.ProfileRecorded {
		p.Starts, p.RecordedAt = n, time.Unix(1_800_000_000, 0).UTC()
	}
	rnd := rand.New(rand.NewPCG(uint64(n), 7))
	for range n {
		p.Items = append(p.Items, accel.ProfileItem{Path: fmt.Sprintf("f/%x%x", rnd.Uint64(), rnd.Uint64()), Bytes: 1 + rnd.Int64N(9999)})
	}
	return p
}

func (b *bed) attach(p accel.Profile) {
	b.t.Helper()
	f, err := artifact.FormOf(p)
	must(b.t, err)
	_, err = b.client.Attach(b.t.Context(), b.repository, b.subject, accel.MediaTypeProfile, f.Annotations, f.Blobs...)
	must(b.t, err)
}

func (b *bed) expect(want accel.Profile) {
	b.t.Helper()
	got, err := artifact.Find(b.t.Context(), b.source, b.manifest())
	must(b.t, err)
	if profile.Version(got) != profile.Version(want) {
		b.t.Errorf("found %d parts, %s; want %d, %s", len(got.Items), got.Origin, len(want.Items), want.Origin)
	}
}

func TestSmallAndLarge(t *testing.T) {
	for name, o := range map[string][]ggcr.Option{"fallback tag": nil, "referrers API": {ggcr.WithReferrersSupport(true)}} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, o...)
			if _, err := artifact.Find(t.Context(), b.source, b.manifest()); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("no profile: %v", err)
			}
			small, large := b.profile(accel.ProfilePredicted, 10), b.profile(accel.ProfileRecorded, 10_000)
			for p, blobs := range map[*accel.Profile]int{&small: 0, &large: 1} {
				f, err := artifact.FormOf(*p)
				must(t, err)
				if len(f.Blobs) != blobs {
					t.Errorf("a profile of %d parts has %d blobs", len(p.Items), len(f.Blobs))
				}
			}
			b.attach(small)
			b.expect(small)
			b.attach(large)
			b.expect(large) // of both
		})
	}
}

func TestHostileArtifacts(t *testing.T) {
	b := newBed(t)
	attach := func(annotations map[string]string, blobs ...registry.Blob) {
		t.Helper()
		_, err := b.client.Attach(t.Context(), b.repository, b.subject, accel.MediaTypeProfile, annotations, blobs...)
		must(t, err)
	}
	inline := func(b []byte) map[string]string {
		return map[string]string{accel.AnnotationProfile: base64.StdEncoding.EncodeToString(b)}
	}
	other := b.profile(accel.ProfilePredicted, 3)
	other.Manifest = digest.FromString("another")
	encoded, err := profile.Encode(other)
	must(t, err)
	attach(inline(profile.Pack(encoded)))
	attach(inline([]byte("nonsense")))
	attach(inline(profile.Pack(make([]byte, 40<<20)))) // inflates to far more
	attach(map[string]string{accel.AnnotationProfile: "?"})
	attach(nil, registry.Blob{MediaType: accel.MediaTypeProfile + "+gzip", Content: []byte("nonsense")})
	attach(nil, registry.Blob{MediaType: "text/plain", Content: []byte("nonsense")})
	if _, err := artifact.Find(t.Context(), b.source, b.manifest()); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("hostile artifacts: %v", err)
	}
	good := b.profile(accel.ProfilePredicted, 3)
	b.attach(good)
	b.expect(good)
}
