package e2e

import (
	"fmt"
	"testing"

	"accel/internal/testbed"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// pushed is one image for one client.
type pushed struct {
	ref    string
	hash   string // of the index
	img    v1.Image
	layers int64 // compressed bytes
}

// pushForNode pushes an index whose amd64 member has layers that only seed decides.
func pushForNode(t *testing.T, reg *testbed.Registry, path string, seed uint64) pushed {
	t.Helper()
	p := pushed{img: image(t, "amd64",
		gzipped(t, tarOf(t, file("big", noise(seed, 5<<20), 0o644))),
		gzipped(t, tarOf(t, file("small", noise(seed+1000, 100<<10), 0o644))))}
	p.ref, p.hash = pushTo(t, reg, path, indexOf(t, p.img, image(t, "arm64", gzipped(t, tarOf(t, file("arm", noise(seed+2000, 1<<20), 0o644))))))
	for _, size := range layerSizes(t, p.img) {
		p.layers += size
	}
	return p
}

// requirePull pulls and requires that the client has the image by its digest.
func (p pushed) requirePull(t *testing.T, c client, user, password string) {
	t.Helper()
	got, err := c.pull(p.ref, user, password)
	must(t, err)
	platform, err := p.img.Digest()
	must(t, err)
	if got != p.hash && got != platform.String() {
		t.Errorf("it has %s, want %s or %s", got, p.hash, platform)
	}
}

// TestClientsPullThroughNode: the node has the credential, the clients have none,
// so that nobody gets anything past the node.
func TestClientsPullThroughNode(t *testing.T) {
	needsClients(t)
	reg := startRegistry(t)
	n := newNode(t, reg, "", reader, readerPassword).start()
	for i, c := range newClients(t, route{hostsDir: n.installed(), mirror: n.mirror}) {
		t.Run(c.name, func(t *testing.T) {
			p := pushForNode(t, reg, fmt.Sprintf("team/app-%d:v1", i), uint64(i))
			p.requirePull(t, c, "", "")
			requireOnce(t, reg.Delivered(), p.img)
			must(t, c.forget(p.ref))

			must(t, reg.Stop())
			must(t, reg.StopTokens())
			p.requirePull(t, c, "", "")
			must(t, c.forget(p.ref))
			must(t, reg.Start())
			must(t, reg.StartTokens())

			reg.Reset()
			p.requirePull(t, c, "", "")
			if d := reg.Delivered(); d.BlobBytes() > 0 {
				t.Errorf("the registry delivered %d bytes of blobs again", d.BlobBytes())
			}
		})
	}
	n.stop()
}

// TestClientsOwnCredentialsThroughNode: the node has none, so each client gets what
// it may have, whatever the cache holds.
func TestClientsOwnCredentialsThroughNode(t *testing.T) {
	needsClients(t)
	reg := startRegistry(t)
	n := newNode(t, reg, "", "", "").start()
	for i, c := range newClients(t, route{hostsDir: n.installed(), mirror: n.mirror}) {
		t.Run(c.name, func(t *testing.T) {
			p := pushForNode(t, reg, fmt.Sprintf("team/app-%d:v1", i), uint64(i))
			refused := func(when string) {
				t.Helper()
				for _, who := range [][2]string{{"", ""}, {other, otherPassword}, {reader, "wrong"}} {
					if _, err := c.pull(p.ref, who[0], who[1]); err == nil {
						t.Errorf("%s: %q pulled without the right to it", when, who)
					}
				}
			}
			refused("nothing cached")
			reg.Reset()
			p.requirePull(t, c, reader, readerPassword)
			requireOnce(t, reg.Delivered(), p.img)
			must(t, c.forget(p.ref))
			refused("all cached")
			reg.Reset()
			p.requirePull(t, c, reader, readerPassword)
			if d := reg.Delivered(); d.BlobBytes() > 0 {
				t.Errorf("the registry delivered %d bytes of blobs again", d.BlobBytes())
			}
		})
	}
	n.stop()
}

// TestPullsGoOnWithoutNode: what install wrote sends clients to the registry when
// no node answers.
func TestPullsGoOnWithoutNode(t *testing.T) {
	needsClients(t)
	reg := startRegistry(t)
	n := newNode(t, reg, "", reader, readerPassword)
	for i, c := range newClients(t, route{hostsDir: n.installed(), mirror: n.mirror}) {
		if c.name == "crane" {
			continue // it was told that the node is the registry
		}
		t.Run(c.name, func(t *testing.T) {
			p := pushForNode(t, reg, fmt.Sprintf("team/app-%d:v1", i), uint64(i))
			p.requirePull(t, c, reader, readerPassword)
			requireOnce(t, reg.Delivered(), p.img)
		})
	}
}
