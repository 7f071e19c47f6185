package profile

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"

	"github.com/klauspost/compress/flate"
)

const (
	// A zip file ends with the place of its directory, and a comment of up to 64 KiB.
	zipEndBytes  = 22
	zipTailBytes = 64 << 10
	// maxZipDirBytes lists 50,000 files.
	maxZipDirBytes = 4 << 20
	// maxManifestBytes: a Class-Path stands at a manifest's beginning, before the files' own sections.
	maxManifestBytes = 64 << 10

	manifestName = "META-INF/MANIFEST.MF"
)

// zipFile is where a jar has its directory. The standard library's reader makes room for as many files as a jar says that it
// has, and a TOC says how large the jar is.
type zipFile struct {
	e             *Entry
	offset, bytes int64 // of the directory; 0 bytes where there is none, or a huge one
	base          int64 // what its places are counted from: something may stand before a zip file
}

func (p *predictor) readZip(e *Entry) zipFile {
	z := zipFile{e: e}
	from := max(0, e.Size-zipTailBytes-zipEndBytes)
	tail := p.r.at(e, from, e.Size-from)
	at := bytes.LastIndex(tail, []byte("PK\x05\x06"))
	if at < 0 || len(tail)-at < zipEndBytes {
		return z
	}
	n, offset := int64(binary.LittleEndian.Uint32(tail[at+12:])), int64(binary.LittleEndian.Uint32(tail[at+16:]))
	begin := from + int64(at) - n // of the directory: it stands before its end
	if n > maxZipDirBytes || begin < offset {
		return z
	}
	z.offset, z.bytes, z.base = begin, n, begin-offset
	return z
}

// classPath is the Class-Path of the jar's manifest, empty where it has none.
func (z zipFile) classPath(p *predictor) string {
	const recordBytes = 46
	le := binary.LittleEndian
	for d := p.r.at(z.e, z.offset, z.bytes); len(d) >= recordBytes && string(d[:4]) == "PK\x01\x02"; {
		name, extra, comment := int(le.Uint16(d[28:])), int(le.Uint16(d[30:])), int(le.Uint16(d[32:]))
		if len(d) < recordBytes+name+extra+comment {
			return ""
		}
		if string(d[recordBytes:recordBytes+name]) == manifestName {
			return classPathIn(z.content(p, le.Uint16(d[10:]), int64(le.Uint32(d[20:])), z.base+int64(le.Uint32(d[42:]))))
		}
		d = d[recordBytes+name+extra+comment:]
	}
	return ""
}

// content is the beginning of a file, whose header is at offset.
func (z zipFile) content(p *predictor, method uint16, bytesThere, offset int64) []byte {
	const headerBytes = 30
	h := p.r.at(z.e, offset, headerBytes)
	if len(h) < headerBytes || string(h[:4]) != "PK\x03\x04" {
		return nil
	}
	at := offset + headerBytes + int64(binary.LittleEndian.Uint16(h[26:])) + int64(binary.LittleEndian.Uint16(h[28:]))
	b := p.r.at(z.e, at, min(bytesThere, maxManifestBytes))
	if method == 0 { // stored
		return b
	}
	r := flate.NewReader(bytes.NewReader(b))
	content, err := io.ReadAll(io.LimitReader(r, maxManifestBytes))
	if err != nil && len(content) == 0 {
		return nil // no beginning makes sense
	}
	if !p.r.spend(len(content)) {
		return nil
	}
	return content
}

func classPathIn(manifest []byte) string {
	text := strings.ReplaceAll(strings.ReplaceAll(string(manifest), "\r\n", "\n"), "\n ", "") // lines of 72 bytes
	for line := range strings.Lines(text) {
		if list, ok := strings.CutPrefix(line, "Class-Path:"); ok {
			return strings.Clone(list)
		}
	}
	return ""
}
