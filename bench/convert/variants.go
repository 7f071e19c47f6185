package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"accel/convert"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

type variant struct {
	name, note string
	run        func(ctx context.Context, img v1.Image, dir string) (outcome, error)
}

// variants run in this order, round after round.
var variants = []variant{
	{"accel", "the converter at its defaults", ours},
	{"gzip", "gzip -d | gzip, all layers at once", pipe},
	{"stock-klauspost", "estargz.Build with klauspost's gzip, level 6, all layers at once", stock(estargz.WithCompression(klauspost{}))},
	{"rates", "", measureRates},
	{"stock", "estargz.Build at its defaults, all layers at once", stock()},
}

// child runs one variant and prints its outcome.
func child(name, src string) int {
	err := func() error {
		dir, err := os.MkdirTemp("", "accel-bench-")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		var o outcome
		if name == "giant" {
			o, err = giant(dir)
		} else {
			o, err = byName(name, src, dir)
		}
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(o)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func byName(name, src, dir string) (outcome, error) {
	idx, err := layout.ImageIndexFromPath(src)
	if err != nil {
		return outcome{}, err
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return outcome{}, err
	}
	img, err := idx.Image(m.Manifests[0].Digest)
	if err != nil {
		return outcome{}, err
	}
	for _, v := range variants {
		if v.name == name {
			return v.run(context.Background(), img, dir)
		}
	}
	return outcome{}, fmt.Errorf("no variant %q", name)
}

// ours converts twice, the second time with what the memo kept of the first.
func ours(ctx context.Context, img v1.Image, dir string) (outcome, error) {
	c := &convert.Converter{TempDir: dir}
	memo := &memo{known: map[string]convert.LayerMemo{}}
	var o outcome
	for _, seconds := range []*float64{&o.Seconds, &o.Again} {
		began := time.Now()
		res, err := c.Convert(ctx, convert.Source{Image: img, Repository: "bench/image"}, convert.Options{Memo: memo})
		if err != nil {
			return o, err
		}
		*seconds = time.Since(began).Seconds()
		o.Bytes = res.Stats.TargetBytes
		if err := res.Close(); err != nil {
			return o, err
		}
	}
	if memo.hits.Load() == 0 {
		return o, errors.New("the memo was not asked")
	}
	return o, nil
}

// memo is the worker's, without its store.
type memo struct {
	mu    sync.Mutex
	known map[string]convert.LayerMemo
	hits  atomic.Int64
}

func (m *memo) Lookup(_ context.Context, source digest.Digest, params string) (convert.LayerMemo, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l, ok := m.known[source.String()+params]
	if ok {
		m.hits.Add(1)
	}
	return l, ok, nil
}

func (m *memo) Remember(_ context.Context, source digest.Digest, params string, l convert.LayerMemo) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	known := maps.Clone(m.known)
	known[source.String()+params] = l
	m.known = known
	return nil
}

// layersToFiles puts every layer into a file first, outside the time measured,
// and then gives all of them to f at once.
func layersToFiles(img v1.Image, dir string, f func(in *os.File, out io.Writer) error) (outcome, error) {
	layers, err := img.Layers()
	if err != nil {
		return outcome{}, err
	}
	var in []*os.File
	for i, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			return outcome{}, err
		}
		file, err := os.Create(filepath.Join(dir, fmt.Sprint("in", i)))
		if err != nil {
			return outcome{}, err
		}
		if _, err := io.Copy(file, rc); err != nil {
			return outcome{}, err
		}
		rc.Close()
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return outcome{}, err
		}
		in = append(in, file)
	}
	var o outcome
	var total atomic.Int64
	var group errgroup.Group
	began := time.Now()
	for i, file := range in {
		group.Go(func() error {
			out, err := os.Create(filepath.Join(dir, fmt.Sprint("out", i)))
			if err != nil {
				return err
			}
			if err := f(file, out); err != nil {
				return err
			}
			info, err := out.Stat()
			if err != nil {
				return err
			}
			total.Add(info.Size())
			return out.Close()
		})
	}
	err = group.Wait()
	o.Seconds, o.Bytes = time.Since(began).Seconds(), total.Load()
	return o, err
}

