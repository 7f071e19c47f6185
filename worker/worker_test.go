package worker_test

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/convert"
	"accel/readiness"
	"accel/registry"
	"accel/trust"
	"accel/worker"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

const (
	ociManifest = string(types.OCIManifestSchema1)
	ociIndex    = string(types.OCIImageIndex)
)

func TestPushBecomesReady(t *testing.T) {
	b := newBed(t)
	d := b.upload("team/app:v1", image(t, 1, "amd64"))
	b.tell("team/app:v1", d, time.Now(), ociManifest)
	rec := b.wait("team/app:v1", accel.Ready)

	if got := b.standing("team/app", "v1-esgz"); got != rec.Target.Digest || !slices.Equal(rec.Target.Tags, []string{"v1-esgz"}) {
		t.Errorf("target tag points to %s, record says %s with tags %v", got, rec.Target.Digest, rec.Target.Tags)
	}
	if got := b.standing("team/app", "v1"); got != d {
		t.Errorf("source tag moved from %s to %s", d, got)
	}
	target, err := b.client.Pull(b.ctx, rec.Target.Repository, rec.Target.Digest)
	must(t, err)
	m, err := target.Image.Manifest()
	must(t, err)
	if m.Subject == nil || m.Subject.Digest.String() != d.String() {
		t.Errorf("subject is %v, want %s", m.Subject, d)
	}
	if m.Annotations[accel.AnnotationSourceDigest] != d.String() || m.Annotations[accel.AnnotationSourceRepository] != rec.Repository {
		t.Errorf("annotations %v do not name the source", m.Annotations)
	}
	source, err := b.client.Pull(b.ctx, rec.Repository, d)
	must(t, err)
	diffs, err := convert.Diff(b.ctx, source.Image, target.Image, convert.DiffOptions{})
	must(t, err)
	if len(diffs) > 0 {
		t.Errorf("file trees differ: %v", diffs)
	}
	ours, err := b.tracker.Ours(b.ctx, rec.Repository, rec.Target.Digest)
	must(t, err)
	if !ours {
		t.Error("the webhook of our own push would not be known")
	}
	if r := rec.Result; r.SourceBytes <= 0 || r.TargetBytes <= 0 || r.UncompressedBytes <= 0 || r.Total <= 0 || !slices.Equal(r.Platforms, []string{"linux/amd64"}) {
		t.Errorf("result lacks figures: %+v", r)
	}
}

func TestMappingIsSignedAndAttached(t *testing.T) {
	b := newBed(t)
	d := b.upload("team/app:v1", image(t, 1, "amd64"))
	b.tell("team/app:v1", d, time.Now(), ociManifest)
	rec := b.wait("team/app:v1", accel.Ready)

	verifier, err := trust.NewVerifier(b.keys.Export())
	must(t, err)
	refs, err := b.client.Referrers(b.ctx, rec.Repository, d, accel.MediaTypeMapping)
	must(t, err)
	if len(refs) != 1 {
		t.Fatalf("%d mappings refer to the source, want 1: %v", len(refs), refs)
	}
	stored, err := b.tracker.Mapping(b.ctx, "", d)
	must(t, err)
	for from, envelope := range map[string][]byte{"referrer": []byte(refs[0].Annotations[accel.AnnotationMapping]), "api": stored} {
		m, err := verifier.Verify(b.ctx, envelope)
		if err != nil {
			t.Fatalf("%s: %v", from, err)
		}
		if m.SourceManifest != d || m.TargetManifest != rec.Target.Digest || m.TargetRepository != rec.Target.Repository || len(m.Layers) != 1 || m.Layers[0].TOCDigest == "" {
			t.Errorf("%s: mapping %+v does not lead from %s to %s", from, m, d, rec.Target.Digest)
		}
	}
	stranger, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	other, err := trust.NewVerifier(stranger.Export())
	must(t, err)
	if _, err := other.Verify(b.ctx, stored); err == nil {
		t.Error("a stranger's key verifies the mapping")
	}
}

