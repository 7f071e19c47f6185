package lazyfs

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkSequential reads a large file of which all is there, cold in the mount's
// page cache and warm in the data file's: through the holder and without.
func BenchmarkSequential(b *testing.B) {
	const size, read = 256 << 20, 248 << 20 // read-ahead stays away from the end
	im := sampleOf(90, map[string][]byte{"big": bytesOf(91, size)})
	for _, lazy := range []bool{true, false} {
		name := "plain"
		if lazy {
			name = "holder"
		}
		b.Run(name, func(b *testing.B) {
			bed := newBed(b, nil).start(im)
			defer bed.stop()
			l, _ := bed.Layer(im.digest)
			fillAll(b, l, im)
			if lazy { // one chunk is missing, which nobody reads
				if err := l.Forget(l.Len() - 1); err != nil {
					b.Fatal(err)
				}
			}
			buf := make([]byte, 1<<20)
			b.SetBytes(read)
			for b.Loop() {
				b.StopTimer()
				target := bed.mount(im, "a")
				b.StartTimer()
				f, err := os.Open(filepath.Join(target, "big"))
				if err != nil {
					b.Fatal(err)
				}
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(f, read), buf)
				if err != nil || n != read {
					b.Fatal(n, err)
				}
				f.Close()
				b.StopTimer()
				if err := bed.Unmount(b.Context(), target); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			if fills := bed.memory.fills.Load(); fills > 0 {
				b.Errorf("%d fills", fills)
			}
		})
	}
}
