package e2e

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/internal/debimage"
	"accel/internal/testbed"
	"accel/registry"
	"accel/trust"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// pyURL is where the server of debimage.PyWeb answers.
const pyURL = "http://127.0.0.1:9000/"

func contextOf(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

// TestContainersRunOnLazyMounts: a python server runs before its image is here, by tag and by digest, by the
// transfer service and by CRI of two containerds, and its root is the source's.
func TestContainersRunOnLazyMounts(t *testing.T) {
	needsClients(t)
	img, err := debimage.PyWeb(t.Context(), os.Stderr)
	must(t, err)
	want, stock := walk(t, apply(t, img)), stockStargz(t, img)
	for _, version := range []string{testbed.Containerd2, testbed.Containerd16} {
		t.Run(version, func(t *testing.T) {
			b := newLazyBed(t, version)
			byTag, hash := pushTo(t, b.reg, "team/pyweb:v1", img)
			b.convert(byTag)
			byDigest := b.reg.Host() + "/team/pyweb@" + hash

			t.Run("by tag", func(t *testing.T) {
				if version == testbed.Containerd16 {
					_, err := b.c.PullCRI(t.Context(), byTag, reader, readerPassword)
					must(t, err)
				} else {
					b.pull(byTag)
				}
				b.requireLazy(byTag, img)
				namespace := map[string]string{testbed.Containerd16: "k8s.io", testbed.Containerd2: "default"}[version]
				b.run(namespace, byTag, "by-tag")
				if said := answers(t, pyURL); !strings.Contains(said, "python") {
					t.Errorf("the server says %q", said)
				}
				b.requireTree(b.rootfs(namespace, "by-tag"), want)
				b.end(namespace, "by-tag")
			})
			t.Run("CRI by digest", func(t *testing.T) {
				_, err := b.c.PullCRI(t.Context(), byDigest, reader, readerPassword)
				must(t, err)
				b.run("k8s.io", byDigest, "by-digest")
				answers(t, pyURL)
				b.requireTree(b.rootfs("k8s.io", "by-digest"), want)
				b.end("k8s.io", "by-digest")
			})
			t.Run("stock eStargz", func(t *testing.T) {
				ref, _ := pushTo(t, b.reg, "team/stock:v1", stock)
				before := len(b.lazyMounts())
				_, err := b.c.PullCRI(t.Context(), ref, reader, readerPassword)
				must(t, err)
				if n := len(b.lazyMounts()); n < before+len(layerSizes(t, stock)) {
					t.Errorf("%d EROFS mounts more, want one for each layer\n%s", n-before, b.node.log)
				}
				b.run("k8s.io", ref, "stock")
				answers(t, pyURL)
				// The stock library rounds times up where a tar has fractions of seconds.
				compare(t, withoutTimes(want), withoutTimes(walk(t, b.rootfs("k8s.io", "stock"))))
				b.end("k8s.io", "stock")
			})
			t.Run("no accelerated form", func(t *testing.T) {
				plain := withLayers(t, img, "amd64", gzipped(t, tarOf(t, file("note", "not converted", 0o644))))
				ref, _ := pushTo(t, b.reg, "team/plain:v1", plain)
				before := len(b.lazyMounts())
				_, err := b.c.PullCRI(t.Context(), ref, reader, readerPassword)
				must(t, err)
				if n := len(b.lazyMounts()); n != before {
					t.Errorf("%d EROFS mounts more for an image without an accelerated form", n-before)
				}
				b.run("k8s.io", ref, "plain")
				answers(t, pyURL)
				b.end("k8s.io", "plain")
			})
		})
	}
}

var mtime = regexp.MustCompile(`, mtime [0-9]+`)

// withoutTimes is a tree without times, and without what ctr puts into a root.
func withoutTimes(tree map[string]string) map[string]string {
	out := map[string]string{}
	for path, is := range tree {
		if path != "etc/hosts" && path != "etc/resolv.conf" {
			out[path] = mtime.ReplaceAllString(is, "")
		}
	}
	return out
}

// stockStargz is an image as the stock library converts it, fast rather than small.
func stockStargz(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	layers, err := img.Layers()
	must(t, err)
	out := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	out = mutate.ConfigMediaType(out, types.OCIConfigJSON)
	for _, l := range layers {
		out = withStock(t, out, l)
	}
	config, err := img.ConfigFile()
	must(t, err)
	now, err := out.ConfigFile()
	must(t, err)
	now = now.DeepCopy()
	now.OS, now.Architecture, now.Config = config.OS, config.Architecture, config.Config
	out, err = mutate.ConfigFile(out, now)
	must(t, err)
	return out
}

// withStock adds a layer as the stock library converts it.
func withStock(t *testing.T, img v1.Image, l v1.Layer) v1.Image {
	t.Helper()
	plain, err := l.Uncompressed()
	must(t, err)
	raw, err := io.ReadAll(plain)
	must(t, err)
	must(t, plain.Close())
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw), 0, int64(len(raw))), estargz.WithCompressionLevel(gzip.BestSpeed))
	must(t, err)
	packed, err := io.ReadAll(blob)
	must(t, err)
	must(t, blob.Close())
	out, err := mutate.Append(img, mutate.Addendum{
		Layer:       packedLayer(t, packed),
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: blob.TOCDigest().String(), estargz.StoreUncompressedSizeAnnotation: strconv.Itoa(len(raw))},
	})
	must(t, err)
	return out
}

