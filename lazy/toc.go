package lazy

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"accel"
	"accel/internal/deflate"
	"accel/registry"

	"github.com/containerd/stargz-snapshotter/estargz"
	fastgzip "github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
)

const (
	// tailBytes is what is asked for of a blob whose TOC's place is not known, in the hope that all of
	// the TOC is in it: one percent of the blob, within these bounds.
	minTailBytes, maxTailBytes = 64 << 10, 4 << 20
)

// errTOC: the TOC is not what the manifest or the mapping says, or is malformed.
var errTOC = errors.New("malformed table of contents")

// tocMemory is what one layer's TOC holds of the memory for all that are being unpacked: some hostile ones of
// the largest size at once would be gigabytes.
type tocMemory struct {
	all  *semaphore.Weighted
	held int64
}

// take waits for memory for a TOC, in the place of one before.
func (m *tocMemory) take(ctx context.Context, bytes int64) error {
	m.release()
	if err := m.all.Acquire(ctx, bytes); err != nil {
		return fmt.Errorf("memory for a table of contents of %d bytes: %w", bytes, err)
	}
	m.held = bytes
	return nil
}

func (m *tocMemory) release() {
	m.all.Release(m.held)
	m.held = 0
}

// toc fetches a layer's TOC: as it is in the blob, as JSON that was checked against its digest, and its
// place. The JSON is in memory, which the caller releases. snapshot.Declined where the registry knows no ranges.
func (l *Lazy) toc(ctx context.Context, source *registry.Source, d digest.Digest, o origin, memory *tocMemory) (packed, json []byte, offset int64, err error) {
	offset = o.TOCOffset
	if offset >= 0 {
		packed, err = l.ranged(ctx, source, d, o.SizeBytes, offset)
	} else {
		packed, offset, err = l.tail(ctx, source, d, o.SizeBytes)
	}
	if err != nil {
		return nil, nil, 0, fmt.Errorf("table of contents of layer %s: %w", d, err)
	}
	json, err = unpackTOC(packed, func(bytes int64) error { return memory.take(ctx, bytes) })
	if err != nil {
		return nil, nil, 0, fmt.Errorf("layer %s: %w", d, err)
	}
	if got := o.TOCDigest.Algorithm().FromBytes(json); got != o.TOCDigest {
		return nil, nil, 0, fmt.Errorf("layer %s: %w: its digest is %s, not %s", d, errTOC, got, o.TOCDigest)
	}
	return packed, json, offset, nil
}

// bundledTOC takes a TOC from a bundle, which has it as JSON alone (packed is nil then), or fetches it as ever.
func (l *Lazy) bundledTOC(ctx context.Context, b *boot, d digest.Digest, o origin, memory *tocMemory) (packed, json []byte, offset int64, err error) {
	if o.TOCOffset >= 0 {
		if json := b.toc(ctx, o.TOCDigest); json != nil && o.TOCDigest.Algorithm().FromBytes(json) == o.TOCDigest {
			return nil, json, o.TOCOffset, nil
		}
	}
	return l.fetchTOC(ctx, d, o, memory)
}

// packTOC is the inverse of unpackTOC. It is fast rather than small.
func packTOC(json []byte) ([]byte, error) {
	var packed bytes.Buffer
	zw, err := fastgzip.NewWriterLevel(&packed, fastgzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(zw)
	err = tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.TOCTarName, Size: int64(len(json))})
	if err == nil {
		_, err = tw.Write(json)
	}
	if err = errors.Join(err, tw.Close(), zw.Close()); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

// tail finds the TOC by the blob's footer.
func (l *Lazy) tail(ctx context.Context, source *registry.Source, d digest.Digest, sizeBytes int64) ([]byte, int64, error) {
	from := max(0, sizeBytes-min(max(sizeBytes/100, minTailBytes), maxTailBytes))
	end, err := l.ranged(ctx, source, d, sizeBytes, from)
	if err != nil {
		return nil, 0, err
	}
	offset, err := tocOffset(end, sizeBytes)
	if err != nil {
		return nil, 0, err
	}
	if offset >= from {
		return end[offset-from:], offset, nil
	}
	end, err = l.ranged(ctx, source, d, sizeBytes, offset)
	return end, offset, err
}

// tocOffset reads a footer: an empty gzip member whose extra field holds 16 hexadecimal digits and
// "STARGZ" (stargz-snapshotter's docs/estargz.md, "Footer").
func tocOffset(end []byte, sizeBytes int64) (int64, error) {
	const head = 16 // a gzip header with an extra field, and the subfield's own
	if len(end) < estargz.FooterSize {
		return 0, fmt.Errorf("%w: no footer", errTOC)
	}
	footer := end[len(end)-estargz.FooterSize:]
	if footer[0] != 0x1f || footer[1] != 0x8b || string(footer[12:14]) != "SG" || string(footer[head+16:head+22]) != "STARGZ" {
		return 0, fmt.Errorf("%w: no eStargz footer", errTOC)
	}
	offset, err := strconv.ParseInt(string(footer[head:head+16]), 16, 64)
	if err != nil || offset < 0 || offset >= sizeBytes-estargz.FooterSize {
		return 0, fmt.Errorf("%w: the footer says that it is at %q", errTOC, footer[head:head+16])
	}
	return offset, nil
}

// ranged brings a blob's bytes from offset to its end.
func (l *Lazy) ranged(ctx context.Context, source *registry.Source, d digest.Digest, sizeBytes, offset int64) ([]byte, error) {
	n := sizeBytes - offset
	if n <= 0 || n > accel.MaxPackedTOCBytes {
		return nil, fmt.Errorf("%w: of %d bytes", errTOC, n)
	}
	r, err := l.blob(ctx, source, d, sizeBytes, offset, n, false)
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	_, err = io.ReadFull(r, b)
	return b, errors.Join(err, r.Close())
}

// unpackTOC takes the JSON out of the gzip member and its tar entry. fits, which may be nil, is told its size before memory is
// taken for it.
func unpackTOC(packed []byte, fits func(bytes int64) error) ([]byte, error) {
	tr := tar.NewReader(deflate.NewReader(bytes.NewReader(packed)))
	h, err := tr.Next()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errTOC, err)
	}
	if h.Name != estargz.TOCTarName || h.Size <= 0 || h.Size > accel.MaxTOCBytes {
		return nil, fmt.Errorf("%w: %q of %d bytes", errTOC, h.Name, h.Size)
	}
	if fits != nil {
		if err := fits(h.Size); err != nil {
			return nil, err
		}
	}
	json := bytes.NewBuffer(make([]byte, 0, min(h.Size, int64(len(packed))*1032+512))) // deflate packs 1032:1 at most
	if _, err := io.Copy(json, io.LimitReader(tr, h.Size)); err != nil {
		return nil, fmt.Errorf("%w: %w", errTOC, err)
	}
	return json.Bytes(), nil
}
