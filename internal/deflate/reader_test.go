package deflate

import (
	"bufio"
	"bytes"
	"compress/flate"
	stdgzip "compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
)

// contents are of all kinds that encoders meet: nothing, noise, text, runs, and
// mixtures longer than the window and the buffers.
func contents() [][]byte {
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	var text bytes.Buffer
	for text.Len() < 600_000 {
		fmt.Fprintf(&text, "%d %s\n", r.IntN(1_000_000), []string{"a line", "another one", "lorem ipsum", "the end"}[r.IntN(4)])
	}
	skewed := make([]byte, 400_000) // long codes: symbol i about half as often as i-1
	for i := range skewed {
		for r.IntN(2) == 0 && skewed[i] < 200 {
			skewed[i]++
		}
	}
	var mixed []byte
	for len(mixed) < 500_000 {
		at := r.IntN(200_000)
		mixed = append(mixed, [][]byte{noise, text.Bytes(), skewed}[r.IntN(3)][at:at+r.IntN(40_000)]...)
	}
	return [][]byte{{}, {1}, noise, text.Bytes(), skewed, make([]byte, 400_000), bytes.Repeat([]byte("abc"), 100_000), mixed}
}

func packed(content []byte, level int) []byte {
	var buf bytes.Buffer
	w, err := stdgzip.NewWriterLevel(&buf, level)
	if err != nil {
		panic(err)
	}
	w.Name, w.Comment, w.Extra = "a name", "a comment", []byte("something")
	w.Write(content)
	w.Close()
	return buf.Bytes()
}

func packedByKlauspost(content []byte, level int) []byte {
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, level)
	if err != nil {
		panic(err)
	}
	w.Write(content)
	w.Close()
	return buf.Bytes()
}

func TestInflates(t *testing.T) {
	for i, content := range contents() {
		for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 6} {
			for name, pack := range map[string]func([]byte, int) []byte{"standard": packed, "klauspost": packedByKlauspost} {
				blob := pack(content, level)
				check := func(how string, r io.Reader) {
					got, err := io.ReadAll(NewReader(r))
					if err != nil || !bytes.Equal(got, content) {
						t.Errorf("content %d at level %d by the %s library, read %s: %d of %d bytes, error %v", i, level, name, how, len(got), len(content), err)
					}
				}
				check("at once", bytes.NewReader(blob))
				if level != 6 {
					continue
				}
				check("with its end", iotest.DataErrReader(bytes.NewReader(blob)))
				if i%4 == 3 {
					check("bytewise", iotest.OneByteReader(bytes.NewReader(blob)))
				}
			}
		}
	}
}

func TestMembers(t *testing.T) {
	a, b := packed([]byte("one "), 6), packed([]byte("two"), 0)
	for _, after := range []string{"", "\x00\x00\x00", "garbage", "\x1f\x8b"} {
		got, err := io.ReadAll(NewReader(bytes.NewReader(append(append(bytes.Clone(a), b...), after...))))
		if err != nil || string(got) != "one two" {
			t.Errorf("followed by %q: %q, %v", after, got, err)
		}
	}
	// A match must not reach into the member before.
	var raw bytes.Buffer
	w, _ := flate.NewWriterDict(&raw, 9, []byte("one two three"))
	w.Write([]byte("one two three"))
	w.Close()
	bad := append(append(bytes.Clone(packed([]byte("one two three"), 6)), a[:10+2+9+7+10]...), raw.Bytes()...)
	if _, err := io.ReadAll(NewReader(bytes.NewReader(bad))); !errors.Is(err, ErrFormat) {
		t.Errorf("a match into the member before: %v", err)
	}
}

func TestManyMembers(t *testing.T) {
	var blob, want []byte
	r := rand.New(rand.NewPCG(3, 4))
	all := contents()
	for range 500 {
		c := all[2+r.IntN(6)]
		at, n := r.IntN(100_000), r.IntN(1+r.IntN(3_000))
		want = append(want, c[at:at+n]...)
		blob = append(blob, packedByKlauspost(c[at:at+n], r.IntN(10))...)
	}
	for _, size := range []int{16, 4096} {
		got, err := io.ReadAll(NewReader(bufio.NewReaderSize(bytes.NewReader(blob), size)))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("by %d bytes: %d of %d bytes, error %v", size, len(got), len(want), err)
		}
	}
}

func TestTruncated(t *testing.T) {
	content := contents()[7][:1_200]
	for _, level := range []int{0, 6} {
		blob := packed(content, level)
		for n := range blob {
			got, err := io.ReadAll(NewReader(bytes.NewReader(blob[:n])))
			if !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.HasPrefix(content, got) {
				t.Fatalf("cut at %d of %d, level %d: %d bytes, error %v", n, len(blob), level, len(got), err)
			}
		}
	}
}