func TestTargetGoneIsConvertedAgain(t *testing.T) {
	b := newBed(t, func(_ *bed, ro *readiness.Options, _ *registry.Options, _ *worker.Options) {
		ro.CheckInterval = 50 * time.Millisecond
	})
	d := b.upload("app:v1", image(t, 1, "amd64"))
	b.tell("app:v1", d, time.Now(), ociManifest)
	rec := b.wait("app:v1", accel.Ready)
	must(t, b.client.Delete(b.ctx, rec.Target.Repository, rec.Target.Digest))
	b.eventually("Stale, and Ready again", func() bool {
		h := b.history(rec.ID)
		i := slices.Index(h, accel.Stale)
		return i > 0 && slices.Contains(h[i:], accel.Ready)
	})
	if got := b.standing("app", "v1-esgz"); got != rec.Target.Digest {
		t.Errorf("converted again to %q, want the same digest %s", got, rec.Target.Digest)
	}
}

func TestRegistryFaults(t *testing.T) {
	any := func(*http.Request) bool { return true }
	reset := func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool { panic(http.ErrAbortHandler) }
	hang := func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		io.Copy(io.Discard, r.Body) // a server notices that its client has gone only after the body
		<-r.Context().Done()
		return true
	}
	for name, f := range map[string]fault{
		"401 in the middle":        times(1, blobGet, answer(http.StatusUnauthorized, "WWW-Authenticate", `Basic realm="again"`)),
		"403 in the middle":        times(1, blobUpload, answer(http.StatusForbidden)),
		"429 with Retry-After":     times(2, any, answer(http.StatusTooManyRequests, "Retry-After", "1")),
		"500 for a while":          times(9, any, answer(http.StatusInternalServerError)),
		"503 on manifests":         times(5, manifestPut, answer(http.StatusServiceUnavailable)),
		"reset on download":        times(3, blobGet, reset),
		"reset on upload":          times(3, blobUpload, reset),
		"hang on download":         times(1, blobGet, hang),
		"hang on manifest":         times(1, manifestPut, hang),
		"404 of a manifest, early": times(1, func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }, answer(http.StatusNotFound)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			d := b.upload("app:v1", image(t, 1, "amd64"))
			b.board.set(f)
			b.tell("app:v1", d, time.Now(), ociManifest)
			b.wait("app:v1", accel.Ready)
		})
	}
}

func TestPoisonedImageDoesNotStopOthers(t *testing.T) {
	b := newBed(t)
	bad := b.upload("bad:v1", poisoned(t))
	b.tell("bad:v1", bad, time.Now(), ociManifest)
	for i := range uint64(5) {
		ref := "good:v" + string(rune('0'+i))
		b.tell(ref, b.upload(ref, image(t, 10+i, "amd64")), time.Now(), ociManifest)
	}
	for i := range uint64(5) {
		b.wait("good:v"+string(rune('0'+i)), accel.Ready)
	}
	if rec := b.wait("bad:v1", accel.Failed); rec.Reason == "" {
		t.Error("Failed without a reason")
	}
}

func TestIndexTakesItsChildrenAlong(t *testing.T) {
	b := newBed(t)
	amd, arm := image(t, 1, "amd64"), image(t, 2, "arm64")
	idx := index(t, amd, arm)
	d := b.upload("app:v1", idx)
	// The children's events come first, as registries send them.
	child := b.tell("app", digest.Digest(digestOf(t, amd)), time.Now(), ociManifest)
	b.tell("app", digest.Digest(digestOf(t, arm)), time.Now(), ociManifest)
	b.tell("app:v1", d, time.Now(), ociIndex)
	rec := b.wait("app:v1", accel.Ready)
	if !slices.Equal(rec.Result.Platforms, []string{"linux/amd64", "linux/arm64"}) {
		t.Errorf("platforms %v", rec.Result.Platforms)
	}
	page, err := b.tracker.List(b.ctx, readiness.Filter{})
	must(t, err)
	if len(page.Records) != 1 {
		t.Errorf("%d records, want the index's alone", len(page.Records))
	}
	got, err := b.tracker.Get(b.ctx, child.ID)
	must(t, err)
	if got.ID != rec.ID {
		t.Errorf("the child's id leads to %s, want the index %s", got.ID, rec.ID)
	}
	for _, img := range []v1.Image{amd, arm} {
		if _, err := b.tracker.Mapping(b.ctx, rec.Repository, digest.Digest(digestOf(t, img))); err != nil {
			t.Errorf("platform %s has no mapping: %v", digestOf(t, img), err)
		}
	}
}