func stock(opts ...estargz.Option) func(context.Context, v1.Image, string) (outcome, error) {
	return func(_ context.Context, img v1.Image, dir string) (outcome, error) {
		return layersToFiles(img, dir, func(in *os.File, out io.Writer) error {
			info, err := in.Stat()
			if err != nil {
				return err
			}
			blob, err := estargz.Build(io.NewSectionReader(in, 0, info.Size()), opts...)
			if err != nil {
				return err
			}
			if _, err := io.Copy(out, blob); err != nil {
				return err
			}
			_ = blob.DiffID() // a converter needs it
			return blob.Close()
		})
	}
}

// klauspost is the stock library's gzip with the fast compressor.
type klauspost struct{ *estargz.GzipDecompressor }

func (klauspost) Writer(w io.Writer) (estargz.WriteFlushCloser, error) {
	return gzip.NewWriterLevel(w, convert.DefaultParams().Level)
}

func (klauspost) WriteTOCAndFooter(w io.Writer, off int64, toc *estargz.JTOC, h hash.Hash) (digest.Digest, error) {
	return estargz.NewGzipCompressorWithLevel(convert.DefaultParams().Level).WriteTOCAndFooter(w, off, toc, h)
}

func pipe(ctx context.Context, img v1.Image, dir string) (outcome, error) {
	return layersToFiles(img, dir, func(in *os.File, out io.Writer) error {
		inflate, deflate := exec.CommandContext(ctx, "gzip", "-d"), exec.CommandContext(ctx, "gzip")
		inflate.Stdin, deflate.Stdout = in, out
		var err error
		if deflate.Stdin, err = inflate.StdoutPipe(); err != nil {
			return err
		}
		if err := inflate.Start(); err != nil {
			return err
		}
		return errors.Join(deflate.Run(), inflate.Wait())
	})
}

// rates are of one core on the image's own bytes.
type rates struct {
	InflateMBs, DeflateMBs, SHA256MBs float64
	TotalMB, BiggestMB                float64 // uncompressed
}

// sampleBytes of the biggest layer are hashed and deflated for the rates.
const sampleBytes = 256 << 20

func measureRates(_ context.Context, img v1.Image, _ string) (outcome, error) {
	var o outcome
	layers, err := img.Layers()
	if err != nil {
		return o, err
	}
	var sample []byte
	var inflating float64
	for _, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			return o, err
		}
		raw, err := io.ReadAll(rc)
		if err != nil {
			return o, err
		}
		rc.Close()
		zr, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			return o, err
		}
		began := time.Now()
		n, err := io.Copy(io.Discard, zr)
		if err != nil {
			return o, err
		}
		inflating += time.Since(began).Seconds()
		mb := float64(n) / timesMB
		o.Rates.TotalMB += mb
		if mb > o.Rates.BiggestMB {
			if err := zr.Reset(bytes.NewReader(raw)); err != nil {
				return o, err
			}
			if sample, err = io.ReadAll(io.LimitReader(zr, sampleBytes)); err != nil {
				return o, err
			}
			o.Rates.BiggestMB = mb
		}
	}
	o.Rates.InflateMBs = o.Rates.TotalMB / inflating
	mb := float64(len(sample)) / timesMB
	began := time.Now()
	sha256.Sum256(sample)
	o.Rates.SHA256MBs = mb / time.Since(began).Seconds()
	p := convert.DefaultParams()
	z, err := gzip.NewWriterLevel(io.Discard, p.Level)
	if err != nil {
		return o, err
	}
	began = time.Now()
	for at := int64(0); at < int64(len(sample)); at += p.ChunkBytes {
		z.Reset(io.Discard)
		if _, err := z.Write(sample[at:min(at+p.ChunkBytes, int64(len(sample)))]); err != nil {
			return o, err
		}
		if err := z.Close(); err != nil {
			return o, err
		}
	}
	o.Rates.DeflateMBs = mb / time.Since(began).Seconds()
	return o, nil
}
