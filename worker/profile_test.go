package worker_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/profile"
	"accel/profile/artifact"
	"accel/profile/ledger"
	"accel/readiness"
	"accel/registry"
	"accel/worker"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// bundleBytes is more than any bundle here has.
const bundleBytes = 16 << 20

// profileBed is a bed with a ledger, and a publisher that publishes at once.
type profileBed struct {
	*bed
	profiles    *ledger.Ledger
	bundleBytes int64
}

func newProfileBed(t *testing.T, opts ...bedOption) *profileBed {
	t.Helper()
	return (&profileBed{bundleBytes: bundleBytes}).open(t, opts...)
}

func (p *profileBed) open(t *testing.T, opts ...bedOption) *profileBed {
	t.Helper()
	var err error
	p.profiles, err = ledger.Open(filepath.Join(t.TempDir(), "profiles.db"), ledger.Options{PublishEvery: time.Millisecond, SettleAfter: time.Millisecond})
	must(t, err)
	t.Cleanup(func() { must(t, p.profiles.Close()) })
	with := func(_ *bed, _ *readiness.Options, _ *registry.Options, o *worker.Options) { o.Profiles = p.profiles }
	p.bed = newBed(t, append([]bedOption{with}, opts...)...)
	p.publishing()
	return p
}

// publishing runs a publisher until the test's end.
func (p *profileBed) publishing() {
	publisher, err := worker.NewPublisher(worker.PublisherOptions{
		Profiles: p.profiles, Registry: p.client, Tracker: p.tracker, Keys: p.keys, BundleBytes: p.bundleBytes, Log: p.options.Log,
	})
	must(p.t, err)
	ctx, cancel := context.WithCancel(p.ctx)
	done := make(chan error, 1)
	go func() { done <- publisher.Run(ctx) }()
	p.t.Cleanup(func() {
		cancel()
		must(p.t, <-done)
	})
}

// layerOf is a layer of files by name; what begins with "#!" may be run.
func layerOf(t *testing.T, files map[string]string) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		must(t, tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(files[name]))}))
		_, err := tw.Write([]byte(files[name]))
		must(t, err)
	}
	must(t, tw.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil }, tarball.WithMediaType(types.OCILayer))
	must(t, err)
	return l
}

// elf is a static program of 3 MB that do not compress.
func elf(t *testing.T) string {
	var b bytes.Buffer
	const headers, size = 64 + 56, 3 << 20
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	for _, v := range []any{
		uint16(2), uint16(62), uint32(1), uint64(0x400000 + headers), uint64(64), uint64(0), uint32(0), uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(0), uint64(0x400000), uint64(0x400000), uint64(size), uint64(size), uint64(4096), // one segment
	} {
		must(t, binary.Write(&b, binary.LittleEndian, v))
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for b.Len() < size {
		b.WriteByte(byte(rnd.UintN(256)))
	}
	return b.String()
}

// program is an image that runs a script by a shell, which reads a file; the shell is in a layer
// of its own.
func program(t *testing.T, arch string, files map[string]string, labels map[string]string) v1.Image {
	t.Helper()
	shell := layerOf(t, map[string]string{"bin/sh": elf(t), "usr/share/unread": strings.Repeat("unread ", 50_000)})
	img := withLayers(t, arch, shell, layerOf(t, files))
	conf, err := img.ConfigFile()
	must(t, err)
	conf = conf.DeepCopy()
	conf.Config.Entrypoint, conf.Config.Labels = []string{"/app/run.sh"}, labels
	img, err = mutate.ConfigFile(img, conf)
	must(t, err)
	return img
}

func version(n int) map[string]string {
	return map[string]string{
		"app/run.sh": "#!/bin/sh\n. /app/settings\nexec cat /app/data\n", "app/settings": fmt.Sprintf("VERSION=%d\n", n),
		"app/data": strings.Repeat("data ", 1000), "app/model": strings.Repeat("model ", 1000), "app/other": strings.Repeat("other ", 1000),
	}
}

// profile is that of the manifest in the ledger, once it has that origin.
func (p *profileBed) profile(manifest digest.Digest, origin accel.ProfileOrigin) (found accel.Profile) {
	p.t.Helper()
	p.eventually(fmt.Sprintf("%s has a %s profile", manifest, origin), func() bool {
		encoded, _, err := p.profiles.Profile(p.ctx, manifest)
		if err != nil {
			return false
		}
		found, err = profile.Decode(encoded)
		must(p.t, err)
		return found.Origin == origin
	})
	return found
}

// published is what the registry has, once it is that and nothing else.
func (p *profileBed) published(repository string, want accel.Profile) digest.Digest {
	p.t.Helper()
	source, err := p.client.Source(p.host+"/"+repository, "")
	must(p.t, err)
	var list []v1.Descriptor
	p.eventually("the profile is published, alone", func() bool {
		if list, err = p.client.Referrers(p.ctx, p.host+"/"+repository, want.Manifest, accel.MediaTypeProfile); err != nil || len(list) != 1 {
			return false
		}
		got, err := artifact.FindIn(p.ctx, source, want.Manifest, list) // in this listing: the next may have a newer one beside
		return err == nil && profile.Version(got) == profile.Version(want)
	})
	return digest.Digest(list[0].Digest.String())
}

func paths(p accel.Profile) (names []string) {
	for _, i := range p.Items {
		names = append(names, fmt.Sprint(i.Layer, ":", i.Path))
	}
	return names
}

func (p *profileBed) started(n int, manifest digest.Digest, items ...accel.ProfileItem) {
	p.t.Helper()
	_, err := p.profiles.Report(p.ctx, profile.Report{
		ID: fmt.Sprintf("%032x", n), Node: fmt.Sprint("node", n), Manifest: manifest, StartedAt: time.Unix(1_800_000_000+int64(n), 0).UTC(),
		Complete: true, End: profile.EndQuiet, Items: items,
	})
	must(p.t, err)
}

// referrersAPI is a registry that lists referrers itself; the others have the fallback tag.
func referrersAPI(b *bed, _ *readiness.Options, _ *registry.Options, _ *worker.Options) {
	b.board.next = ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true))
}

