package deflate

import (
	"bytes"
	stdgzip "compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/klauspost/compress/gzip"
)

// piece is what Reader.Next returned.
type piece struct {
	data    []byte
	matches []Match
}

func pieces(t testing.TB, blob []byte) (all []piece, content []byte) {
	z := NewReader(bytes.NewReader(blob))
	for {
		data, matches, err := z.Next()
		if errors.Is(err, io.EOF) {
			return all, content
		}
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, m := range matches {
			literals, length, distance := m.parts()
			n += literals
			for i := range length { // in data, or in what came before
				at := len(content) + n + i
				from := at - distance
				var b byte
				if from < len(content) {
					b = content[from]
				} else {
					b = data[from-len(content)]
				}
				if data[n+i] != b {
					t.Fatalf("at %d: no match of %d bytes %d back", at, length, distance)
				}
			}
			n += length
		}
		if matches != nil && n != len(data) {
			t.Fatalf("matches for %d bytes, data of %d", n, len(data))
		}
		all = append(all, piece{bytes.Clone(data), append([]Match(nil), matches...)})
		content = append(content, data...)
	}
}

// members cuts blob's content at random places, and writes each part as a member.
func members(t testing.TB, blob []byte, level int, r *rand.Rand, longest int) (content []byte, out [][]byte, parts [][]byte) {
	all, content := pieces(t, blob)
	w, err := NewWriter(level)
	if err != nil {
		t.Fatal(err)
	}
	var matches []Match
	i, at := 0, 0 // in all
	var trace Trace
	for done := 0; done < len(content); {
		n := min(1+r.IntN(longest), len(content)-done)
		matches = matches[:0]
		for left := n; left > 0; {
			if at == 0 {
				trace = NewTrace(all[i].matches)
			}
			k := min(left, len(all[i].data)-at)
			if r.IntN(8) == 0 { // a header between, which nobody asks about
				trace.Skip(k)
				matches = append(matches, Raw(k))
			} else {
				matches = trace.Take(matches, k)
			}
			left -= k
			if at += k; at == len(all[i].data) {
				i, at = i+1, 0
			}
		}
		part := content[done : done+n]
		known := matches
		if r.IntN(3) == 0 { // something else behind
			part = append(bytes.Clone(part), make([]byte, r.IntN(2000))...)
		}
		var buf bytes.Buffer
		if err := w.Member(&buf, part, known); err != nil {
			t.Fatal(err)
		}
		out, parts = append(out, buf.Bytes()), append(parts, part)
		done += n
	}
	return content, out, parts
}

func checkMembers(t testing.TB, out, parts [][]byte) {
	for i, blob := range out {
		zr, err := stdgzip.NewReader(bytes.NewReader(blob))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(zr)
		if err != nil || !bytes.Equal(got, parts[i]) {
			t.Fatalf("member %d: %d bytes of %d, error %v", i, len(got), len(parts[i]), err)
		}
	}
}

func TestMembersFromMatches(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for i, content := range contents() {
		for _, level := range []int{stdgzip.HuffmanOnly, 0, 6} {
			blob := packed(content, level)
			for _, longest := range []int{60_000, 400_000} {
				got, out, parts := members(t, blob, 6, r, longest)
				if !bytes.Equal(got, content) {
					t.Fatalf("content %d at level %d: Next gives other bytes", i, level)
				}
				checkMembers(t, out, parts)
			}
		}
	}
}

// What a match was found for is not compressed anew: the matches are those of the
// source behind the first 32 KiB.
func TestMatchesAreReused(t *testing.T) {
	content := contents()[3]
	all, _ := pieces(t, packed(content, 9))
	w, err := NewWriter(1)
	if err != nil {
		t.Fatal(err)
	}
	trace := NewTrace(all[0].matches)
	n := len(all[0].data)
	var reused, anew bytes.Buffer
	for to, matches := range map[*bytes.Buffer][]Match{&reused: trace.Take(nil, n), &anew: nil} {
		if err := w.Member(to, content[:n], matches); err != nil {
			t.Fatal(err)
		}
	}
	best := len(packed(content[:n], 9))
	if reused.Len() > best*104/100 || anew.Len() < best*108/100 {
		t.Errorf("level 9 makes %d bytes, its matches %d, level 1 %d", best, reused.Len(), anew.Len())
	}
}

