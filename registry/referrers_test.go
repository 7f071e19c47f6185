package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"accel"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

func TestAttach(t *testing.T) {
	for kind, start := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			host := serve(t, start(t))
			c := newClient(t, host)
			repository := host + "/team/app"
			img := newImage(t, 100, 1)
			if err := c.PushImage(ctx, repository, img); err != nil {
				t.Fatal(err)
			}
			subject := descriptor(t, c, repository, digestOf(t, img))
			if refs, err := c.Referrers(ctx, repository, digestOf(t, img), ""); err != nil || len(refs) != 0 {
				t.Errorf("before: %v, %v", refs, err)
			}
			annotations := map[string]string{accel.AnnotationMapping: `{"payload":"x"}`, "a": "b"}
			_, want, err := registry.BuildAttachment(subject, accel.MediaTypeMapping, annotations)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // attaching again changes nothing
				d, err := c.Attach(ctx, repository, subject, accel.MediaTypeMapping, annotations)
				if err != nil {
					t.Fatal(err)
				}
				if d.String() != want.Digest.String() {
					t.Errorf("attached %s, built %s", d, want.Digest)
				}
			}
			if _, err := c.Attach(ctx, repository, subject, "application/other", nil); err != nil {
				t.Fatal(err)
			}
			refs, err := c.Referrers(ctx, repository, digestOf(t, img), accel.MediaTypeMapping)
			if err != nil || len(refs) != 1 {
				t.Fatalf("referrers: %+v, %v", refs, err)
			}
			got := refs[0]
			if got.Digest != want.Digest || got.Size != want.Size || got.MediaType != want.MediaType || got.ArtifactType != accel.MediaTypeMapping {
				t.Errorf("listed %+v, want %+v", got, want)
			}
			if !reflect.DeepEqual(got.Annotations, annotations) {
				t.Errorf("a listing alone delivers annotations %v, want %v", got.Annotations, annotations)
			}
			if err := c.Verify(ctx, repository, digest.Digest(want.Digest.String()), true); err != nil {
				t.Errorf("read back: %v", err)
			}
			all, err := c.Referrers(ctx, repository, digestOf(t, img), "")
			if err != nil || len(all) != 2 {
				t.Errorf("all: %d, %v", len(all), err)
			}
			for i, d := range all { // until none is left
				if err := c.Delete(ctx, repository, digest.Digest(d.Digest.String())); err != nil {
					t.Fatal(err)
				}
				if left, err := c.Referrers(ctx, repository, digestOf(t, img), ""); err != nil || len(left) != len(all)-i-1 {
					t.Errorf("after Delete: %v, %v", left, err)
				}
			}
		})
	}
}

// TestConcurrentAttachments: with the fallback tag, nobody's entry is lost.
func TestConcurrentAttachments(t *testing.T) {
	for _, kind := range []string{"ggcr", "distribution", "distribution with tokens"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			host := serve(t, kinds[kind](t))
			c := newClient(t, host)
			repository := host + "/app"
			img := newImage(t, 100, 1)
			if err := c.PushImage(ctx, repository, img); err != nil {
				t.Fatal(err)
			}
			subject := descriptor(t, c, repository, digestOf(t, img))
			want := make([]string, 20)
			var wg sync.WaitGroup
			for i := range want {
				wg.Go(func() {
					d, err := c.Attach(ctx, repository, subject, accel.MediaTypeMapping, map[string]string{"n": fmt.Sprint(i)})
					if err != nil {
						t.Error(err)
					}
					want[i] = d.String()
				})
			}
			wg.Wait()
			slices.Sort(want)
			refs, err := c.Referrers(ctx, repository, digestOf(t, img), accel.MediaTypeMapping)
			if err != nil || !reflect.DeepEqual(digestsOf(refs), want) {
				t.Errorf("%d of %d listed, %v", len(refs), len(want), err)
			}
		})
	}
}