func TestProfileFromConversionToNewStarts(t *testing.T) {
	for name, opts := range map[string][]bedOption{"fallback tag": nil, "referrers API": {referrersAPI}} {
		t.Run(name, func(t *testing.T) {
			b := newProfileBed(t, opts...)
			first := b.upload("team/app:v1", program(t, "amd64", version(1), map[string]string{profile.LabelPrefetch: "/app/model"}))
			b.tell("team/app:v1", first, time.Now(), ociManifest)
			rec := b.wait("team/app:v1", accel.Ready)

			predicted := b.profile(first, accel.ProfilePredicted) // there when it is Ready, in this test
			for _, want := range []string{"0:bin/sh", "1:app/run.sh", "1:app/settings", "1:app/model"} {
				if !slices.Contains(paths(predicted), want) {
					t.Errorf("%s is not predicted: %v", want, paths(predicted))
				}
			}
			if slices.Contains(paths(predicted), "0:usr/share/unread") {
				t.Errorf("predicted is %v", paths(predicted))
			}
			old := b.published("team/app", predicted)

			// It is recorded by two starts, and published in place of the predicted one.
			at := func(layer int, path string, bytes int64) accel.ProfileItem {
				i := accel.ProfileItem{Layer: layer, Path: path, Bytes: bytes}
				for _, p := range predicted.Items {
					if p.Layer == layer && p.Path == path {
						i.Content = p.Content
					}
				}
				return i
			}
			for n := range 2 {
				b.started(n, first, at(0, "bin/sh", 4096), at(1, "app/run.sh", 40), at(1, "app/settings", 10), at(1, "app/data", 5000))
			}
			recorded := b.profile(first, accel.ProfileRecorded)
			artifact := b.published("team/app", recorded)
			b.eventually("the former artifact is deleted", func() bool {
				_, err := b.client.Head(b.ctx, rec.Repository, old.String())
				return errors.Is(err, accel.ErrNotFound)
			})

			// Our own push causes no conversion: it is announced, and is no image besides.
			if ours, err := b.tracker.Ours(b.ctx, rec.Repository, artifact); err != nil || !ours {
				t.Errorf("the webhook of our own push would not be known: %v, %v", ours, err)
			}
			dropped := b.tell("team/app", artifact, time.Now(), ociManifest)
			b.eventually("the artifact's record is dropped", func() bool {
				_, err := b.tracker.Get(b.ctx, dropped.ID)
				return errors.Is(err, accel.ErrNotFound)
			})

			// The next version inherits; the shell's layer is in the registry alone.
			files := version(2)
			files["app/data"] += "more"
			files["app/settings"] += ". /app/new\n"
			files["app/new"] = "NEW=1\n"
			second := b.upload("team/app:v1", program(t, "amd64", files, nil))
			b.tell("team/app:v1", second, time.Now(), ociManifest)
			b.wait("team/app@"+second.String(), accel.Ready)
			inherited := b.profile(second, accel.ProfileInherited)
			want := []string{"0:bin/sh", "1:app/run.sh", "1:app/settings", "1:app/data"}
			if got := paths(inherited); len(got) < len(want) || strings.Join(got[:len(want)], " ") != strings.Join(want, " ") {
				t.Errorf("inherited is %v, want %v first", got, want)
			}
			if slices.Contains(paths(inherited), "1:app/model") {
				t.Errorf("what only the former image's maker listed is inherited: %v", paths(inherited))
			}
			b.published("team/app", inherited)

			// With the target goes its profile.
			second2, err := b.tracker.Find(b.ctx, b.ref("team/app@"+second.String()))
			must(t, err)
			must(t, worker.Lifecycle{Tracker: b.tracker, Registry: b.client, Profiles: b.profiles}.DeleteTarget(b.ctx, second2.Record))
			list, err := b.client.Referrers(b.ctx, rec.Repository, second, "")
			must(t, err)
			if len(list) != 0 {
				t.Errorf("a deleted target leaves %v", list)
			}
			if _, err := b.profiles.Status(b.ctx, second); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("a deleted target's profile is kept: %v", err)
			}
		})
	}
}

