package worker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/profile"
	"accel/profile/ledger"
	"accel/readiness"
	"accel/registry"
	"accel/worker"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// A registry that takes requests and never answers does not hold up what is published in others.
func TestSlowRegistryHoldsNoOtherUp(t *testing.T) {
	fast := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(fast.Close)
	host := strings.TrimPrefix(fast.URL, "http://")
	b := (&profileBed{}).open(t, func(_ *bed, _ *readiness.Options, r *registry.Options, _ *worker.Options) {
		r.Hosts = append(r.Hosts, registry.Host{Name: host, PlainHTTP: true})
		r.StallTimeout = time.Hour
	})
	b.board.set(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		<-r.Context().Done()
		return true
	})
	learn := func(host string, manifest digest.Digest) {
		t.Helper()
		at := ledger.Image{Repository: host + "/team/app", Digest: manifest, Platform: "linux/amd64", Target: host + "/team/app"}
		must(t, b.profiles.Learn(b.ctx, manifest, at, 1, ledger.Given{Predicted: []accel.ProfileItem{{Path: "bin/a", Bytes: 10}}}))
	}
	for n := range 20 {
		learn(b.host, digest.FromString(fmt.Sprint(n)))
	}
	img := program(t, "amd64", version(1), nil)
	ref, err := name.ParseReference(host+"/team/app:v1", name.Insecure)
	must(t, err)
	must(t, remote.Write(ref, img))
	h, err := img.Digest()
	must(t, err)
	d := digest.Digest(h.String())
	learn(host, d)
	b.eventually("the other registry has its profile", func() bool {
		list, err := b.client.Referrers(b.ctx, host+"/team/app", d, accel.MediaTypeProfile)
		return err == nil && len(list) == 1
	})
}

// A file of profiles that can neither be read nor written ends nothing: it is said and counted.
func TestPublisherOutlivesItsStore(t *testing.T) {
	b := newBed(t)
	profiles, err := ledger.Open(filepath.Join(t.TempDir(), "profiles.db"), ledger.Options{})
	must(t, err)
	metrics := prometheus.NewRegistry()
	p, err := worker.NewPublisher(worker.PublisherOptions{Profiles: profiles, Registry: b.client, Tracker: b.tracker, Log: b.options.Log, Registerer: metrics})
	must(t, err)
	must(t, profiles.Close())
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	b.eventually("the error is counted", func() bool {
		n, err := testutil.GatherAndCount(metrics, "accel_profile_publications_total")
		return err == nil && n == 1
	})
	select {
	case err := <-done:
		t.Fatalf("it ended: %v", err)
	default:
	}
	cancel()
	must(t, <-done)
}

// listedAs has the referrers tag of a subject name another manifest of the repository as artifacts.
func (b *bed) listedAs(repository string, subject, victim digest.Digest, kinds ...string) {
	b.t.Helper()
	h, err := v1.NewHash(victim.String())
	must(b.t, err)
	m := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	for _, kind := range kinds {
		m.Manifests = append(m.Manifests, v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: h, Size: 100, ArtifactType: kind, Annotations: map[string]string{"a": "b"}})
	}
	b.putManifest(repository, strings.Replace(subject.String(), ":", "-", 1), ociIndex, m)
}

