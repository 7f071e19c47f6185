package convert

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// giant is a layer that is generated while it is read.
type giant struct {
	write  func(w io.Writer) // the tar
	diffID v1.Hash
}

func newGiant(write func(w io.Writer)) *giant {
	h := sha256.New()
	write(h)
	return &giant{write: write, diffID: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", h.Sum(nil))}}
}

func (g *giant) Digest() (v1.Hash, error)             { return hashOf([]byte(g.diffID.Hex)), nil }
func (g *giant) DiffID() (v1.Hash, error)             { return g.diffID, nil }
func (g *giant) Size() (int64, error)                 { return 1 << 30, nil }
func (g *giant) MediaType() (types.MediaType, error)  { return types.OCILayer, nil }
func (g *giant) Uncompressed() (io.ReadCloser, error) { return nil, fmt.Errorf("not used") }
func (g *giant) Compressed() (io.ReadCloser, error) {
	pr, pw := io.Pipe()
	go func() {
		z, err := gzip.NewWriterLevel(pw, 1)
		must(err)
		g.write(z)
		pw.CloseWithError(z.Close())
	}()
	return pr, nil
}

// TestGiantsLong converts what is larger than memory should ever hold. Run it
// alone for its peak to mean something.
func TestGiantsLong(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("giants take minutes: set ACCEL_TEST_LONG=1 (make test-long)")
	}
	block := []byte(text(1<<20, 1) + noise(1<<19, 2))
	fill := func(w io.Writer, n int64) {
		for n > 0 {
			m, err := w.Write(block[:min(n, int64(len(block)))])
			if err != nil {
				return
			}
			n -= int64(m)
		}
	}
	for name, write := range map[string]func(tw *tar.Writer){
		"a file of 5 GB, and 3 GB more": func(tw *tar.Writer) {
			for i, n := range []int64{5_000_000_000, 1_000_000_000, 1_000_000_000, 1_000_000_000} {
				tw.WriteHeader(&tar.Header{Name: fmt.Sprint("f", i), Size: n, Mode: 0o644, ModTime: time.Unix(1, 0)})
				fill(tw, n)
			}
		},
		"300,000 files": func(tw *tar.Writer) {
			for i := range 300_000 {
				tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("a/directory/with/a/name/%d/f%d", i/1000, i), Size: 1000, Mode: 0o644, ModTime: time.Unix(1, 0)})
				fill(tw, 1000)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			img := imageOf(t, newGiant(func(w io.Writer) {
				tw := tar.NewWriter(w)
				write(tw)
				tw.Close()
			}))
			c := newConverter(t, 0)
			c.Params = Params{}
			started := time.Now()
			res, err := c.Convert(context.Background(), Source{Image: img}, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer res.Close()
			t.Logf("%.1f s, %d MB of output, peak of the process %s", time.Since(started).Seconds(), res.Stats.TargetBytes/1e6, peak(t))
			f := layers(t, res.Image)[0].(*spilled)
			z, err := estargz.Open(io.NewSectionReader(f.f, 0, f.sizeBytes))
			must(err)
			toc := manifest(t, res.Image).Layers[0].Annotations[estargz.TOCJSONDigestAnnotation]
			if _, err := z.VerifyTOC(digestFrom(toc)); err != nil {
				t.Error(err)
			}
			if diff, err := Diff(context.Background(), img, res.Image, DiffOptions{}); err != nil || len(diff) > 0 {
				t.Error(diff, err)
			}
		})
	}
}

// peak is the most memory that the process has had.
func peak(t *testing.T) string {
	raw, err := os.ReadFile("/proc/self/status")
	must(err)
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
