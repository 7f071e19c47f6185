package mirror

import (
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"strings"

	"accel"
	"accel/cache"
)

// peekBytes are read before the answer begins, so that an error of upstream is still
// told by its status.
const peekBytes = 32 << 10

const octets = "application/octet-stream"

func (x *exchange) blob() error {
	d := x.q.digest
	// What is answered without reading the blob is answered only where this repository
	// is known to hold it.
	bare := x.r.Method == http.MethodHead || x.r.Header.Get("If-None-Match") != ""
	known, err := x.blobAccess(x.r.Context(), d, bare)
	if err != nil {
		return err
	}
	x.content(d, octets, known.note)
	x.w.Header().Set("Accept-Ranges", "bytes")
	if x.unchanged(d) {
		return nil
	}
	if x.r.Method == http.MethodHead {
		x.start(http.StatusOK, known.sizeBytes)
		return nil
	}
	var spans []span
	if header := x.r.Header.Get("Range"); header != "" && x.rangeHolds() {
		if spans, err = parseRange(header, known.sizeBytes); err != nil {
			if _, err := x.blobAccess(x.r.Context(), d, true); err != nil {
				return err
			}
			x.w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", known.sizeBytes))
			return refuse(http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID", "%v of %d bytes: %q", err, known.sizeBytes, header)
		}
	}
	f := &fetcher{access: x.access, digest: d, sizeBytes: known.sizeBytes}
	defer func() {
		if f.unranged.Load() && x.transfer.Tally.RegistryBytes > 0 {
			x.note("the registry knows no ranges")
		}
	}()
	first := span{0, known.sizeBytes}
	if len(spans) > 0 {
		first = spans[0]
	}
	p, err := x.open(f, known, first)
	if err != nil {
		return err
	}
	switch len(spans) {
	case 0:
		x.start(http.StatusOK, known.sizeBytes)
		err = p.copyTo(x, x.sink())
	case 1:
		x.w.Header().Set("Content-Range", first.contentRange(known.sizeBytes))
		x.start(http.StatusPartialContent, first.lengthBytes)
		err = p.copyTo(x, x.sink())
	default:
		err = x.multipart(f, known, p, spans)
	}
	x.transfer.Complete = err == nil
	return x.cut(err)
}

// rangeHolds: an If-Range that names other content voids the Range.
func (x *exchange) rangeHolds() bool {
	tag := x.r.Header.Get("If-Range")
	return tag == "" || tag == `"`+x.q.digest.String()+`"`
}

// part is a range that is being served: bytes that were read ahead, and the rest.
type part struct {
	reader *cache.Reader
	ahead  []byte
}

// open opens a range. Nothing of it leaves before this repository is known to hold the
// blob: either upstream was asked by f just now, or it is asked here.
func (x *exchange) open(f *fetcher, known blobAccess, s span) (part, error) {
	ctx := x.r.Context()
	reader, err := x.m.o.Store.OpenBlob(ctx, accel.BlobDescriptor{Digest: f.digest, SizeBytes: known.sizeBytes}, s.offset, s.lengthBytes, f)
	if err != nil {
		return part{}, err
	}
	p := part{reader: reader}
	if known.complete && known.proven {
		return p, nil
	}
	ahead := make([]byte, min(peekBytes, s.lengthBytes))
	n, err := reader.Read(ahead)
	if err != nil && !errors.Is(err, io.EOF) {
		p.close(x)
		return part{}, err
	}
	p.ahead = ahead[:n]
	if !known.proven {
		if _, err := x.blobAccess(ctx, f.digest, true); err != nil {
			p.close(x)
			return part{}, err
		}
	}
	return p, nil
}

// copyTo sends the part and closes it.
func (p part) copyTo(x *exchange, w io.Writer) error {
	defer p.close(x)
	if len(p.ahead) > 0 {
		if _, err := w.Write(p.ahead); err != nil {
			return err
		}
	}
	_, err := p.reader.WriteTo(w)
	return err
}

func (p part) close(x *exchange) {
	_ = p.reader.Close()
	x.transfer.Tally.Add(p.reader.Tally())
}

// multipart sends several ranges (RFC 9110 section 14.6).
func (x *exchange) multipart(f *fetcher, known blobAccess, first part, spans []span) error {
	header := func(s span) textproto.MIMEHeader {
		return textproto.MIMEHeader{"Content-Type": {octets}, "Content-Range": {s.contentRange(known.sizeBytes)}}
	}
	sink := x.sink()
	out := multipart.NewWriter(sink)
	length, err := multipartBytes(out.Boundary(), header, spans)
	if err != nil {
		first.close(x)
		return err
	}
	x.w.Header().Set("Content-Type", "multipart/byteranges; boundary="+out.Boundary())
	x.start(http.StatusPartialContent, length)
	for i, s := range spans {
		p := first
		if i > 0 {
			if p, err = x.open(f, known, s); err != nil {
				return err
			}
		}
		to, err := out.CreatePart(header(s))
		if err != nil {
			p.close(x)
			return err
		}
		if err := p.copyTo(x, to); err != nil {
			return err
		}
	}
	return out.Close()
}

// multipartBytes is how long such an answer is.
func multipartBytes(boundary string, header func(span) textproto.MIMEHeader, spans []span) (int64, error) {
	var text strings.Builder
	out := multipart.NewWriter(&text)
	err := out.SetBoundary(boundary)
	var content int64
	for _, s := range spans {
		_, partErr := out.CreatePart(header(s))
		err = errors.Join(err, partErr)
		content += s.lengthBytes
	}
	err = errors.Join(err, out.Close())
	return content + int64(text.Len()), err
}
