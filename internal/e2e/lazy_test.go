package e2e

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"accel/internal/debimage"
	"accel/internal/testbed"
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
	want := walk(t, apply(t, img))
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
		})
	}
}
