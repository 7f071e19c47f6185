package bundle

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"testing"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is an image of two layers whose files are known.
type fixture struct {
	blobs   [][]byte
	layers  []accel.LayerMapping
	files   []map[string][]byte
	tocs    [][]byte
	fetched int64
}

func image(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{}
	r := rand.New(rand.NewPCG(1, 2))
	text := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = "abcdefgh\n"[r.IntN(9)]
		}
		return b
	}
	shared := text(5000)
	for n := range 2 {
		files := map[string][]byte{"usr/lib/large": text(700_000), "usr/lib/shared": shared, "etc/empty": nil}
		for i := range 40 {
			files[fmt.Sprintf("usr/share/%03d", i)] = text(100 + r.IntN(9000))
		}
		var layer bytes.Buffer
		w := tar.NewWriter(&layer)
		for _, name := range sorted(files) {
			h := tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(files[name])), Mode: 0o644}
			if err := errors.Join(w.WriteHeader(&h), second(w.Write(files[name]))); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		options := []estargz.Option{estargz.WithChunkSize(64 << 10)}
		if n == 1 {
			options = append(options, estargz.WithMinChunkSize(20<<10)) // several files in a member
		}
		made, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer.Bytes()), 0, int64(layer.Len())), options...)
		if err != nil {
			t.Fatal(err)
		}
		blob, err := io.ReadAll(made)
		if err := errors.Join(err, made.Close()); err != nil {
			t.Fatal(err)
		}
		offset, err := strconv.ParseInt(string(blob[len(blob)-estargz.FooterSize+16:][:16]), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		m := accel.LayerMapping{Target: digest.FromBytes(blob), TargetBytes: int64(len(blob)), TOCDigest: made.TOCDigest(), TOCOffset: offset}
		toc, err := unpackTOC(blob[offset:], m.TOCDigest)
		if err != nil {
			t.Fatal(err)
		}
		f.blobs, f.layers, f.files, f.tocs = append(f.blobs, blob), append(f.layers, m), append(f.files, files), append(f.tocs, toc)
	}
	return f
}

func second(_ int, err error) error { return err }

func sorted(files map[string][]byte) (names []string) {
	for name := range files {
		names = append(names, name)
	}
	for i := range names { // small
		for k := i + 1; k < len(names); k++ {
			if names[k] < names[i] {
				names[i], names[k] = names[k], names[i]
			}
		}
	}
	return names
}

func (f *fixture) read(_ context.Context, layer int, offset, n int64) ([]byte, error) {
	f.fetched += n
	return f.blobs[layer][offset : offset+n], nil
}

func (f *fixture) items() []accel.ProfileItem {
	return []accel.ProfileItem{
		{Layer: 1, Path: "usr/share/007", Bytes: 1 << 20},
		{Layer: 0, Path: "usr/lib/large", Offset: 70_000, Bytes: 200_000},
		{Layer: 0, Path: "usr/share/003", Bytes: 10},
		{Layer: 1, Path: "usr/lib/large", Bytes: 1},
		{Layer: 1, Path: "usr/share/008", Bytes: 10},
		{Layer: 0, Path: "usr/lib/shared", Bytes: 10},
		{Layer: 1, Path: "usr/lib/shared", Bytes: 10}, // equal to the one before
		{Layer: 0, Path: "no/such/file", Bytes: 10},
		{Layer: 7, Path: "usr/share/003", Bytes: 10},
		{Layer: 0, Path: "usr/share/003", Bytes: 10}, // named already
	}
}

var plenty = Limits{TOCBytes: 1 << 30, ContentBytes: 1 << 30}