func TestUntaggedImageStandsAlone(t *testing.T) {
	b := newBed(t)
	img := image(t, 1, "amd64")
	d := b.upload("app@"+digestOf(t, img), img)
	b.tell("app", d, time.Now(), ociManifest)
	rec := b.wait("app@"+d.String(), accel.Ready)
	if len(rec.Target.Tags) != 1 || b.standing("app", rec.Target.Tags[0]) != rec.Target.Digest {
		t.Errorf("an untagged image's target tags are %v", rec.Target.Tags)
	}
}

func TestWhatIsNoImage(t *testing.T) {
	b := newBed(t)
	artifact := mutate.ConfigMediaType(image(t, 1, "amd64"), "application/vnd.example.chart.v1+json")
	d := b.upload("chart:v1", artifact)
	rec := b.tell("chart:v1", d, time.Now(), ociManifest)
	b.eventually("an artifact's record is dropped", func() bool {
		_, err := b.tracker.Get(b.ctx, rec.ID)
		return err != nil
	})
	_, err := b.tracker.Push(b.ctx, accel.PushEvent{Source: accel.OriginAPI, Registry: b.host, Repository: "chart", Tag: "v1", Digest: d})
	must(t, err)
	if rec := b.wait("chart:v1", accel.Rejected); rec.Rule != "format.image" {
		t.Errorf("rejected by %q", rec.Rule)
	}
}

func TestOwnOutputIsDropped(t *testing.T) {
	b := newBed(t)
	d := b.upload("app:v1", image(t, 1, "amd64"))
	b.tell("app:v1", d, time.Now(), ociManifest)
	rec := b.wait("app:v1", accel.Ready)
	own := b.tell("app:v1-esgz", rec.Target.Digest, time.Now(), ociManifest)
	b.eventually("our own output's record is dropped", func() bool {
		_, err := b.tracker.Get(b.ctx, own.ID)
		return err != nil
	})
	if got := b.standing("app", "v1-esgz-esgz"); got != "" {
		t.Error("our own output was converted again")
	}
}

func TestPolicy(t *testing.T) {
	for name, c := range map[string]struct {
		set  func(*worker.Options)
		rule string
	}{
		"deny":     {func(o *worker.Options) { o.Repositories.Deny = []string{"*/team/**"} }, "policy.deny"},
		"allow":    {func(o *worker.Options) { o.Repositories.Allow = []string{"*/other/*"} }, "policy.allow"},
		"platform": {func(o *worker.Options) { o.Converter.Policy.Platforms = []string{"linux/s390x"} }, "policy.platforms"},
		"size":     {func(o *worker.Options) { o.Converter.Policy.MaxUncompressedBytes = 1000 }, "policy.max_uncompressed_size"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, func(_ *bed, _ *readiness.Options, _ *registry.Options, wo *worker.Options) {
				wo.Converter = &convert.Converter{Params: convert.DefaultParams()}
				c.set(wo)
			})
			d := b.upload("team/app:v1", image(t, 1, "amd64"))
			b.tell("team/app:v1", d, time.Now(), ociManifest)
			rec := b.wait("team/app:v1", accel.Rejected)
			if rec.Rule != c.rule || rec.Reason == "" {
				t.Errorf("rejected by %q: %q, want rule %q with the figure", rec.Rule, rec.Reason, c.rule)
			}
		})
	}
}

func TestStoppedWorkerGivesBack(t *testing.T) {
	b := newBed(t)
	reached := make(chan struct{})
	b.board.set(times(1, blobUpload, func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		close(reached)
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
		return true
	}))
	d := b.upload("app:v1", image(t, 1, "amd64"))
	rec := b.tell("app:v1", d, time.Now(), ociManifest)
	<-reached
	b.stopWork()
	got, err := b.tracker.Get(b.ctx, rec.ID)
	must(t, err)
	if got.State != accel.Pending || got.Attempts != 0 {
		t.Fatalf("after the stop it is %s with %d attempts, want Pending with none", got.State, got.Attempts)
	}
	b.start()
	b.wait("app:v1", accel.Ready)
}

