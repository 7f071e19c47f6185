package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"strconv"
	"sync"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// progressBytes is how much of a blob must have come since the last failure for
// the attempts to be counted from the start again.
const progressBytes = 1 << 20

// blob is one blob of a repository, as a descriptor names it.
type blob struct {
	c    *Client
	r    repo
	desc v1.Descriptor
}

// open starts the download. ErrNotFound when the registry does not have it.
func (b blob) open(ctx context.Context) (io.ReadCloser, error) {
	return b.reader(ctx, &blobReader{end: b.desc.Size, hash: sha256.New()})
}

// openRange starts the download of bytes [offset, offset+lengthBytes), which are not
// checked: only the whole has a digest.
func (b blob) openRange(ctx context.Context, offset, lengthBytes int64) (*blobReader, error) {
	return b.reader(ctx, &blobReader{offset: offset, failedAt: offset, end: min(offset+lengthBytes, b.desc.Size)})
}

// reader connects br, whose range is set.
func (b blob) reader(ctx context.Context, br *blobReader) (*blobReader, error) {
	ctx, cancel := context.WithCancel(ctx)
	br.blob, br.ctx, br.cancel, br.budget = b, ctx, cancel, b.c.budget()
	for {
		err := br.connect()
		if err == nil && b.desc.Size == 0 {
			if err = br.check(); err != nil {
				br.disconnect()
				err = spentError{err}
			}
		}
		if err == nil {
			br.from, br.connected = br.offset, true
			return br, nil
		}
		if err := br.budget.again(ctx, err); err != nil {
			cancel()
			return nil, fmt.Errorf("blob %s@%s: %w", b.r, b.desc.Digest, err)
		}
	}
}

// whole reads a small blob.
func (b blob) whole(ctx context.Context, limitBytes int64) ([]byte, error) {
	if b.desc.Size > limitBytes {
		return nil, accel.Permanent(fmt.Errorf("%w: blob %s@%s has %d bytes, more than %d", accel.ErrInvalid, b.r, b.desc.Digest, b.desc.Size, limitBytes))
	}
	rc, err := b.open(ctx)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// blobReader reads a blob or a range of it, over several connections where one
// breaks. Of a whole blob it returns the last bytes only when the digest is right.
type blobReader struct {
	blob
	ctx    context.Context
	cancel context.CancelFunc // ends a Read that hangs
	hash   hash.Hash          // nil for a range
	budget *budget
	from   int64 // where it began: 0 where a range was asked for of a registry that knows none

	mu sync.Mutex // held by Read and Close, which may come from two goroutines

	body     io.ReadCloser // nil: to be connected
	offset   int64         // of the next byte for the caller
	end      int64         // of the range, exclusive
	failedAt int64         // offset at the latest failure
	unranged bool          // the registry answers ranges wrongly, or with the whole: not asked for again
	err      error         // how it ended

	connected bool // once at least
}

func (b *blobReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.err == nil {
		if b.offset == b.end {
			b.err = io.EOF // checked with the last bytes; an empty blob, when it was opened
			break
		}
		n, err := b.step(p)
		if n > 0 {
			return n, nil
		}
		if err == nil {
			continue
		}
		b.disconnect()
		if b.offset-b.failedAt >= progressBytes {
			b.budget.refill()
		}
		b.failedAt = b.offset
		if err := b.budget.again(b.ctx, err); err != nil {
			b.err = fmt.Errorf("blob %s@%s, at byte %d of %d: %w", b.r, b.desc.Digest, b.offset, b.desc.Size, err)
		}
	}
	return 0, b.err
}

// step reads once from the connection, made anew where there is none.
func (b *blobReader) step(p []byte) (int, error) {
	if b.body == nil {
		if err := b.connect(); err != nil {
			return 0, err
		}
	}
	left := b.end - b.offset
	n, err := b.body.Read(p[:min(int64(len(p)), left)])
	if b.hash != nil {
		b.hash.Write(p[:n])
	}
	if int64(n) == left {
		if err := b.check(); err != nil {
			return 0, spentError{err} // what has been given away cannot be taken back
		}
	}
	b.offset += int64(n)
	switch {
	case n > 0:
		return n, nil // a failure shows again at the next read
	case err == io.EOF:
		return 0, fmt.Errorf("the connection ended early: %w", io.ErrUnexpectedEOF)
	default:
		return 0, err
	}
}

// check compares the bytes that came with the descriptor's digest.
func (b *blobReader) check() error {
	if b.hash == nil {
		return nil
	}
	if got := hex.EncodeToString(b.hash.Sum(nil)); got != b.desc.Digest.Hex {
		return &corruptError{"its content has digest sha256:" + got}
	}
	return nil
}

// connect asks for what is left of the blob.
func (b *blobReader) connect() error {
	req := request{
		method: http.MethodGet,
		url:    b.r.url("blobs/" + b.desc.Digest.String()),
		scopes: b.r.pull(),
		ok:     []int{http.StatusOK, http.StatusPartialContent},
	}
	if (b.offset > 0 || b.end < b.desc.Size) && !b.unranged {
		req.header = map[string]string{"Range": fmt.Sprintf("bytes=%d-%d", b.offset, b.end-1)}
	}
	resp, err := b.c.once(b.ctx, b.r, req)
	if answer := (*responseError)(nil); req.header != nil && errors.As(err, &answer) && answer.answer.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		b.unranged = true
		return b.connect()
	}
	if err != nil {
		return err
	}
	starts, err := b.place(resp)
	if err != nil {
		resp.Body.Close()
		return err
	}
	b.unranged = b.unranged || req.header != nil && resp.StatusCode == http.StatusOK
	switch {
	case starts < b.offset && !b.connected:
		// No ranges here, and nothing was given away yet: the caller gets the whole.
		b.offset, b.failedAt = starts, starts
		fallthrough
	case starts == b.offset && resp.StatusCode == http.StatusOK:
		b.end = b.desc.Size
	case starts < b.offset:
		// What was given away already comes again and is passed over. Were it
		// different this time, the digest at the end would tell.
		if _, err := io.CopyN(io.Discard, resp.Body, b.offset); err != nil {
			resp.Body.Close()
			return fmt.Errorf("pass over the first %d bytes: %w", b.offset, err)
		}
	}
	b.body = resp.Body
	return nil
}