// packedLayer is a layer of bytes that are gzip already.
func packedLayer(t *testing.T, packed []byte) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed)), nil }, tarball.WithMediaType(types.OCILayer))
	must(t, err)
	return l
}

// TestLyingImageIsSetAside: an eStargz image whose config claims another image's DiffID gets that image's chain ID
// in containerd. When its layer is complete, the lie is found.
func TestLyingImageIsSetAside(t *testing.T) {
	b := newLazyBed(t, testbed.Containerd2)
	honest := image(t, "amd64", gzipped(t, tarOf(t, file("hello", "the true one", 0o755))))
	liar := withStock(t, mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), program(t))
	config, err := liar.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	true0, err := honest.ConfigFile()
	must(t, err)
	config.OS, config.Architecture, config.RootFS.DiffIDs = "linux", "amd64", true0.RootFS.DiffIDs
	liar, err = mutate.ConfigFile(liar, config)
	must(t, err)
	ref, _ := pushTo(t, b.reg, "team/liar:v1", liar)
	b.pull(ref)
	for begin := time.Now(); !strings.Contains(b.node.log.String(), "lies about its layers"); time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			t.Fatalf("nobody finds the lie\n%s", b.node.log)
		}
	}
	if said := b.node.accel("ps"); !strings.Contains(said, "claims that layer") {
		t.Errorf("accel ps does not tell of it: %s", said)
	}
	if said, err := b.c.Ctr(t.Context(), "run", "--rm", "--snapshotter", "accel", ref, "lie", "/hello"); err == nil {
		t.Errorf("a container runs on it: %s", said)
	}
	ref, _ = pushTo(t, b.reg, "team/liar:v2", withLayers(t, liar, "amd64"))
	b.pull(ref)
	if said, err := b.c.Ctr(t.Context(), "run", "--rm", "--snapshotter", "accel", ref, "lie", "/hello"); err == nil {
		t.Errorf("a container runs on it under another name: %s", said)
	}
}

// TestForeignMappingIsNotUsed: whoever may push to a repository can attach a mapping; nobody's but the service's is
// believed.
func TestForeignMappingIsNotUsed(t *testing.T) {
	b := newLazyBed(t, testbed.Containerd2)
	img := readerImage(t, 1)
	ref, hash := pushTo(t, b.reg, "team/victim:v1", img)
	evil, evilHash := pushTo(t, b.reg, "team/evil:v1", readerImage(t, 2))
	b.convert(evil)

	// One is the service's own, about another manifest; one is about this manifest, and signed by somebody else.
	others, err := b.server.client.Mapping(t.Context(), "", digest.Digest(evilHash))
	must(t, err)
	verifier, err := b.server.client.Keys(t.Context())
	must(t, err)
	trusted, err := trust.NewVerifier([]byte(verifier.PEM))
	must(t, err)
	forged, err := trusted.Verify(t.Context(), others)
	must(t, err)
	forged.SourceManifest, forged.SourceRepository = digest.Digest(hash), b.reg.Host()+"/team/victim"
	layers, err := img.Layers()
	must(t, err)
	for i, l := range layers {
		d, err := l.Digest()
		must(t, err)
		diffID, err := l.DiffID()
		must(t, err)
		forged.Layers[i].Source, forged.Layers[i].DiffID = digest.Digest(d.String()), digest.Digest(diffID.String())
	}
	somebody, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	signed, err := somebody.Sign(t.Context(), forged)
	must(t, err)

	client, err := registry.New(registry.Options{Hosts: []registry.Host{{Name: b.reg.Host(), PlainHTTP: true, Username: writer, Password: writerPassword}}})
	must(t, err)
	defer client.Close()
	subject, err := client.Head(t.Context(), b.reg.Host()+"/team/victim", hash)
	must(t, err)
	for _, envelope := range [][]byte{others, signed} {
		_, err := client.Attach(t.Context(), b.reg.Host()+"/team/victim", subject, accel.MediaTypeMapping, map[string]string{accel.AnnotationMapping: string(envelope)})
		must(t, err)
	}
	b.pull(ref)
	if at := b.lazyMounts(); len(at) > 0 {
		t.Errorf("mounted by a foreign mapping: %s", at[0].Mountpoint)
	}
	if n := strings.Count(b.node.log.String(), "a mapping is not believed"); n < 2 {
		t.Errorf("the log tells of %d mappings that are not believed, want 2\n%s", n, b.node.log)
	}
	b.read(ref, "whole", 0).requireAll()
}
