package e2e

import (
	"archive/tar"
	"encoding/base64"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"testing"
	"time"

	"accel"
	"accel/profile"
	"accel/profile/artifact"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

// TestHostileProfiles: whoever may push to the repository can attach a profile. Whatever it says, the container
// starts, and what is fetched because of it is bounded.
func TestHostileProfiles(t *testing.T) {
	b, ref, img := pyBed(t, newLonelyBed)
	manifest := manifestOf(t, img)
	c := b.registryClient()
	repository := b.reg.Host() + "/team/pyweb"
	b.awaitArtifact(manifest)
	subject, err := c.Head(t.Context(), repository, manifest.String())
	must(t, err)
	attach := func(packed string) {
		t.Helper()
		_, err := c.Attach(t.Context(), repository, subject, accel.MediaTypeProfile, map[string]string{accel.AnnotationProfile: packed})
		must(t, err)
	}
	packedOf := func(p accel.Profile) string {
		t.Helper()
		form, err := artifact.FormOf(p)
		must(t, err)
		return form.Annotations[accel.AnnotationProfile]
	}
	whole := []accel.ProfileItem{}
	for layer, files := range regularFiles(t, img) {
		for _, path := range files {
			whole = append(whole, accel.ProfileItem{Layer: layer, Path: path, Bytes: 1 << 30})
		}
	}
	// The later ones count more than those before, and all more than the service's own.
	starts := 0
	claims := func(of digest.Digest, items ...accel.ProfileItem) string {
		starts++
		return packedOf(accel.Profile{Manifest: of, Origin: accel.ProfileRecorded, Starts: starts, RecordedAt: time.Now().UTC().Truncate(time.Second), Items: items})
	}
	hostile := []struct{ name, packed string }{
		{"not base64", "~~~~"},
		{"not gzip", base64.StdEncoding.EncodeToString([]byte("hello"))},
		{"zeros", base64.StdEncoding.EncodeToString(profile.Pack(make([]byte, 16<<20)))},
		{"another image's", claims(digest.FromString("another image"), accel.ProfileItem{Path: "etc/passwd", Bytes: 10})},
		{"out of range", claims(manifest, accel.ProfileItem{Layer: 400, Path: "etc/passwd", Bytes: 10},
			accel.ProfileItem{Path: "etc/passwd", Offset: 1 << 38, Bytes: 1 << 30}, accel.ProfileItem{Path: "no/such/file", Bytes: 1 << 38})},
		{"everything", claims(manifest, whole[:min(len(whole), profile.MaxItems)]...)},
	}
	var content int64
	for _, n := range contentBytes(t, img) {
		content += n
	}
	for _, h := range hostile {
		t.Run(h.name, func(t *testing.T) {
			attach(h.packed)
			b := *b
			b.t = t
			start := b.recordedStart(ref)
			// Half of the data files, where each file begins with a block of its own.
			if start.Ahead != nil && start.Ahead.PlannedBytes > content*6/10 {
				t.Errorf("%d bytes of %d were planned", start.Ahead.PlannedBytes, content)
			}
			if !start.Complete || start.Problem != "" {
				t.Errorf("the start is recorded as %+v", start)
			}
			b.wipe(ref)
			must(t, os.RemoveAll(filepath.Join(b.node.dir, "data", "lazy", "profiles"))) // what it recorded itself would count more
			must(t, os.Mkdir(filepath.Join(b.node.dir, "data", "lazy", "profiles"), 0o700))
		})
	}
}

// regularFiles are those of each layer.
func regularFiles(t *testing.T, img v1.Image) (files [][]string) {
	t.Helper()
	eachLayer(t, img, func(h *tar.Header, layer int) {
		for len(files) <= layer {
			files = append(files, nil)
		}
		if h.Typeflag == tar.TypeReg && h.Size > 0 {
			files[layer] = append(files[layer], path.Clean("/" + h.Name)[1:])
		}
	})
	return files
}

// contentBytes are the sums of the sizes of each layer's files.
func contentBytes(t *testing.T, img v1.Image) map[int]int64 {
	t.Helper()
	sum := map[int]int64{}
	eachLayer(t, img, func(h *tar.Header, layer int) { sum[layer] += h.Size })
	return sum
}

func eachLayer(t *testing.T, img v1.Image, do func(h *tar.Header, layer int)) {
	t.Helper()
	layers, err := img.Layers()
	must(t, err)
	for n, l := range layers {
		r, err := l.Uncompressed()
		must(t, err)
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			do(h, n)
		}
		must(t, r.Close())
	}
}