// place says at which byte of the blob an answer starts, and refuses one that is
// not of this blob or not what was asked for.
func (b *blobReader) place(resp *http.Response) (starts int64, err error) {
	if resp.StatusCode == http.StatusOK {
		if resp.ContentLength >= 0 && resp.ContentLength != b.desc.Size {
			return 0, &corruptError{fmt.Sprintf("it has %d bytes, its descriptor says %d", resp.ContentLength, b.desc.Size)}
		}
		return 0, nil
	}
	starts, end, total, ok := contentRange(resp.Header.Get("Content-Range"))
	switch {
	case !ok || starts != b.offset || end < starts || resp.ContentLength >= 0 && resp.ContentLength != end-starts+1:
		b.unranged = true
		return 0, &corruptError{fmt.Sprintf("asked for bytes from %d, got %d bytes as %q", b.offset, resp.ContentLength, resp.Header.Get("Content-Range"))}
	case total >= 0 && total != b.desc.Size:
		return 0, &corruptError{fmt.Sprintf("it has %d bytes, its descriptor says %d", total, b.desc.Size)}
	case end >= b.desc.Size:
		return 0, &corruptError{fmt.Sprintf("it has more than %d bytes, its descriptor says %d", end, b.desc.Size)}
	}
	return starts, nil
}

// contentRange reads a Content-Range header (RFC 9110 section 14.4); end is the last byte's
// place, total -1 where it is not told.
func contentRange(header string) (start, end, total int64, ok bool) {
	var size string
	if n, err := fmt.Sscanf(header, "bytes %d-%d/%s", &start, &end, &size); err != nil || n != 3 || start < 0 {
		return 0, 0, 0, false
	}
	if size == "*" {
		return start, end, -1, true
	}
	total, err := strconv.ParseInt(size, 10, 64)
	return start, end, total, err == nil && total > end
}

func (b *blobReader) disconnect() {
	if b.body != nil {
		b.body.Close()
		b.body = nil
	}
}

// Close ends the download. It may be called while a Read runs, and more than once.
func (b *blobReader) Close() error {
	b.cancel()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.disconnect()
	if b.err == nil {
		b.err = fmt.Errorf("blob %s@%s: read after close", b.r, b.desc.Digest)
	}
	return nil
}
