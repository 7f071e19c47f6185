package mirror_test

import (
	"io"
	"net/http"
	"testing"
)

// BenchmarkComplete serves a blob that is complete, to a client in the same process.
func BenchmarkComplete(b *testing.B) {
	up := newUpstream(b)
	img := image(b, 64<<20)
	up.push(b, "public/app", img, "v1")
	d, content := layer(b, img, 0)
	n := newNode(b, up)
	if err := n.pull("public/app", "v1"); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 256<<10)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, n.url+"/v2/public/app/blobs/"+d.String()+"?ns="+up.host, nil)
		if err != nil {
			b.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		if got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, buf); err != nil || got != int64(len(content)) {
			b.Fatal(got, err)
		}
		resp.Body.Close()
	}
}