func TestEveryPlatformHasItsProfile(t *testing.T) {
	b := newProfileBed(t)
	idx := index(t, program(t, "amd64", version(1), nil), program(t, "arm64", version(1), nil))
	d := b.upload("team/app:v1", idx)
	b.tell("team/app:v1", d, time.Now(), ociIndex)
	b.wait("team/app:v1", accel.Ready)
	all, err := b.profiles.OfImage(b.ctx, d)
	must(t, err)
	var platforms []string
	for _, s := range all {
		platforms = append(platforms, s.Platform)
		b.published("team/app", b.profile(s.Manifest, accel.ProfilePredicted))
	}
	if !slices.Equal(platforms, []string{"linux/amd64", "linux/arm64"}) {
		t.Errorf("profiles of platforms %v", platforms)
	}
}

// A service that had no ledger, or lost it, makes up for it when it checks its targets; then all
// layers are in the registry.
func TestCheckForetellsWhatIsNotKnown(t *testing.T) {
	b := newProfileBed(t, func(_ *bed, r *readiness.Options, _ *registry.Options, o *worker.Options) {
		r.CheckInterval = 50 * time.Millisecond
		o.Profiles = nil
	})
	d := b.upload("team/app:v1", program(t, "amd64", version(1), nil))
	b.tell("team/app:v1", d, time.Now(), ociManifest)
	b.wait("team/app:v1", accel.Ready)
	if _, err := b.profiles.Status(b.ctx, d); !errors.Is(err, accel.ErrNotFound) {
		t.Fatalf("an image is known without a ledger: %v", err)
	}
	b.stopWork()
	b.options.Profiles = b.profiles
	b.start()
	p := b.profile(d, accel.ProfilePredicted)
	if !slices.Contains(paths(p), "0:bin/sh") {
		t.Errorf("predicted is %v", paths(p))
	}
	b.published("team/app", p)
	must(t, b.profiles.Remove(b.ctx, d)) // a person's decision stands
	b.eventually("the profile is taken out of the registry", func() bool {
		list, err := b.client.Referrers(b.ctx, b.host+"/team/app", d, accel.MediaTypeProfile)
		return err == nil && len(list) == 0
	})
	if s, err := b.profiles.Status(b.ctx, d); err != nil || s.Origin != "" {
		t.Errorf("a removed profile came back: %+v, %v", s, err)
	}
}

// A layer that cannot be read for the prediction does not hold the image up.
func TestPredictionNeverFailsAnImage(t *testing.T) {
	b := newProfileBed(t)
	base := b.upload("team/base:v1", program(t, "amd64", version(1), nil))
	b.tell("team/base:v1", base, time.Now(), ociManifest)
	rec := b.wait("team/base:v1", accel.Ready)
	target, err := b.client.Pull(b.ctx, rec.Repository, rec.Target.Digest)
	must(t, err)
	m, err := target.Image.Manifest()
	must(t, err)
	shell := m.Layers[0].Digest.String()
	// Ranged requests for the shell's layer fail from now on; whole ones, for the read-back, do not.
	b.board.set(times(1_000_000, func(r *http.Request) bool {
		return blobGet(r) && strings.HasSuffix(r.URL.Path, shell) && r.Header.Get("Range") != ""
	}, answer(500)))
	d := b.upload("team/base:v2", program(t, "amd64", version(2), nil))
	b.tell("team/base:v2", d, time.Now(), ociManifest)
	b.wait("team/base:v2", accel.Ready)
	b.eventually("the image is known", func() bool {
		s, err := b.profiles.Status(b.ctx, d)
		return err == nil && !s.Foretold
	})
	b.started(1, d, accel.ProfileItem{Path: "bin/sh", Bytes: 10}) // its starts can be recorded
	b.profile(d, accel.ProfileRecorded)
}

func TestRegistryThatRefusesProfiles(t *testing.T) {
	b := newProfileBed(t)
	refused := make(chan struct{}, 1000)
	b.board.set(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method != "DELETE" {
			return false
		}
		select {
		case refused <- struct{}{}:
		default:
		}
		return answer(405)(w, r, next)
	})
	d := b.upload("team/app:v1", program(t, "amd64", version(1), nil))
	b.tell("team/app:v1", d, time.Now(), ociManifest)
	b.wait("team/app:v1", accel.Ready)
	b.published("team/app", b.profile(d, accel.ProfilePredicted))
	for n := range 3 {
		b.started(n, d, accel.ProfileItem{Path: "bin/sh", Bytes: 4096})
	}
	recorded := b.profile(d, accel.ProfileRecorded)
	source, err := b.client.Source(b.host+"/team/app", "")
	must(t, err)
	b.eventually("nodes find the best of several", func() bool {
		p, err := artifact.Find(b.ctx, source, d)
		return err == nil && profile.Version(p) == profile.Version(recorded)
	})
	<-refused
}