// Who compressed in a hurry is not followed.
func TestHurriedSource(t *testing.T) {
	for level, want := range map[int]bool{stdgzip.BestSpeed: false, 6: true} {
		_, matches, err := NewReader(bytes.NewReader(packed(contents()[3], level))).Next()
		if err != nil || (matches != nil) != want {
			t.Errorf("level %d: matches are there: %v, error %v", level, matches != nil, err)
		}
	}
}

// FuzzMember writes members from whatever matches a stream has.
func FuzzMember(f *testing.F) {
	for _, content := range contents() {
		for _, level := range []int{stdgzip.HuffmanOnly, 6} {
			f.Add(packedByKlauspost(content[:min(len(content), 100_000)], level), uint64(1))
		}
	}
	f.Fuzz(func(t *testing.T, blob []byte, seed uint64) {
		if got, err := io.ReadAll(io.LimitReader(NewReader(bytes.NewReader(blob)), oracleBytes)); err != nil || len(got) == oracleBytes {
			return // no gzip, or too much of it
		}
		_, out, parts := members(t, blob, 1, rand.New(rand.NewPCG(seed, 0)), 200_000)
		checkMembers(t, out, parts)
	})
}

// FuzzCode makes codes for any frequencies and both limits.
func FuzzCode(f *testing.F) {
	fib := []byte{1, 0, 1, 0}
	for a, b := uint16(1), uint16(1); b < 30_000; a, b = b, a+b {
		fib = binary.LittleEndian.AppendUint16(fib, a+b)
	}
	f.Add(fib)
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{1, 0}, 286))
	f.Fuzz(func(t *testing.T, b []byte) {
		var often [286]uint32
		used := 0
		for i := 0; i < len(often) && 2*i+1 < len(b); i++ {
			often[i] = uint32(binary.LittleEndian.Uint16(b[2*i:]))
			if often[i] > 0 {
				used++
			}
		}
		symbols, longest := 286, maxCode
		if used <= 19 && len(b) < 40 {
			symbols, longest = 19, 7
		}
		var c code
		lengths := make([]uint8, symbols)
		c.make(often[:symbols], longest, lengths)
		sum := 0
		for i, n := range lengths {
			if often[i] > 0 && n == 0 || int(n) > longest {
				t.Fatalf("symbol %d, %d times, has %d bits", i, often[i], n)
			}
			if n > 0 {
				sum += 1 << (longest - int(n))
			}
			for j, m := range lengths {
				if often[i] > often[j] && n > m && m > 0 {
					t.Fatalf("symbol %d is more frequent than %d and has a longer code", i, j)
				}
			}
		}
		if sum != 1<<longest {
			t.Fatalf("the codes fill %d of %d", sum, 1<<longest)
		}
	})
}

// BenchmarkMember writes ACCEL_BENCH_GZIP's content, or else a text, anew in members
// of 256 KiB.
func BenchmarkMember(b *testing.B) {
	blob := packed(contents()[7], 6)
	if p := os.Getenv("ACCEL_BENCH_GZIP"); p != "" {
		var err error
		if blob, err = os.ReadFile(p); err != nil {
			b.Fatal(err)
		}
	}
	var total int64
	var all []piece
	z := NewReader(bytes.NewReader(blob))
	for total < 256<<20 {
		data, matches, err := z.Next()
		if err != nil {
			break
		}
		all = append(all, piece{bytes.Clone(data), append([]Match(nil), matches...)})
		total += int64(len(data))
	}
	for _, how := range []string{"reused", "anew", "klauspost"} {
		b.Run(how, func(b *testing.B) {
			w, err := NewWriter(6)
			if err != nil {
				b.Fatal(err)
			}
			zw, err := gzip.NewWriterLevel(io.Discard, 6)
			if err != nil {
				b.Fatal(err)
			}
			var buf bytes.Buffer
			n := 0
			for b.Loop() {
				n = 0
				for _, p := range all {
					buf.Reset()
					switch how {
					case "reused":
						err = w.Member(&buf, p.data, p.matches)
					case "anew":
						err = w.Member(&buf, p.data, nil)
					default:
						zw.Reset(&buf)
						_, err = zw.Write(p.data)
						zw.Close()
					}
					if err != nil {
						b.Fatal(err)
					}
					n += buf.Len()
				}
			}
			b.SetBytes(total)
			b.ReportMetric(float64(n)/float64(total)*100, "%size")
		})
	}
}
