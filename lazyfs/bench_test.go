package lazyfs

import (
	"bytes"
	"fmt"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// manyFilesTOC is of a layer with n files of one chunk, as a converter writes it.
func manyFilesTOC(n int) (toc []byte, tocOffset int64) {
	var b bytes.Buffer
	b.WriteString(`{"version":1,"entries":[`)
	for i := range n {
		if i%20 == 0 {
			fmt.Fprintf(&b, `{"name":"usr/lib/python3/dist-packages/package-%d/","type":"dir","modtime":"2024-05-06T07:08:09Z","mode":16877,"NumLink":0},`, i/20)
		}
		fmt.Fprintf(&b, `{"name":"usr/lib/python3/dist-packages/package-%d/module_number_%d.py","type":"reg","size":%d,"modtime":"2024-05-06T07:%02d:09Z","mode":33188,"offset":%d,"NumLink":0,"digest":"sha256:%064x","chunkDigest":"sha256:%064x"},`,
			i/20, i, 100+i%9000, i/7%60, 1000+i*3000, i, i)
	}
	b.WriteString(`{"name":"end","type":"fifo"}]}`)
	return b.Bytes(), 1000 + int64(n)*3000
}

func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{30_000, 300_000} {
		toc, tocOffset := manyFilesTOC(n)
		d := b.TempDir()
		f := Files{filepath.Join(d, "meta"), filepath.Join(d, "table"), filepath.Join(d, "data")}
		b.Run(fmt.Sprintf("decode/%d", n), func(b *testing.B) {
			b.SetBytes(int64(len(toc)))
			for b.Loop() {
				must(decodeTOC(toc, func(*tocEntry) error { return nil }))
			}
		})
		b.Run(fmt.Sprintf("build/%d", n), func(b *testing.B) {
			b.SetBytes(int64(len(toc)))
			b.ReportAllocs()
			for b.Loop() {
				l, err := Build(toc, tocOffset)
				must(err)
				b.ReportMetric(float64(l.image.sizeBytes)/1e6, "MB-of-metadata")
			}
		})
		l, err := Build(toc, tocOffset)
		must(err)
		b.Run(fmt.Sprintf("store/%d", n), func(b *testing.B) {
			for b.Loop() {
				must(l.Store(f))
			}
		})
		b.Run(fmt.Sprintf("open/%d", n), func(b *testing.B) {
			for b.Loop() {
				t, err := OpenTable(f.Table)
				must(err)
				must(t.Close())
			}
		})
		b.Run(fmt.Sprintf("mount/%d", n), func(b *testing.B) {
			needRoot(b)
			dir := b.TempDir()
			for b.Loop() {
				must(unix.Mount(f.Meta, dir, "erofs", unix.MS_RDONLY, "device="+f.Data))
				must(unix.Unmount(dir, 0))
			}
		})
	}
}
