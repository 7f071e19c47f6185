package convert

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

// toc is a layer's table of contents while it is still in pieces.
type toc struct {
	names      []named
	chunks     []chunk
	chunkBytes int64
}

// encode writes the JSON. It is made twice, once for its length, which a tar
// header wants first, and once for the blob: that takes less than the memory for
// the TOC of a large layer would be worth.
func (t *toc) encode(w io.Writer) error {
	bw := bufio.NewWriterSize(w, 64<<10)
	fmt.Fprint(bw, `{"version":1,"entries":[`)
	users, groups := owners{}, owners{}
	separator := ""
	put := func(e *estargz.TOCEntry) error {
		raw, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("TOC entry of %q: %w", e.Name, err)
		}
		fmt.Fprint(bw, separator)
		separator = ","
		_, err = bw.Write(raw)
		return err
	}
	for _, n := range t.names {
		e := n.toTOC()
		e.Uname, e.Gname = users.first(n.uid, n.uname), groups.first(n.gid, n.gname)
		if n.linkTo != "" || n.kind != tar.TypeReg {
			if err := put(e); err != nil {
				return err
			}
			continue
		}
		if err := t.putFile(e, n, put); err != nil {
			return err
		}
	}
	fmt.Fprint(bw, `]}`)
	return bw.Flush()
}

// putFile writes a regular file: its entry has the first chunk, "chunk" entries
// the others.
func (t *toc) putFile(e *estargz.TOCEntry, n named, put func(*estargz.TOCEntry) error) error {
	content := n.content
	if n.size > 0 && n.size <= t.chunkBytes {
		content = t.chunks[n.firstChunk].digest
	}
	e.Digest = digestOf(content).String()
	for i, at := n.firstChunk, int64(0); at < n.size; i++ {
		e.Offset, e.ChunkOffset = t.chunks[i].offset, at
		e.ChunkDigest = digestOf(t.chunks[i].digest).String()
		if n.size-at >= t.chunkBytes { // else: to the end of the file
			e.ChunkSize = t.chunkBytes
		}
		if err := put(e); err != nil {
			return err
		}
		at += t.chunkBytes
		e = &estargz.TOCEntry{Name: e.Name, Type: "chunk"}
	}
	if n.size == 0 {
		return put(e)
	}
	return nil
}

// toTOC is the entry without what depends on the layout.
func (n named) toTOC() *estargz.TOCEntry {
	m := n.meta
	e := &estargz.TOCEntry{
		Name: n.own.name, Mode: m.mode, UID: m.uid, GID: m.gid,
		ModTime3339: time.Unix(m.mtime, 0).UTC().Format(time.RFC3339),
		Size:        n.size, LinkName: n.link,
		DevMajor: int(n.major), DevMinor: int(n.minor),
	}
	if clean(e.Name) != n.path {
		e.Name = n.path // its parent was a symlink
	}
	for k, v := range m.xattrs {
		if e.Xattrs == nil {
			e.Xattrs = map[string][]byte{}
		}
		e.Xattrs[k] = []byte(v)
	}
	if n.linkTo != "" {
		e.Type, e.Size, e.LinkName, e.DevMajor, e.DevMinor = "hardlink", 0, n.linkTo, 0, 0
		if clean(n.own.link) == n.linkTo {
			e.LinkName = n.own.link
		}
		return e
	}
	e.Type = tocTypes[n.kind]
	return e
}

var tocTypes = map[byte]string{
	tar.TypeReg: "reg", tar.TypeDir: "dir", tar.TypeSymlink: "symlink",
	tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeFifo: "fifo",
}

// owners gives a name with the first entry of its number only, as the format
// has it.
type owners map[int]string

func (o owners) first(id int, name string) string {
	if name == "" || o[id] == name {
		return ""
	}
	o[id] = name
	return name
}

// written is what a TOC's writing told.
type written struct {
	digest  digest.Digest // of the JSON
	offset  int64         // of its gzip member in the blob
	tarSize int64         // bytes that it added to the tar stream
}

// write ends the blob with the TOC and the footer, and the tar stream, which
// diffID is of, with the TOC as its last entry.
func (t *toc) write(b *blob, level int, diffID hash.Hash) (written, error) {
	count := &counter{h: sha256.New()}
	if err := t.encode(count); err != nil {
		return written{}, err
	}
	w := written{digest: digestOf(sum(count.h.Sum(nil))), offset: b.n}
	z, err := gzip.NewWriterLevel(b, level)
	if err != nil {
		return written{}, err
	}
	out := &counter{h: diffID}
	tw := tar.NewWriter(io.MultiWriter(z, out))
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.TOCTarName, Size: count.n}); err != nil {
		return written{}, err
	}
	if err := t.encode(tw); err != nil {
		return written{}, err
	}
	if err := tw.Close(); err != nil {
		return written{}, err
	}
	if err := z.Close(); err != nil {
		return written{}, err
	}
	w.tarSize = out.n
	_, err = b.Write(footer(w.offset))
	return w, err
}

// footerHex is where a footer has the offset: after gzip's header of 10 bytes,
// the extra field's length and the subfield's name and length.
const footerHex = 16

// footer is the empty gzip member whose extra field says where the TOC is.
func footer(tocOffset int64) []byte {
	field := fmt.Sprintf("%016xSTARGZ", tocOffset)
	extra := binary.LittleEndian.AppendUint16([]byte("SG"), uint16(len(field)))
	return estargz.CreateGzipFooter(append(extra, field...))
}

type counter struct {
	h hash.Hash
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.h.Write(p)
}

func digestOf(s sum) digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(s[:]))
}