func (f *fixture) made(t testing.TB, maxBytes int64) Made {
	t.Helper()
	m, err := Make(context.Background(), f.layers, f.items(), f.read, Bounds{1 << 30, maxBytes})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// contents reads a bundle to its end.
func contents(b []byte, limits Limits) (r *Reader, tocs [][]byte, chunks map[Chunk][]byte, order []Chunk, err error) {
	if r, err = NewReader(bytes.NewReader(b), int64(len(b)), limits); err != nil {
		return nil, nil, nil, nil, err
	}
	defer r.Close()
	if tocs, err = r.TOCs(); err != nil {
		return r, nil, nil, nil, err
	}
	chunks = map[Chunk][]byte{}
	for {
		f, packed, err := r.Next()
		if errors.Is(err, io.EOF) {
			return r, tocs, chunks, order, nil
		}
		if err != nil {
			return r, tocs, chunks, order, err
		}
		data, err := r.Unpack(f, packed, nil)
		if err != nil {
			return r, tocs, chunks, order, err
		}
		for _, c := range f.Chunks {
			chunks[c], data = data[:c.Bytes], data[c.Bytes:]
			order = append(order, c)
		}
	}
}

func TestBundleHasWhatTheProfileNames(t *testing.T) {
	f := image(t)
	m := f.made(t, 1<<30)
	r, tocs, chunks, order, err := contents(m.Content, plenty)
	if err != nil {
		t.Fatal(err)
	}
	for n, toc := range tocs {
		if !bytes.Equal(toc, f.tocs[n]) || r.Layers()[n].TOCDigest != f.layers[n].TOCDigest {
			t.Errorf("TOC %d is another", n)
		}
	}
	type span struct {
		layer      int
		path       string
		from, to   int
		firstAfter int // how many chunks come before it
	}
	at := 0
	for _, s := range []span{
		{1, "usr/share/007", 0, len(f.files[1]["usr/share/007"]), 0},
		{0, "usr/lib/large", 65536, 327680, 1}, {0, "usr/share/003", 0, len(f.files[0]["usr/share/003"]), 5},
		{1, "usr/lib/large", 0, 65536, 6}, {1, "usr/share/008", 0, len(f.files[1]["usr/share/008"]), 7}, {0, "usr/lib/shared", 0, 5000, 8},
	} {
		if at != s.firstAfter {
			t.Fatalf("%s begins at chunk %d, want %d", s.path, at, s.firstAfter)
		}
		var got []byte
		for len(got) < s.to-s.from && at < len(order) {
			if order[at].Layer != s.layer {
				t.Errorf("chunk %d is of layer %d, want %s of %d", at, order[at].Layer, s.path, s.layer)
			}
			got = append(got, chunks[order[at]]...)
			at++
		}
		if !bytes.Equal(got, f.files[s.layer][s.path][s.from:s.to]) {
			t.Errorf("%s of layer %d is another", s.path, s.layer)
		}
	}
	if at != len(order) {
		t.Errorf("%d chunks, want %d", len(order), at)
	}
	again := f.made(t, 1<<30)
	if !bytes.Equal(again.Content, m.Content) {
		t.Error("equal input gives another bundle")
	}
	if m.Digest != digest.FromBytes(m.Content) || m.SizeBytes != int64(len(m.Content)) || m.Layers[0].ContentBytes != 4*65536+int64(len(f.files[0]["usr/share/003"]))+5000 {
		t.Errorf("the description is %+v", m.Description)
	}
	text, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if d, err := ParseDescription(text); err != nil || fmt.Sprint(d) != fmt.Sprint(m.Description) {
		t.Errorf("%q is read as %+v, %v", text, d, err)
	}
}

func TestBundleKeepsItsBound(t *testing.T) {
	f := image(t)
	whole := f.made(t, 1<<30)
	_, _, _, order, err := contents(whole.Content, plenty)
	if err != nil {
		t.Fatal(err)
	}
	few := false
	for most := whole.SizeBytes - 1; ; most -= 5000 {
		m, err := Make(context.Background(), f.layers, f.items(), f.read, Bounds{1 << 30, most})
		if errors.Is(err, ErrTooLarge) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if m.SizeBytes > most {
			t.Fatalf("%d bytes, more than %d", m.SizeBytes, most)
		}
		_, _, _, kept, err := contents(m.Content, plenty)
		if err != nil {
			t.Fatal(err)
		}
		for i, c := range kept {
			if c != order[i] {
				t.Fatalf("chunk %d is another in a smaller bundle", i)
			}
		}
		few = few || len(kept) > 0 && len(kept) < len(order)
	}
	if !few {
		t.Error("no bundle had a part of the chunks")
	}
}

func TestReaderKeepsLimits(t *testing.T) {
	f := image(t)
	m := f.made(t, 1<<30)
	var tocs, content int64
	for n, l := range m.Layers {
		tocs, content = tocs+int64(len(f.tocs[n])), content+l.ContentBytes
	}
	if _, _, _, _, err := contents(m.Content, Limits{tocs, content}); err != nil {
		t.Error(err)
	}
	for _, l := range []Limits{{tocs - 1, content}, {tocs, content - 1}} {
		if _, _, _, _, err := contents(m.Content, l); !errors.Is(err, ErrFormat) {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if _, err := NewReader(bytes.NewReader(m.Content), m.SizeBytes+1, plenty); !errors.Is(err, ErrFormat) {
		t.Errorf("another size: %v", err)
	}
	for n := range m.Content {
		if n%997 == 0 {
			if _, _, _, _, err := contents(m.Content[:n], plenty); !errors.Is(err, accel.ErrInvalid) {
				t.Errorf("cut to %d bytes: %v", n, err)
			}
		}
	}
}

func TestMakeRefusesWhatTheMappingDoesNotSay(t *testing.T) {
	f := image(t)
	damaged := f.layers[1]
	damaged.TOCDigest = digest.FromString("another")
	without := f.layers[1]
	without.TOCDigest = ""
	for name, l := range map[string]accel.LayerMapping{"another TOC": damaged, "no TOC": without} {
		if _, err := Make(context.Background(), []accel.LayerMapping{f.layers[0], l}, f.items(), f.read, Bounds{1 << 30, 1 << 30}); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	blob := bytes.Clone(f.blobs[0])
	for i := range len(blob) / 2 {
		blob[i] ^= 0x55
	}
	f.blobs[0] = blob
	if _, err := Make(context.Background(), f.layers, f.items(), f.read, Bounds{1 << 30, 1 << 30}); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("damaged content: %v", err)
	}
}

func TestDigestsStandApart(t *testing.T) {
	sum := digest.FromString("x").String()
	for _, text := range []string{
		"", "sha256:", "sha256:sha256:", sum, sum + sum, `{"digest":"` + sum + `","chunkDigest":"` + sum + `"}`,
		sum[:len(sum)-1], "sha256:" + sum, sum[:10] + "G" + sum[11:], `{"a":"sha256:` + fmt.Sprintf("%064X", 0xabcdef) + `"}`,
	} {
		out, sums, err := splitDigests([]byte(text), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		back, rest, restSums, err := joinDigests(out, sums, int64(len(text)))
		if err != nil || string(back) != text || len(rest) > 0 || len(restSums) > 0 {
			t.Errorf("%q becomes %q, %v", text, back, err)
		}
	}
	if _, _, err := splitDigests([]byte("a\x01b"), nil, nil); !errors.Is(err, ErrFormat) {
		t.Errorf("control characters: %v", err)
	}
}

// FuzzReader: whatever comes, it ends within the limits, and without a panic.
func FuzzReader(f *testing.F) {
	fx := image(f)
	m := fx.made(f, 1<<30)
	f.Add(m.Content)
	f.Add(m.Content[:200])
	f.Add([]byte(magic + "\x00\x00\x00\x10\x00\x00\x00\x10"))
	limits := Limits{TOCBytes: 1 << 20, ContentBytes: 4 << 20}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, tocs, chunks, _, err := contents(b, limits)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Error(err)
			}
			return
		}
		var n, k int64
		for _, toc := range tocs {
			n += int64(len(toc))
		}
		for _, c := range chunks {
			k += int64(len(c))
		}
		if n > limits.TOCBytes || k > limits.ContentBytes {
			t.Errorf("%d bytes of TOCs, %d of content", n, k)
		}
	})
}

// FuzzHead goes past the packing, which a fuzzer does not get through.
func FuzzHead(f *testing.F) {
	fx := image(f)
	_, h, err := write(fx.tocs, nil, nil, 1<<30)
	if err != nil {
		f.Fatal(err)
	}
	plain, err := h.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeHead(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Error(err)
			}
			return
		}
		again, err := h.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeHead(again); err != nil {
			t.Error(err)
		}
		_ = h.check(1<<20, Limits{TOCBytes: 1 << 20, ContentBytes: 1 << 20})
	})
}
