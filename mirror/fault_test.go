package mirror_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/registry"
)

// TestUpstreamFaults: a client gets the right bytes or a clear error, never wrong ones, and
// what was wrong does not stay.
func TestUpstreamFaults(t *testing.T) {
	const size = 3 << 20
	half := func(b []byte) []byte { return b[:len(b)/2] }
	flip := func(b []byte) []byte { b[len(b)/3] ^= 1; return b }
	hang := func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		w.Write(make([]byte, 0))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	blobs := func(n int64, x fault) fault { return on(http.MethodGet, "/blobs/", n, x) }
	for name, c := range map[string]struct {
		fault fault
		// status of the answer to the first client; 0: the answer breaks off. The
		// second client, when the fault is over, always gets the blob.
		status int
		note   string
	}{
		"reset once":     {fault: blobs(1, changed(half, true)), status: 200},
		"truncated once": {fault: blobs(1, changed(half, false)), status: 200},
		"500 once":       {fault: blobs(1, status(500)), status: 200},
		"401 once":       {fault: blobs(1, status(401)), status: 200},
		"429 once":       {fault: blobs(1, status(429, "Retry-After", "0")), status: 200},
		"stall once":     {fault: blobs(1, hang), status: 200},
		"corrupt":        {fault: blobs(0, changed(flip, false))},
		"500":            {fault: blobs(0, status(500)), status: 502},
		"429":            {fault: blobs(0, status(429, "Retry-After", "77")), status: 429},
		"401":            {fault: blobs(0, status(401)), status: 401},
		"403":            {fault: blobs(0, status(403)), status: 401},
		"404":            {fault: blobs(0, status(404, "Docker-Distribution-Api-Version", "registry/2.0")), status: 404},
		"416":            {fault: blobs(1, status(416)), status: 502},
		"another blob":   {fault: blobs(0, changed(func(b []byte) []byte { return append(b, 0) }, false)), status: 502},
		"stall":          {fault: blobs(0, hang), status: 502},
		"reset, then 401 for all": {fault: func() fault {
			first, rest := blobs(1, changed(half, true)), blobs(0, status(401))
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				return first(w, r, next) || rest(w, r, next)
			}
		}()},
		"reset, and no ranges": {fault: func() fault {
			first, rest := blobs(1, changed(half, true)), blobs(0, unranged)
			return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				return first(w, r, next) || rest(w, r, next)
			}
		}(), status: 200},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up := newUpstream(t)
			img := image(t, size)
			up.push(t, "public/app", img, "v1")
			d, content := layer(t, img, 0)
			n := newNode(t, up, func(o *registry.Options) {
				if o.StallTimeout = time.Minute; strings.Contains(name, "stall") {
					o.StallTimeout = time.Second
				}
			})
			if r := n.get("public/app/manifests/v1"); r.status != 200 {
				t.Fatalf("manifest: %d %s", r.status, r.body)
			}
			up.set(c.fault)
			r := n.get("public/app/blobs/" + d.String())
			switch {
			case c.status == 0:
				if r.err == nil && r.status == 200 {
					t.Errorf("got %d with %d bytes, whole", r.status, len(r.body))
				}
			case r.status != c.status:
				t.Errorf("got %d %.300s (%v), want %d", r.status, r.body, r.err, c.status)
			case c.status == 200 && (r.err != nil || !bytes.Equal(r.body, content)):
				t.Errorf("got %d bytes, %v", len(r.body), r.err)
			case c.status == 429 && r.header.Get("Retry-After") != "77":
				t.Errorf("Retry-After %q", r.header.Get("Retry-After"))
			case c.status == 401 && r.header.Get("WWW-Authenticate") == "":
				t.Error("401 without a challenge")
			}
			seen := n.seen()
			x := seen[len(seen)-1]
			// A 401 to who showed no credentials is not told.
			if r.status != 401 && (x.Complete != (c.status == 200) || (x.Err == nil) != (c.status == 200)) {
				t.Errorf("transfer %+v", x)
			}
			up.set(nil)
			n.wait(time.Minute)
			if r := n.get("public/app/blobs/" + d.String()); r.status != 200 || r.err != nil || !bytes.Equal(r.body, content) {
				t.Errorf("afterwards: %d, %d bytes %.200s, %v", r.status, len(r.body), r.body[:min(200, len(r.body))], r.err)
			}
		})
	}
}

// TestUpstreamWithoutRange sends the whole, and the record says so.
func TestUpstreamWithoutRange(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 3<<20)
	up.push(t, "public/app", img, "v1")
	d, content := layer(t, img, 0)
	n := newNode(t, up)
	n.get("public/app/manifests/v1")
	up.set(on("", "/blobs/", 0, unranged))
	for _, at := range []int{2 << 20, 10} {
		r := n.get("public/app/blobs/"+d.String(), "Range", fmt.Sprintf("bytes=%d-%d", at, at+99))
		if r.status != 206 || !bytes.Equal(r.body, content[at:at+100]) {
			t.Errorf("at %d: %d, %d bytes, %v", at, r.status, len(r.body), r.err)
		}
	}
	if x := n.seen()[1]; !strings.Contains(x.Note, "no ranges") || !x.Complete {
		t.Errorf("transfer %+v", x)
	}
}

// TestHostileManifests do not get through.
func TestHostileManifests(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 10)
	d := up.push(t, "public/app", img, "v1")
	for name, x := range map[string]fault{
		"corrupt": changed(func(b []byte) []byte {
			if len(b) > 0 { // the registry asks for a credential first
				b[len(b)/2] ^= 1
			}
			return b
		}, false),
		"too large": func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Write(bytes.Repeat([]byte(" "), 5<<20))
			return true
		},
		"no JSON": func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
			w.Write([]byte("<html>"))
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, up)
			up.set(on(http.MethodGet, "/manifests/", 0, x))
			for _, ref := range []string{"v1", d.String()} {
				if r := n.get("public/app/manifests/" + ref); r.status != 502 {
					t.Errorf("%s: %d %.100s", ref, r.status, r.body)
				}
			}
			up.set(nil)
			if err := n.pull("public/app", "v1"); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if x := n.seen()[0]; x.Err == nil || errors.Is(x.Err, accel.ErrNotFound) {
				t.Errorf("transfer %+v", x)
			}
		})
	}
}

// TestManifestThatLiesAboutSizes harms its own repository alone.
func TestManifestThatLiesAboutSizes(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 1<<20)
	up.push(t, "public/app", img, "v1")
	up.push(t, "public/liar", img, "v1")
	d, _ := layer(t, img, 0)
	for name, other := range map[string]string{"smaller": "10485", "larger": "99048576"} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, up)
			up.set(on(http.MethodGet, "/public/liar/manifests/", 0, func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				lie := changed(func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("1048576"), []byte(other)) }, false)
				return lie(withoutDigest{w}, r, next)
			}))
			if r := n.get("public/liar/manifests/v1"); r.status != 200 {
				t.Fatalf("manifest: %d %s", r.status, r.body)
			}
			if r := n.get("public/liar/blobs/" + d.String()); r.status != 502 && r.err == nil {
				t.Errorf("got %d, %d bytes", r.status, len(r.body))
			}
			if err := n.pull("public/app", "v1"); err != nil {
				t.Errorf("the honest one: %v", err)
			}
		})
	}
}

// withoutDigest drops the header that would give the changed content away.
type withoutDigest struct{ http.ResponseWriter }

func (w withoutDigest) WriteHeader(status int) {
	w.Header().Del("Docker-Content-Digest")
	w.ResponseWriter.WriteHeader(status)
}
