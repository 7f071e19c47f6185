package worker_test

import (
	"errors"
	"io"
	"testing"
	"time"

	"accel"
	"accel/bundle"
	"accel/profile"
	"accel/profile/artifact"

	"github.com/opencontainers/go-digest"
)

// TestProfilesHaveBundles: beside a profile lies what it names, and a newer profile has another.
func TestProfilesHaveBundles(t *testing.T) {
	b := newProfileBed(t)
	image := b.upload("team/app:v1", program(t, "amd64", version(1), map[string]string{profile.LabelPrefetch: "/app/model"}))
	b.tell("team/app:v1", image, time.Now(), ociManifest)
	b.wait("team/app:v1", accel.Ready)
	predicted := b.profile(image, accel.ProfilePredicted)
	b.published("team/app", predicted)
	first, content := b.bundle("team/app", predicted)
	// bin/sh in the first layer; the script, its settings and the model in the other.
	if content[0] != 3<<20 || content[1] == 0 {
		t.Errorf("it has %v bytes of content", content)
	}

	b.started(1, image, accel.ProfileItem{Layer: 1, Path: "app/data", Bytes: 5000, Content: contentOf(version(1)["app/data"])})
	recorded := b.profile(image, accel.ProfileRecorded)
	b.published("team/app", recorded)
	second, content := b.bundle("team/app", recorded)
	if second == first {
		t.Error("another profile has the same bundle")
	}
	if content[1] < 5000 {
		t.Errorf("it has %v bytes of content", content)
	}
}

func contentOf(text string) accel.ContentID { return accel.ContentIDOf(digest.FromString(text)) }

// bundle reads the one that is published with a profile, and tells how much of each layer is in it.
func (p *profileBed) bundle(repository string, of accel.Profile) (d digest.Digest, content []int64) {
	p.t.Helper()
	source, err := p.client.Source(p.host+"/"+repository, "")
	must(p.t, err)
	list, err := source.Referrers(p.ctx, of.Manifest, accel.MediaTypeProfile)
	must(p.t, err)
	found, ok := artifact.BundleIn(list, of.Manifest)
	if !ok || len(list) != 1 {
		p.t.Fatalf("the profile has no bundle: %+v", list)
	}
	body, err := source.Range(p.ctx, found.Digest, found.SizeBytes, 0, found.SizeBytes)
	must(p.t, err)
	defer body.Close() //nolint:errcheck // read
	r, err := bundle.NewReader(body, found.SizeBytes, bundle.Limits{TOCBytes: 1 << 20, ContentBytes: bundleBytes})
	must(p.t, err)
	defer r.Close()
	tocs, err := r.TOCs()
	must(p.t, err)
	for n, toc := range tocs {
		if digest.FromBytes(toc) != found.Layers[n].TOCDigest {
			p.t.Errorf("TOC %d is another", n)
		}
	}
	content = make([]int64, len(tocs))
	for {
		f, packed, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(p.t, err)
		_, err = r.Unpack(f, packed, nil)
		must(p.t, err)
		for _, c := range f.Chunks {
			content[c.Layer] += c.Bytes
		}
	}
	for n, l := range found.Layers {
		if l.ContentBytes != content[n] {
			p.t.Errorf("layer %d has %d bytes of content, and is said to have %d", n, content[n], l.ContentBytes)
		}
	}
	return found.Digest, content
}