func TestSharedLayerIsConvertedOnce(t *testing.T) {
	b := newBed(t)
	base := image(t, 1, "amd64")
	layers, err := base.Layers()
	must(t, err)
	extra, err := image(t, 2, "amd64").Layers()
	must(t, err)
	b.tell("one:v1", b.upload("one:v1", base), time.Now(), ociManifest)
	first := b.wait("one:v1", accel.Ready)

	target, err := b.client.Pull(b.ctx, first.Target.Repository, first.Target.Digest)
	must(t, err)
	tm, err := target.Image.Manifest()
	must(t, err)
	shared := tm.Layers[0].Digest.String()

	// The registry is asked for the new layer only.
	source, err := layers[0].Digest()
	must(t, err)
	var mu sync.Mutex
	read, uploads := 0, 0
	b.board.set(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		mu.Lock()
		defer mu.Unlock()
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/two/blobs/"+source.String()) && r.Header.Get("Range") == "" {
			read++
		}
		if r.Method == http.MethodPut && r.URL.Query().Get("digest") == shared {
			uploads++
		}
		return false
	})
	b.options.Verify = worker.VerifyDigest
	b.stopWork()
	b.start()
	d := b.upload("two:v1", withLayers(t, "amd64", layers[0], extra[0]))
	b.tell("two:v1", d, time.Now(), ociManifest)
	second := b.wait("two:v1", accel.Ready)
	mu.Lock()
	if read != 0 || uploads != 0 {
		t.Errorf("the shared layer was read %d times and uploaded %d times again", read, uploads)
	}
	mu.Unlock()
	one, err := b.client.Pull(b.ctx, first.Target.Repository, first.Target.Digest)
	must(t, err)
	two, err := b.client.Pull(b.ctx, second.Target.Repository, second.Target.Digest)
	must(t, err)
	m1, err := one.Image.Manifest()
	must(t, err)
	m2, err := two.Image.Manifest()
	must(t, err)
	if m1.Layers[0].Digest != m2.Layers[0].Digest || m2.Layers[0].Annotations[accel.AnnotationLayerSource] != source.String() {
		t.Errorf("the shared layer became %s and %s", m1.Layers[0].Digest, m2.Layers[0].Digest)
	}
}

func TestMemoIsNoTruthWhenTheBlobIsGone(t *testing.T) {
	b := newBed(t)
	base := image(t, 1, "amd64")
	b.tell("one:v1", b.upload("one:v1", base), time.Now(), ociManifest)
	first := b.wait("one:v1", accel.Ready)
	one, err := b.client.Pull(b.ctx, first.Target.Repository, first.Target.Digest)
	must(t, err)
	m, err := one.Image.Manifest()
	must(t, err)
	gone := m.Layers[0].Digest.String()
	b.board.set(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if strings.HasSuffix(r.URL.Path, "/one/blobs/"+gone) { // collected by the registry
			return answer(http.StatusNotFound)(w, r, next)
		}
		return false
	})
	layers, err := base.Layers()
	must(t, err)
	extra, err := image(t, 2, "amd64").Layers()
	must(t, err)
	d := b.upload("two:v1", withLayers(t, "amd64", layers[0], extra[0]))
	b.tell("two:v1", d, time.Now(), ociManifest)
	b.wait("two:v1", accel.Ready)
}

func TestImageThatIsEStargzAlreadyIsItsOwnTarget(t *testing.T) {
	b := newBed(t)
	d := b.upload("app:v1", eStargz(t))
	b.tell("app:v1", d, time.Now(), ociManifest)
	rec := b.wait("app:v1", accel.Ready)
	if rec.Target.Digest != d || rec.Target.Repository != rec.Repository || !slices.Equal(rec.Target.Tags, []string{"v1"}) {
		t.Errorf("target is %+v, want the source itself", rec.Target)
	}
	if got := b.standing("app", "v1-esgz"); got != "" {
		t.Errorf("it was pushed again as %s", got)
	}
	if _, err := b.tracker.Mapping(b.ctx, rec.Repository, d); err != nil {
		t.Errorf("it has no mapping: %v", err)
	}
	must(t, worker.Lifecycle{Tracker: b.tracker, Registry: b.client}.DeleteTarget(b.ctx, rec))
	if b.standing("app", d.String()) != d {
		t.Error("removing the target removed the source")
	}
}