func TestSourceFails(t *testing.T) {
	blob := packed(contents()[3], 6)
	broken := errors.New("broken")
	for _, n := range []int{0, 5, 100, len(blob) / 2, len(blob) - 4} {
		_, err := io.ReadAll(NewReader(io.MultiReader(bytes.NewReader(blob[:n]), iotest.ErrReader(broken))))
		if !errors.Is(err, broken) {
			t.Errorf("failing after %d bytes: %v", n, err)
		}
	}
}

func TestDamaged(t *testing.T) {
	blob := packed(contents()[3][:50_000], 6)
	for _, at := range []int{0, 2, len(blob) - 8, len(blob) - 1} {
		bad := bytes.Clone(blob)
		bad[at] ^= 0xe0
		if _, err := io.ReadAll(NewReader(bytes.NewReader(bad))); !errors.Is(err, ErrFormat) {
			t.Errorf("damaged at %d: %v", at, err)
		}
	}
}

// A Reader that is used again knows nothing of what it read before, however that ended.
func TestReset(t *testing.T) {
	z := NewReader(bytes.NewReader(nil))
	r := rand.New(rand.NewPCG(5, 6))
	all := contents()
	for i := range 200 {
		content := all[r.IntN(len(all))]
		blob := packed(content, []int{flate.HuffmanOnly, 0, 1, 6}[r.IntN(4)])
		switch r.IntN(4) {
		case 0: // ends early
			z.Reset(bytes.NewReader(blob[:r.IntN(len(blob))]))
			io.Copy(io.Discard, z)
		case 1: // is given up
			z.Reset(bytes.NewReader(blob))
			io.CopyN(io.Discard, z, int64(len(content)/2))
		case 2: // is damaged
			bad := bytes.Clone(blob)
			bad[r.IntN(len(bad))] ^= 0xff
			z.Reset(bytes.NewReader(bad))
			io.Copy(io.Discard, z)
		case 3: // was read by pieces
			z.Reset(bytes.NewReader(blob))
			z.Next()
		}
		z.Reset(bytes.NewReader(blob))
		if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, content) {
			t.Fatalf("round %d: %d of %d bytes, error %v", i, len(got), len(content), err)
		}
	}
}

// FuzzReader compares with the standard library: both fail, or both give the same.
func FuzzReader(f *testing.F) {
	for _, content := range contents() {
		content = content[:min(len(content), 5_000)]
		for _, level := range []int{flate.HuffmanOnly, 0, 6} {
			blob := packedByKlauspost(content, level)
			f.Add(blob)
			f.Add(blob[:len(blob)/2])
			f.Add(append(bytes.Clone(blob), blob...))
		}
	}
	f.Fuzz(func(t *testing.T, blob []byte) {
		want, werr := oracle(blob)
		got, err := io.ReadAll(io.LimitReader(NewReader(bytes.NewReader(blob)), oracleBytes))
		if (err == nil) != (werr == nil) {
			t.Fatalf("error %v, the standard library has %v", err, werr)
		}
		if err == nil && !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, the standard library has %d, or others", len(got), len(want))
		}
		if !bytes.HasPrefix(want, got) && !bytes.HasPrefix(got, want) {
			t.Fatal("other bytes before the error than the standard library")
		}
	})
}

const oracleBytes = 4 << 20

// oracle stops behind the last member, as Reader does.
func oracle(blob []byte) (out []byte, err error) {
	br := bufio.NewReader(bytes.NewReader(blob))
	zr, err := stdgzip.NewReader(br)
	if err != nil {
		return nil, err
	}
	for {
		zr.Multistream(false)
		b, err := io.ReadAll(io.LimitReader(zr, int64(oracleBytes-len(out))))
		out = append(out, b...)
		if err != nil || len(out) == oracleBytes {
			return out, err
		}
		if head, _ := br.Peek(3); !bytes.Equal(head, []byte{0x1f, 0x8b, 8}) {
			return out, nil
		}
		if err := zr.Reset(br); err != nil {
			return out, err
		}
	}
}

// BenchmarkReader inflates ACCEL_BENCH_GZIP, or else a text, here and in the libraries.
func BenchmarkReader(b *testing.B) {
	blob := packed(contents()[7], 6)
	if p := os.Getenv("ACCEL_BENCH_GZIP"); p != "" {
		var err error
		if blob, err = os.ReadFile(p); err != nil {
			b.Fatal(err)
		}
	}
	readers := map[string]func(io.Reader) (io.Reader, error){
		"ours":      func(r io.Reader) (io.Reader, error) { return NewReader(r), nil },
		"klauspost": func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
		"standard":  func(r io.Reader) (io.Reader, error) { return stdgzip.NewReader(r) },
	}
	for _, name := range []string{"ours", "klauspost", "standard"} {
		b.Run(name, func(b *testing.B) {
			var n int64
			for b.Loop() {
				r, err := readers[name](bytes.NewReader(blob))
				if err == nil {
					n, err = io.Copy(io.Discard, r)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(n)
		})
	}
}