// TestOtherWriters: entries of others stay, in every field, and our entry is
// written again when somebody else's write has swept it away.
func TestOtherWriters(t *testing.T) {
	ctx := context.Background()
	front := &faulty{next: newGGCR()}
	host := serve(t, front)
	c := newClient(t, host)
	repository := host + "/app"
	img, theirs := newImage(t, 100, 1), newImage(t, 200, 1)
	for _, i := range []v1.Image{img, theirs} {
		if err := c.PushImage(ctx, repository, i); err != nil {
			t.Fatal(err)
		}
	}
	subject := descriptor(t, c, repository, digestOf(t, img))
	tag := strings.Replace(digestOf(t, img).String(), ":", "-", 1)
	foreign := fmt.Sprintf(`{"mediaType":%q,"size":%d,"digest":%q,"artifactType":"theirs","org.example.new":{"field":1}}`,
		types.OCIManifestSchema1, descriptor(t, c, repository, digestOf(t, theirs)).Size, digestOf(t, theirs))
	index := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[` + foreign + `],"annotations":{"kept":"yes"}}`)
	putForeign := func() {
		r, err := http.NewRequest(http.MethodPut, "/v2/app/manifests/"+tag, bytes.NewReader(index))
		if err != nil {
			t.Error(err)
			return
		}
		r.Header.Set("Content-Type", string(types.OCIImageIndex))
		answered(r, front.next)
	}
	putForeign()
	// Twice, another writer that has read the tag before us writes it after us.
	front.set(on(http.MethodPut, tag, 2, func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		rec := answered(r, next)
		putForeign()
		send(w, rec, nil)
		return true
	}))
	d, err := c.Attach(ctx, repository, subject, accel.MediaTypeMapping, map[string]string{"n": "1"})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(front.requests("PUT /v2/app/manifests/" + tag)); n != 3 {
		t.Errorf("the tag was written %d times, want 3", n)
	}
	refs, err := c.Referrers(ctx, repository, digestOf(t, img), "")
	if err != nil || len(refs) != 2 || !slices.Contains(digestsOf(refs), d.String()) {
		t.Errorf("referrers %v, %v", digestsOf(refs), err)
	}
	r, _ := http.NewRequest(http.MethodGet, "/v2/app/manifests/"+tag, nil)
	raw := answered(r, front.next).Body.Bytes()
	if !bytes.Contains(raw, []byte(foreign)) || !bytes.Contains(raw, []byte(`"kept":"yes"`)) {
		t.Errorf("what others wrote is changed: %s", raw)
	}
	// Against a writer that never stops, it ends with an error.
	front.set(on(http.MethodPut, tag, 0, func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
		return true
	}))
	if _, err := c.Attach(ctx, repository, subject, accel.MediaTypeMapping, map[string]string{"n": "2"}); err == nil || !strings.Contains(err.Error(), "overwritten") {
		t.Errorf("got %v", err)
	}
}

// TestDeadEntriesAreDropped: distribution takes no index that names a manifest
// which is gone, and an entry for such a one would block all later ones.
func TestDeadEntriesAreDropped(t *testing.T) {
	for _, kind := range []string{"ggcr", "distribution"} {
		t.Run(kind, func(t *testing.T) {
			ctx := context.Background()
			h := kinds[kind](t)
			host := serve(t, h)
			c := newClient(t, host)
			repository := host + "/app"
			img := newImage(t, 100, 1)
			if err := c.PushImage(ctx, repository, img); err != nil {
				t.Fatal(err)
			}
			subject := descriptor(t, c, repository, digestOf(t, img))
			first, err := c.Attach(ctx, repository, subject, accel.MediaTypeMapping, map[string]string{"n": "1"})
			if err != nil {
				t.Fatal(err)
			}
			// Somebody deletes it who does not care for the tag.
			r, _ := http.NewRequest(http.MethodDelete, "/v2/app/manifests/"+first.String(), nil)
			if rec := answered(r, h); rec.Code != http.StatusAccepted {
				t.Fatalf("delete: %d %s", rec.Code, rec.Body)
			}
			second, err := c.Attach(ctx, repository, subject, accel.MediaTypeMapping, map[string]string{"n": "2"})
			if err != nil {
				t.Fatal(err)
			}
			refs, err := c.Referrers(ctx, repository, digestOf(t, img), accel.MediaTypeMapping)
			if err != nil || !reflect.DeepEqual(digestsOf(refs), []string{second.String()}) {
				t.Errorf("referrers %v, %v, want %s", digestsOf(refs), err, second)
			}
		})
	}
}

// TestPushedSubjectsAreListed: images and indexes with a subject are referrers too.
func TestPushedSubjectsAreListed(t *testing.T) {
	for _, kind := range []string{"ggcr", "ggcr with referrers", "distribution"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			host := serve(t, kinds[kind](t))
			c := newClient(t, host)
			repository := host + "/app"
			source := newIndex(t, newImage(t, 100, 1))
			if err := c.PushIndex(ctx, repository, source); err != nil {
				t.Fatal(err)
			}
			m, err := source.IndexManifest()
			if err != nil {
				t.Fatal(err)
			}
			platform := descriptor(t, c, repository, digest.Digest(m.Manifests[0].Digest.String()))
			note := map[string]string{accel.AnnotationParams: "estargz/1"}
			// The subject last: mutate's other changes drop it.
			img := mutate.Subject(mutate.Annotations(newImage(t, 50, 1), note).(v1.Image), platform).(v1.Image)
			idx := mutate.Subject(mutate.Annotations(newIndex(t, img), note).(v1.ImageIndex), descriptor(t, c, repository, digestOf(t, source))).(v1.ImageIndex)
			for range 2 {
				if err := c.PushIndex(ctx, repository, idx); err != nil {
					t.Fatal(err)
				}
			}
			for _, x := range []struct{ subject, referrer digest.Digest }{
				{digestOf(t, source), digestOf(t, idx)},
				{digest.Digest(platform.Digest.String()), digestOf(t, img)},
			} {
				refs, err := c.Referrers(ctx, repository, x.subject, "")
				if err != nil || !reflect.DeepEqual(digestsOf(refs), []string{x.referrer.String()}) || !reflect.DeepEqual(refs[0].Annotations, note) {
					t.Errorf("referrers of %s: %+v, %v, want %s", x.subject, refs, err, x.referrer)
				}
			}
		})
	}
}

// TestReferrersAPI: it is paged, and a registry that files by itself is left to it.
func TestReferrersAPI(t *testing.T) {
	ctx := context.Background()
	page := func(ds ...string) []byte {
		m := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
		for _, d := range ds {
			m.Manifests = append(m.Manifests, v1.Descriptor{MediaType: types.OCIManifestSchema1, ArtifactType: accel.MediaTypeMapping, Annotations: map[string]string{"a": "b"},
				Digest: v1.Hash{Algorithm: "sha256", Hex: digest.FromString(d).Encoded()}})
		}
		m.Manifests = append(m.Manifests, v1.Descriptor{MediaType: types.OCIManifestSchema1, ArtifactType: "other", Digest: v1.Hash{Algorithm: "sha256", Hex: digest.FromString("other").Encoded()}})
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	front := &faulty{next: newGGCR()}
	host := serve(t, front)
	front.set(on(http.MethodGet, "/referrers/", 0, func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		if r.URL.Query().Get("page") == "" {
			w.Header().Set("Link", fmt.Sprintf(`<%s?page=2>; rel="next"`, r.URL.Path))
			w.Write(page("a"))
			return true
		}
		w.Write(page("b"))
		return true
	}))
	c := newClient(t, host)
	refs, err := c.Referrers(ctx, host+"/app", digest.FromString("subject"), accel.MediaTypeMapping)
	if err != nil || len(refs) != 2 {
		t.Errorf("got %v, %v, want 2", digestsOf(refs), err)
	}
	subject := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: v1.Hash{Algorithm: "sha256", Hex: digest.FromString("subject").Encoded()}, Size: 7}
	if _, err := c.Attach(ctx, host+"/app", subject, accel.MediaTypeMapping, nil); err != nil {
		t.Fatal(err)
	}
	// It is asked for once, beside the API, of which nothing is known by then.
	if got := front.requests("/manifests/sha256-"); len(got) > 1 || len(got) == 1 && !strings.HasPrefix(got[0], http.MethodGet) {
		t.Errorf("the fallback tag was touched: %q", got)
	}
	// Not reachable is not "has no API": nothing is guessed then.
	front.set(on(http.MethodGet, "/referrers/", 0, status(503)))
	if _, err := c.Referrers(ctx, host+"/app", digest.FromString("subject"), ""); err == nil {
		t.Error("a 503 was taken for an empty listing")
	}
}

// TestPoorListings: a registry may leave out types and annotations, or tell the config's type; one that cannot be read, or is
// gone, hides none of the others.
func TestPoorListings(t *testing.T) {
	ctx := context.Background()
	front := &faulty{next: newGGCR()}
	host := serve(t, front)
	c := newClient(t, host)
	repository := host + "/app"
	img := newImage(t, 100, 1)
	if err := c.PushImage(ctx, repository, img); err != nil {
		t.Fatal(err)
	}
	subject := descriptor(t, c, repository, digestOf(t, img))
	attach := func(kind, n string) v1.Descriptor {
		t.Helper()
		d, err := c.Attach(ctx, repository, subject, kind, map[string]string{"n": n})
		if err != nil {
			t.Fatal(err)
		}
		return descriptor(t, c, repository, d)
	}
	mapping, profile, other := attach(accel.MediaTypeMapping, "m"), attach(accel.MediaTypeProfile, "p"), attach("other", "o")
	gone := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: v1.Hash{Algorithm: "sha256", Hex: digest.FromString("gone").Encoded()}, Size: 5}
	broken := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: v1.Hash{Algorithm: "sha256", Hex: digest.FromString("broken").Encoded()}, Size: 5}
	listing := func(kind func(d v1.Descriptor) v1.Descriptor, odd string, ds ...v1.Descriptor) fault {
		m := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
		for _, d := range ds {
			m.Manifests = append(m.Manifests, kind(d))
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		raw = bytes.Replace(raw, []byte(`"manifests":[`), []byte(`"manifests":[`+odd), 1)
		return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			switch {
			case strings.Contains(r.URL.Path, "/referrers/"):
				w.Header().Set("Content-Type", string(types.OCIImageIndex))
				w.Write(raw)
			case strings.Contains(r.URL.Path, broken.Digest.Hex):
				w.WriteHeader(http.StatusInternalServerError)
			default:
				return false
			}
			return true
		}
	}
	as := func(kind string) func(v1.Descriptor) v1.Descriptor {
		return func(d v1.Descriptor) v1.Descriptor {
			d.ArtifactType = kind
			return d
		}
	}
	for name, front2 := range map[string]fault{
		"no type":               listing(as(""), "", gone, mapping, broken, profile, other),
		"the config's type":     listing(as("application/vnd.oci.empty.v1+json"), "", broken, mapping, gone, profile, other),
		"entries without sense": listing(as(""), `{"digest":"sha256:../../x","mediaType":5},"text",{},null,`, mapping, profile),
	} {
		front.set(front2)
		refs, err := c.Referrers(ctx, repository, digestOf(t, img), accel.MediaTypeMapping, accel.MediaTypeProfile)
		if err != nil || len(refs) != 2 || refs[0].Digest != mapping.Digest || refs[1].Digest != profile.Digest {
			t.Errorf("%s: %+v, %v", name, refs, err)
			continue
		}
		if refs[0].ArtifactType != accel.MediaTypeMapping || refs[0].Annotations["n"] != "m" || refs[1].ArtifactType != accel.MediaTypeProfile || refs[1].Annotations["n"] != "p" {
			t.Errorf("%s: %+v", name, refs)
		}
		all, err := c.Referrers(ctx, repository, digestOf(t, img))
		if err != nil || len(all) < 2 {
			t.Errorf("%s: all are %v, %v", name, all, err)
		}
	}
	// The type is there, the annotations are not.
	front.set(listing(as(accel.MediaTypeMapping), "", mapping, gone))
	refs, err := c.Referrers(ctx, repository, digestOf(t, img), accel.MediaTypeMapping)
	if err != nil || len(refs) != 1 || refs[0].Annotations["n"] != "m" {
		t.Errorf("without annotations: %+v, %v", refs, err)
	}
	// Nothing is found because the registry is away: that is not "none".
	front.set(listing(as(""), "", broken))
	if refs, err := c.Referrers(ctx, repository, digestOf(t, img), accel.MediaTypeMapping); err == nil {
		t.Errorf("a registry that is away has %v", refs)
	}
	// What anybody can attach is bounded.
	var many []v1.Descriptor
	for n := range 3000 {
		d := mapping
		d.Digest.Hex = digest.FromString(fmt.Sprint(n)).Encoded()
		many = append(many, d)
	}
	front.set(listing(as(""), "", many...))
	if refs, err := c.Referrers(ctx, repository, digestOf(t, img), accel.MediaTypeMapping); err != nil || len(refs) > 0 {
		t.Errorf("many: %d, %v", len(refs), err)
	}
	if n := len(front.requests("GET /v2/app/manifests/")); n > 64 {
		t.Errorf("%d manifests were read for one listing", n)
	}
}

// TestEndlessListing: pages without an end, or huge ones, are read up to a bound.
func TestEndlessListing(t *testing.T) {
	front := &faulty{next: newGGCR()}
	host := serve(t, front)
	c := newClient(t, host)
	entry := fmt.Sprintf(`{"mediaType":%q,"size":5,"artifactType":"t","annotations":{"a":%q},"digest":`, types.OCIManifestSchema1, strings.Repeat("x", 1<<20))
	pages := 0
	front.set(on(http.MethodGet, "/referrers/", 0, func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		pages++
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		w.Header().Set("Link", fmt.Sprintf(`<%s?page=%d>; rel="next"`, r.URL.Path, pages))
		fmt.Fprintf(w, `{"manifests":[%s"%s"}]}`, entry, digest.FromString(fmt.Sprint(pages)))
		return true
	}))
	refs, err := c.Referrers(context.Background(), host+"/app", digest.FromString("subject"), "t")
	if err != nil || len(refs) == 0 || pages > 17 {
		t.Errorf("%d of %d pages, %v", len(refs), pages, err)
	}
}

// TestDeleteReferrer: what the manifest says counts, whatever a listing named it.
func TestDeleteReferrer(t *testing.T) {
	ctx := context.Background()
	host := serve(t, newGGCR())
	c := newClient(t, host)
	repository := host + "/app"
	img, victim := newImage(t, 100, 1), newImage(t, 200, 1)
	for _, i := range []v1.Image{img, victim} {
		if err := c.PushImage(ctx, repository, i); err != nil {
			t.Fatal(err)
		}
	}
	own, err := c.Attach(ctx, repository, descriptor(t, c, repository, digestOf(t, img)), accel.MediaTypeProfile, map[string]string{"n": "1"})
	if err != nil {
		t.Fatal(err)
	}
	others, err := c.Attach(ctx, repository, descriptor(t, c, repository, digestOf(t, victim)), accel.MediaTypeProfile, map[string]string{"n": "1"})
	if err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		kind string
		d    digest.Digest
	}{"an image": {accel.MediaTypeProfile, digestOf(t, victim)}, "another image's": {accel.MediaTypeProfile, others}, "another type": {accel.MediaTypeMapping, own}, "no type": {"", own}} {
		if err := c.DeleteReferrer(ctx, repository, digestOf(t, img), x.kind, x.d); !errors.Is(err, accel.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := c.Head(ctx, repository, x.d.String()); err != nil {
			t.Errorf("%s is deleted: %v", name, err)
		}
	}
	for range 2 { // what is gone already is no error
		if err := c.DeleteReferrer(ctx, repository, digestOf(t, img), accel.MediaTypeProfile, own); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.Head(ctx, repository, own.String()); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("it is still there: %v", err)
	}
}

func TestBuildAttachmentRefuses(t *testing.T) {
	good := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("a", 64)}
	for name, err := range map[string]error{
		"no type":    buildError(v1.Descriptor{Digest: good}, "", nil),
		"no subject": buildError(v1.Descriptor{}, "x/y", nil),
		"too large":  buildError(v1.Descriptor{Digest: good}, "x/y", map[string]string{"a": strings.Repeat("x", registry.MaxManifestBytes)}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func buildError(subject v1.Descriptor, artifactType string, annotations map[string]string) error {
	_, _, err := registry.BuildAttachment(subject, artifactType, annotations)
	return err
}
