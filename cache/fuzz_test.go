package cache

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// FuzzRows: whatever a row's content is, reading it gives an error or something that is
// written and read again as the same.
func FuzzRows(f *testing.F) {
	parts := newBitmap(70)
	parts.set(0)
	parts.set(69)
	f.Add((&blobRow{size: 70 * mib, allocated: 2 * mib, seq: 5, usedAt: 7, visited: true, parts: parts}).encode())
	f.Add((&blobRow{size: 1, allocated: 4096, seq: 5, complete: true}).encode())
	f.Add(datedRow{seq: 3, digest: digest.FromString("x"), at: time.Unix(1, 2)}.encode())
	f.Add(manifestRow{seq: 3, mediaType: "application/x", raw: []byte("{}")}.encode())
	f.Add(encodePins([]digest.Digest{digest.FromString("x"), digest.SHA512.FromString("y")}))
	info := layerInfo{chunks: 70, dataBytes: 70 * mib, files: [3]fileInfo{{1, 2}, {3, 4}, {5, 6}}}
	f.Add((&layerRow{info: info, allocated: mib, seq: 5, usedAt: 7, visited: true, complete: true}).encode())
	f.Add(encodeMarks(parts.segment(0, 70)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeBlob(b); err == nil {
			again, err := decodeBlob(r.encode())
			if err != nil || !bytes.Equal(again.encode(), r.encode()) {
				t.Errorf("blob %+v becomes %+v, %v", r, again, err)
			}
			if !r.complete && (r.parts.count() > partsOf(r.size) || int64(len(r.parts))*64 < partsOf(r.size)) {
				t.Errorf("blob %+v", r)
			}
		}
		if r, err := decodeLayer(b); err == nil {
			if again, err := decodeLayer(r.encode()); err != nil || again != r {
				t.Errorf("layer %+v becomes %+v, %v", r, again, err)
			}
		}
		if m, err := decodeMarks(b, 70); err == nil {
			if again, err := decodeMarks(encodeMarks(m, 70), 70); m.count() > 0 && (err != nil || !slices.Equal(m, again)) {
				t.Errorf("marks %v become %v, %v", m, again, err)
			}
		}
		if r, err := decodeDated(b); err == nil {
			again, err := decodeDated(r.encode())
			if err != nil || again != r && r.at.UnixNano() != 0 {
				t.Errorf("%+v becomes %+v, %v", r, again, err)
			}
		}
		if r, err := decodeManifest(b); err == nil {
			again, err := decodeManifest(r.encode())
			if err != nil || again.seq != r.seq || again.mediaType != r.mediaType || !bytes.Equal(again.raw, r.raw) {
				t.Errorf("manifest %+v becomes %+v, %v", r, again, err)
			}
		}
		if all, err := decodePins(b); err == nil {
			for _, d := range all {
				if d.Validate() != nil {
					t.Errorf("pin of %q", d)
				}
			}
		}
	})
}

// FuzzKeys: a digest from outside is refused or comes back from its key; a changed row or
// one under another key is refused.
func FuzzKeys(f *testing.F) {
	f.Add(string(digest.FromString("x")), []byte("content"), 3)
	f.Add(string(digest.SHA512.FromString("x")), []byte{}, 0)
	f.Add("sha256:../../x", []byte{1}, 100)
	f.Fuzz(func(t *testing.T, text string, content []byte, at int) {
		if key, err := keyOf(digest.Digest(text)); err == nil {
			if d, err := digestOf(key); err != nil || string(d) != text {
				t.Errorf("%q has key %x, which is of %q, %v", text, key, d, err)
			}
		}
		if d, err := digestOf(text); err == nil {
			if key, err := keyOf(d); err != nil || key != text {
				t.Errorf("key %x is of %q, which has %x, %v", text, d, key, err)
			}
		}
		row := sealRow(tableTags, text, content)
		if got, err := openRow(tableTags, text, row); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%v", err)
		}
		if at >= 0 && at < len(row) {
			row[at] ^= 0x10
			if _, err := openRow(tableTags, text, row); err == nil {
				t.Errorf("a row with byte %d changed", at)
			}
		}
	})
}
