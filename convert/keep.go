package convert

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

// maxFirstMemberBytes bounds what looksLikeEstargz inflates.
const maxFirstMemberBytes = 8 << 20

// Bounds of the TOC of a layer that claims to have one, as JSON. The stock
// library has none of its own, and takes about 350 bytes of memory for each
// entry, be it as short as "{}": hence they are below accel.MaxTOCBytes. Beyond them a layer is converted again.
const (
	maxTOCBytes   = 64 << 20
	maxTOCEntries = 1 << 19
)

// looksLikeEstargz reports whether a blob that begins with head is worth a look
// at its end: the first gzip member of an eStargz layer ends where the first
// file's content begins, and so after whole tar headers, and another follows.
// A layer made by gzip(1) is a single member.
func looksLikeEstargz(head []byte) bool {
	r := bytes.NewReader(head)
	zr, err := gzip.NewReader(r)
	if err != nil {
		return false
	}
	zr.Multistream(false)
	n, err := io.CopyN(io.Discard, zr, maxFirstMemberBytes)
	return errors.Is(err, io.EOF) && n > 0 && n%tarBlock == 0 && bytes.HasPrefix(head[len(head)-r.Len():], gzipMagic)
}

// keep looks whether the blob in f is eStargz that can stay as it is. The TOC is
// what a node mounts, and the mapping that we sign says that it is the source's
// tree: so the stock library must be able to verify it, and every name in it and
// every chunk's digest must be what the tar holds. memo is nil for a layer that
// is to be converted.
func (r *run) keep(ctx context.Context, j *job, f *os.File, sizeBytes int64) (memo *LayerMemo, err error) {
	sr := io.NewSectionReader(f, 0, sizeBytes)
	tocOffset, ok := readFooter(sr)
	if !ok || !bounded(sr, tocOffset) {
		return nil, nil
	}
	// The stock library panics on some TOCs that nobody writes but to that end.
	defer func() {
		if p := recover(); p != nil {
			r.Log.Info("a layer's TOC is malformed; the layer is converted", "layer", j.source, "error", p)
			memo, err = nil, nil
		}
	}()
	z, err := estargz.Open(sr)
	if err != nil {
		return nil, nil
	}
	want := z.TOCDigest()
	if a := j.annotations[estargz.TOCJSONDigestAnnotation]; a != "" {
		want = digest.Digest(a)
	}
	if _, err := z.VerifyTOC(want); err != nil {
		r.Log.Info("a layer's TOC does not hold; the layer is converted", "layer", j.source, "error", err)
		return nil, nil
	}
	uncompressed, why, err := r.compareTOC(ctx, j, z, sr)
	if err != nil {
		return nil, err
	}
	if why != "" {
		r.Log.Info("a layer's TOC is not what its tar holds; the layer is converted", "layer", j.source, "why", why)
		return nil, nil
	}
	if err := j.count(uncompressed); err != nil {
		return nil, err
	}
	return &LayerMemo{
		Target: j.source, TargetBytes: sizeBytes,
		SourceDiffID: j.diffID, DiffID: j.diffID,
		TOCDigest: want, TOCOffset: tocOffset,
		UncompressedBytes: uncompressed, SourceUncompressedBytes: uncompressed,
	}, nil
}

// readFooter finds the TOC as footer has it. The stock library's own function
// would do, but for a footer that makes it panic.
func readFooter(sr *io.SectionReader) (tocOffset int64, ok bool) {
	b := make([]byte, estargz.FooterSize)
	if _, err := sr.ReadAt(b, sr.Size()-int64(len(b))); err != nil {
		return 0, false
	}
	tocOffset, err := strconv.ParseInt(string(b[footerHex:footerHex+16]), 16, 64)
	return tocOffset, err == nil && tocOffset >= 0 && tocOffset < sr.Size() && bytes.Equal(b, footer(tocOffset))
}

// bounded reports whether the TOC is one that may be read into memory.
func bounded(sr *io.SectionReader, tocOffset int64) bool {
	zr, err := gzip.NewReader(bufio.NewReader(io.NewSectionReader(sr, tocOffset, sr.Size()-tocOffset)))
	if err != nil {
		return false
	}
	zr.Multistream(false)
	entries, total := 0, 0
	for b := make([]byte, 32<<10); ; {
		n, err := zr.Read(b)
		total += n
		entries += bytes.Count(b[:n], []byte("{"))
		if total > maxTOCBytes || entries > maxTOCEntries {
			return false
		}
		if err != nil {
			return errors.Is(err, io.EOF)
		}
	}
}

