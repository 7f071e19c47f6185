package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// sparse files, as GNU tar writes them; package archive/tar cannot.

// run of data in a sparse file.
type extent struct {
	at   int64
	data string
}

// oldGNUSparse is a type 'S' entry; more than four extents go into extension blocks.
func oldGNUSparse(name string, size int64, extents ...extent) tarEntry {
	var data string
	for _, e := range extents {
		data += e.data
	}
	h := header(name, 'S', int64(len(data)))
	copy(h[257:], "ustar  \x00")
	put := func(b []byte, es []extent) {
		for i, e := range es {
			copy(b[i*24:], fmt.Sprintf("%011o\x00%011o\x00", e.at, len(e.data)))
		}
	}
	rest := extents
	n := min(4, len(rest))
	put(h[386:], rest[:n])
	rest = rest[n:]
	copy(h[483:], fmt.Sprintf("%011o\x00", size))
	if len(rest) > 0 {
		h[482] = 1
	}
	out := checksummed(h)
	for len(rest) > 0 {
		x := make([]byte, tarBlock)
		n := min(21, len(rest))
		put(x, rest[:n])
		if rest = rest[n:]; len(rest) > 0 {
			x[504] = 1
		}
		out = append(out, x...)
	}
	return rawBytes(padded(append(out, data...)))
}

// paxSparse is a GNU.sparse 1.0 entry, whose map comes before the data.
func paxSparse(name string, size int64, extents ...extent) tarEntry {
	m, data := fmt.Sprintf("%d\n", len(extents)), ""
	for _, e := range extents {
		m += fmt.Sprintf("%d\n%d\n", e.at, len(e.data))
		data += e.data
	}
	body := append(padded([]byte(m)), data...)
	var records string
	for _, kv := range [][2]string{{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", name}, {"GNU.sparse.realsize", fmt.Sprint(size)}, {"SCHILY.xattr.user.k", "v"}} {
		line := fmt.Sprintf(" %s=%s\n", kv[0], kv[1])
		n := len(line)
		for n != len(fmt.Sprint(n))+len(line) {
			n = len(fmt.Sprint(n)) + len(line)
		}
		records += fmt.Sprint(n) + line
	}
	x := header("PaxHeaders/"+name, 'x', int64(len(records)))
	h := header("GNUSparseFile.0/"+name, '0', int64(len(body)))
	for _, b := range [][]byte{x, h} {
		copy(b[257:], "ustar\x0000")
	}
	return rawBytes(padded(slices.Concat(padded(append(checksummed(x), records...)), checksummed(h), body)))
}

func header(name string, kind byte, size int64) []byte {
	h := make([]byte, tarBlock)
	copy(h, name)
	copy(h[100:], "0000644\x00")
	copy(h[108:], "0000001\x00")
	copy(h[116:], "0000002\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00", size))
	copy(h[136:], fmt.Sprintf("%011o\x00", 1_700_000_000))
	h[156] = kind
	return h
}

func checksummed(h []byte) []byte {
	copy(h[148:], "        ")
	n := 0
	for _, b := range h {
		n += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", n))
	return h
}

func padded(b []byte) []byte { return append(b, make([]byte, padding(int64(len(b))))...) }

func TestSparse(t *testing.T) {
	data := noise(700, 1)
	var many []extent
	for i := range int64(30) {
		many = append(many, extent{i * 1000, text(100, uint64(i))})
	}
	content := func(size int, es ...extent) string {
		b := make([]byte, size)
		for _, e := range es {
			copy(b[e.at:], e.data)
		}
		return string(b)
	}
	big := 3*chunkSize + 5
	for name, c := range map[string]struct {
		in   tarEntry
		want string
		pax  bool
	}{
		"GNU":                 {oldGNUSparse("f", 5000, extent{1024, data}), content(5000, extent{1024, data}), false},
		"GNU, extended":       {oldGNUSparse("f", 30_000, many...), content(30_000, many...), false},
		"GNU, hole at end":    {oldGNUSparse("f", int64(big), extent{0, data}, extent{int64(big), ""}), content(big, extent{0, data}), false},
		"GNU, only a hole":    {oldGNUSparse("f", int64(big), extent{int64(big), ""}), content(big), false},
		"PAX":                 {paxSparse("f", 5000, extent{1024, data}), content(5000, extent{1024, data}), true},
		"PAX, hole of chunks": {paxSparse("f", int64(big), extent{int64(big) - 10, "0123456789"}), content(big, extent{int64(big) - 10, "0123456789"}), true},
	} {
		t.Run(name, func(t *testing.T) {
			opts := []option{owner(1, 2)}
			if c.pax {
				opts = append(opts, xattr("user.k", "v"))
			}
			src := tarOf(file("before", "b"), c.in, file("after", "a"), c.in, file("end", "e"))
			plain := tarOf(file("before", "b"), file("f", c.want, opts...), file("after", "a"), file("end", "e"))
			img := imageOf(t, layerOf(gz(src), src))
			res := converted(t, newConverter(t, 2), img)
			checkSame(t, img, res.Image, nil)
			if diff, err := Diff(context.Background(), imageOf(t, layerOf(plain, plain)), res.Image, DiffOptions{}); err != nil || len(diff) > 0 {
				t.Errorf("%v %v", diff, err)
			}
		})
	}
	t.Run("holes count", func(t *testing.T) {
		src := tarOf(oldGNUSparse("f", 1<<33-1, extent{1<<33 - 1, ""}))
		c := newConverter(t, 2)
		c.Policy.MaxUncompressedBytes = 10 << 20
		_, err := c.Convert(context.Background(), Source{Image: imageOf(t, layerOf(src, src))}, Options{})
		var r *accel.Rejection
		if !errors.As(err, &r) || r.Rule != "policy.max_uncompressed_size" {
			t.Error(err)
		}
	})
	t.Run("data without a place", func(t *testing.T) {
		e := oldGNUSparse("f", 5000, extent{1024, data})
		bad := bytes.Clone(e.raw)
		copy(bad[386+12:], fmt.Sprintf("%011o", 100)) // the map names less than there is
		src := tarOf(rawBytes(append(checksummed(bad[:tarBlock:tarBlock]), bad[tarBlock:]...)), file("after", "a"))
		_, err := newConverter(t, 2).Convert(context.Background(), Source{Image: imageOf(t, v1.Layer(layerOf(src, src)))}, Options{})
		if err == nil || !accel.IsPermanent(err) || !strings.Contains(err.Error(), `"f"`) {
			t.Error(err)
		}
	})
}
