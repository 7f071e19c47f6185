package lazyfs

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"testing"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// FuzzBuild: whatever the TOC is, there is an error of the two kinds, or files that
// are well formed; and the TOC is read as encoding/json does it.
func FuzzBuild(f *testing.F) {
	for _, z := range []esgz{stock(f, tarOf(everything()...), estargz.WithChunkSize(300_000)), ours(f, tarOf(aDir("d"), aFile("d/.wh.x", ""), aLink("l", "f"), aFile("f", "content")))} {
		f.Add(z.toc, z.tocOffset)
	}
	f.Add([]byte(`{"version":1,"entries":[{"name":"d/.wh..wh..opq","type":"reg"},{"name":"a","type":"hardlink","linkName":"b"},{"name":"b","type":"symlink","linkName":"\u00e4"},{"name":"d","type":"dir","xattrs":{"user.k":"dg=="}}]}`), int64(100))
	f.Fuzz(func(t *testing.T, toc []byte, tocOffset int64) {
		sameAsJSON(t, toc)
		l, err := Build(toc, tocOffset)
		if err != nil {
			if !errors.Is(err, accel.ErrInvalid) && !errors.Is(err, ErrUnsupported) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		var meta, table bytes.Buffer
		if l.image.sizeBytes > int64(len(toc))*20+1<<20 {
			t.Fatalf("%d bytes of metadata from %d bytes", l.image.sizeBytes, len(toc))
		}
		must(l.image.writeImage(&meta))
		must(writeTable(&table, l.dataBytes, len(l.chunks), func(i int) accel.Chunk { return l.chunks[i] }))
		if int64(meta.Len()) != l.image.sizeBytes {
			t.Fatalf("metadata of %d bytes, planned %d", meta.Len(), l.image.sizeBytes)
		}
		parsed, err := parseTable(table.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		for i := range parsed.Len() {
			c := parsed.At(i)
			if c.BlobOffset+c.BlobBytes > tocOffset || parsed.Find(c.DataOffset) != i || parsed.Find(c.DataOffset+c.Bytes-1) != i {
				t.Fatalf("chunk %d: %+v", i, c)
			}
		}
	})
}

// sameAsJSON: what we take encoding/json takes, and reads the same from it. We are
// stricter: keys are spelled as the format has them, and nothing follows the TOC.
func sameAsJSON(t *testing.T, toc []byte) {
	t.Helper()
	var ours []tocEntry
	err := decodeTOC(toc, func(e *tocEntry) error { ours = append(ours, *e); return nil })
	if err != nil {
		return
	}
	var theirs map[string]json.RawMessage // by their exact keys, which a struct's fields would not ask for
	d := json.NewDecoder(bytes.NewReader(toc))
	if err := d.Decode(&theirs); err != nil {
		t.Fatalf("taken, but encoding/json says: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		t.Fatal("something behind the TOC")
	}
	var entries []json.RawMessage
	if raw := theirs["entries"]; raw != nil {
		must(json.Unmarshal(raw, &entries))
	}
	if len(entries) != len(ours) {
		t.Fatalf("%d entries, encoding/json has %d", len(ours), len(entries))
	}
	for i, raw := range entries {
		var fields map[string]json.RawMessage
		if json.Unmarshal(raw, &fields) != nil {
			continue
		}
		for key, got := range map[string]any{
			"name": string(ours[i].name), "linkName": string(ours[i].linkName), "type": string(ours[i].kind),
			"size": ours[i].size, "offset": ours[i].offset, "uid": ours[i].uid,
		} {
			text, ok := fields[key]
			if !ok {
				continue
			}
			switch got := got.(type) {
			case string:
				var want string
				if err := json.Unmarshal(text, &want); err != nil || got != want {
					t.Fatalf("%s: %q, encoding/json has %q, %v", key, got, want, err)
				}
			case int64:
				var want int64
				if err := json.Unmarshal(text, &want); err != nil || got != want {
					t.Fatalf("%s: %d, encoding/json has %d, %v", key, got, want, err)
				}
			}
		}
	}
}

func FuzzTable(f *testing.F) {
	f.Add(tableBytes(12288, chunks), int64(5000))
	f.Fuzz(func(t *testing.T, file []byte, at int64) {
		if len(file) < tableHeaderBytes {
			return
		}
		sealed := sealTable(file)
		for _, b := range [][]byte{file, sealed} {
			table, err := parseTable(b)
			if err != nil {
				if !errors.Is(err, ErrDamaged) {
					t.Fatal(err)
				}
				continue
			}
			if i := table.Find(at); i >= 0 {
				if c := table.At(i); at < c.DataOffset || at >= c.DataOffset+c.Bytes {
					t.Fatalf("byte %d is not in %+v", at, c)
				}
			}
		}
	})
}

// sealTable makes the checksums right, so that the rest is looked at too.
func sealTable(file []byte) []byte {
	b := bytes.Clone(file[:tableHeaderBytes+(len(file)-tableHeaderBytes)/recordBytes*recordBytes])
	le := binary.LittleEndian
	copy(b, tableMagic)
	le.PutUint32(b[8:], tableVersion)
	le.PutUint32(b[12:], recordBytes)
	le.PutUint64(b[16:], uint64((len(b)-tableHeaderBytes)/recordBytes))
	le.PutUint32(b[32:], crc32.Checksum(b[tableHeaderBytes:], castagnoli))
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}