// compareTOC says in words where TOC and tar differ, or "".
func (r *run) compareTOC(ctx context.Context, j *job, z *estargz.Reader, sr *io.SectionReader) (uncompressed int64, why string, err error) {
	src := newSource(sr, nil)
	stream, err := src.tarStream()
	if err != nil {
		return 0, "", err
	}
	defer stream.Close()
	h := sha256.New()
	all := &counter{h: h}
	tee := io.TeeReader(stream, all)
	t := newTree()
	bad := map[*entry]bool{} // files whose chunks are not what the TOC says
	tr := tar.NewReader(tee)
	for seq := 0; ; seq++ {
		if ctx.Err() != nil {
			return 0, "", context.Cause(ctx)
		}
		if all.n > r.Policy.MaxUncompressedBytes || seq > maxEntries {
			return 0, "it is too large", nil // conversion will say so
		}
		head, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, "tar: " + err.Error(), nil
		}
		e, err := newEntry(head, seq)
		if err != nil {
			return 0, err.Error(), nil
		}
		if e == nil || reserved[clean(e.name)] {
			continue
		}
		if e.kind == tar.TypeReg {
			ok, err := readChunks(tr, e, z)
			if err != nil {
				return 0, "tar: " + err.Error(), nil
			}
			bad[e] = !ok
		}
		if err := t.add(e); err != nil {
			return 0, err.Error(), nil
		}
	}
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return 0, err.Error(), nil
	}
	if err := t.finish(); err != nil {
		return 0, err.Error(), nil
	}
	if got := digestOf(sum(h.Sum(nil))); got != j.diffID {
		return 0, fmt.Sprintf("its uncompressed digest is %s, the image config says %s", got, j.diffID), nil
	}
	other, err := treeOf(z)
	if err != nil {
		return 0, err.Error(), nil
	}
	if d := diffTrees(t, other, tocTolerance); len(d) > 0 {
		return 0, d[0].String(), nil
	}
	t.root.each(func(n *node) {
		if n.own != nil && bad[n.inode.entry] {
			why = fmt.Sprintf("%q: a chunk's digest is not its content's", n.path())
		}
	})
	return all.n, why, nil
}

// readChunks reads a file's content and reports whether the TOC's chunks of it
// have the digests that the TOC says. It sets e.content.
func readChunks(r io.Reader, e *entry, z *estargz.Reader) (ok bool, err error) {
	whole := sha256.New()
	ok = true
	for at := int64(0); at < e.size; {
		n := e.size - at
		c, found := z.ChunkEntryForOffset(e.name, at)
		if ok = ok && found && c.ChunkOffset == at && c.ChunkSize > 0 && c.ChunkSize <= n; ok {
			n = c.ChunkSize
		}
		part := sha256.New()
		if _, err := io.CopyN(io.MultiWriter(whole, part), r, n); err != nil {
			return false, err
		}
		ok = ok && c.ChunkDigest == digestOf(sum(part.Sum(nil))).String()
		at += n
	}
	whole.Sum(e.content[:0])
	return ok, nil
}

// treeOf is the file tree that a TOC describes.
func treeOf(z *estargz.Reader) (*tree, error) {
	t := newTree()
	seen := map[*estargz.TOCEntry]*inode{}
	var fill func(n *node, e *estargz.TOCEntry) error
	fill = func(n *node, e *estargz.TOCEntry) error {
		if n.depth > maxDepth {
			return errors.New("TOC: too deep")
		}
		var err error
		e.ForeachChild(func(name string, c *estargz.TOCEntry) bool {
			if n.parent == nil && reserved[name] {
				return true
			}
			in := seen[c]
			if in == nil {
				var own *entry
				if own, err = entryOf(c); err != nil {
					return false
				}
				in = &inode{entry: own}
				seen[c] = in
			} else {
				in.linked = true
			}
			child := n.add(name, in, in.entry)
			if in.kind == tar.TypeDir {
				err = fill(child, c)
			}
			return err == nil
		})
		return err
	}
	root, ok := z.Lookup("")
	if !ok {
		return t, nil
	}
	own, err := entryOf(root)
	if err != nil {
		return nil, err
	}
	t.root.set(own)
	return t, fill(t.root, root)
}

func entryOf(e *estargz.TOCEntry) (*entry, error) {
	out := &entry{
		name: e.Name, link: e.LinkName, size: e.Size,
		major: int64(e.DevMajor), minor: int64(e.DevMinor),
		meta: meta{mode: e.Mode, uid: e.UID, gid: e.GID, uname: e.Uname, gname: e.Gname, mtime: seconds(e.ModTime())},
	}
	for kind, name := range tocTypes {
		if name == e.Type {
			out.kind = kind
		}
	}
	if out.kind == 0 {
		return nil, fmt.Errorf("TOC: %q has type %q", e.Name, e.Type)
	}
	for k, v := range e.Xattrs {
		if out.xattrs == nil {
			out.xattrs = map[string]string{}
		}
		out.xattrs[k] = string(v)
	}
	if out.kind == tar.TypeReg {
		d, err := digest.Parse(e.Digest)
		if err != nil || d.Algorithm() != digest.SHA256 {
			return nil, fmt.Errorf("TOC: %q has digest %q", e.Name, e.Digest)
		}
		if _, err := hex.Decode(out.content[:], []byte(d.Encoded())); err != nil {
			return nil, fmt.Errorf("TOC: digest of %q: %w", e.Name, err)
		}
	}
	return out, nil
}