// Whoever may push can have a listing name any manifest that accel may delete. What the manifest says counts.
func TestListingsAreNoOrdersToDelete(t *testing.T) {
	b := newProfileBed(t)
	victim := b.upload("team/app:precious", program(t, "amd64", version(7), nil))
	d := b.upload("team/app:v1", program(t, "amd64", version(1), nil))
	b.tell("team/app:v1", d, time.Now(), ociManifest)
	rec := b.wait("team/app:v1", accel.Ready)
	b.published("team/app", b.profile(d, accel.ProfilePredicted))

	b.listedAs("team/app", d, victim, accel.MediaTypeProfile)
	b.started(1, d, accel.ProfileItem{Path: "bin/sh", Bytes: 4096}) // publishes anew, and clears
	recorded := b.profile(d, accel.ProfileRecorded)
	b.eventually("the profile is published", func() bool {
		list, err := b.client.Referrers(b.ctx, b.host+"/team/app", d, accel.MediaTypeProfile)
		return err == nil && slices.ContainsFunc(list, func(l v1.Descriptor) bool { return l.Annotations[accel.AnnotationProfile] != "" })
	})
	b.eventually("the ledger knows", func() bool {
		ctx, cancel := context.WithTimeout(b.ctx, 10*time.Millisecond)
		defer cancel()
		_, err := b.profiles.NextPublication(ctx, nil)
		return err != nil
	})
	if profile.Version(recorded) == "" || b.standing("team/app", "precious") != victim {
		t.Fatal("an image was deleted because a listing called it a profile")
	}

	b.listedAs("team/app", d, victim, accel.MediaTypeMapping, accel.MediaTypeProfile)
	must(t, worker.Lifecycle{Tracker: b.tracker, Registry: b.client, Profiles: b.profiles}.DeleteTarget(b.ctx, rec))
	if b.standing("team/app", "precious") != victim {
		t.Fatal("an image was deleted because a listing called it a mapping, or a profile")
	}
	if _, err := b.client.Head(b.ctx, rec.Target.Repository, rec.Target.Digest.String()); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("the target stands: %v", err)
	}
}

// A member that the target's index names and that is not accel's own stays: the source has it too.
func TestCarriedMembersStay(t *testing.T) {
	b := newProfileBed(t)
	arm := program(t, "arm64", version(2), nil)
	carried := b.upload("team/app:carried", arm)
	d := b.upload("team/app:v1", program(t, "amd64", version(1), nil))
	b.tell("team/app:v1", d, time.Now(), ociManifest)
	rec := b.wait("team/app:v1", accel.Ready)
	converted, err := b.client.Pull(b.ctx, rec.Target.Repository, rec.Target.Digest)
	must(t, err)
	top := b.upload("team/app:index", index(t, converted.Image, arm))
	own := rec.Target.Digest
	rec.Target.Digest = top
	must(t, worker.Lifecycle{Tracker: b.tracker, Registry: b.client, Profiles: b.profiles}.DeleteTarget(b.ctx, rec))
	if b.standing("team/app", "carried") != carried {
		t.Error("a member that was carried over is deleted")
	}
	for _, gone := range []digest.Digest{top, own} {
		if _, err := b.client.Head(b.ctx, rec.Target.Repository, gone.String()); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("%s stands: %v", gone, err)
		}
	}
}

func TestPersonListsPaths(t *testing.T) {
	b := newProfileBed(t)
	d := b.upload("team/app:v1", program(t, "amd64", version(1), map[string]string{profile.LabelPrefetch: "/app/model"}))
	k, err := worker.New(b.options)
	must(t, err)
	if _, err := k.ListPaths(b.ctx, d, []string{"/x"}); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("a list for an unknown image: %v", err)
	}
	b.tell("team/app:v1", d, time.Now(), ociManifest)
	b.wait("team/app:v1", accel.Ready)
	b.profile(d, accel.ProfilePredicted)

	unmatched, err := k.ListPaths(b.ctx, d, []string{"/usr/share/*", "no/such", "../../app/oth*", "nul\x00"})
	must(t, err)
	if fmt.Sprintf("%q", unmatched) != `["no/such" "nul\x00"]` {
		t.Errorf("%q mean nothing", unmatched)
	}
	b.started(1, d, accel.ProfileItem{Path: "bin/sh", Bytes: 4096})
	p := b.profile(d, accel.ProfileRecorded)
	if got := fmt.Sprint(paths(p)); got != "[0:bin/sh 1:app/model 0:usr/share/unread 1:app/other]" {
		t.Errorf("the profile is %s", got)
	}
	b.published("team/app", p)
	if _, err := k.ListPaths(b.ctx, d, []string{"no/such"}); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a list of nothing: %v", err)
	}
	_, err = k.ListPaths(b.ctx, d, nil)
	must(t, err)
	if got := fmt.Sprint(paths(b.profile(d, accel.ProfileRecorded))); got != "[0:bin/sh 1:app/model]" {
		t.Errorf("without the list it is %s", got)
	}
	ctx, cancel := context.WithCancel(b.ctx)
	cancel()
	if _, err := k.ListPaths(ctx, d, []string{"/app/*"}); !errors.Is(err, context.Canceled) {
		t.Errorf("it goes on when it is stopped: %v", err)
	}
}
