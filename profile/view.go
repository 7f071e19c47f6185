package profile

import (
	"context"
	"fmt"
	"io"
)

// View is an image's files with their content.
type View struct {
	Tree *Tree
	// Read returns n bytes at offset of a regular file of that layer; fewer only at
	// the file's end. Reads are small, and mostly follow each other in a file.
	Read func(ctx context.Context, layer int, e *Entry, offset, n int64) ([]byte, error)
}

const (
	// maxReadBytes bounds what a prediction reads of an image in all. Python with pandas
	// and scipy takes 20 MB.
	maxReadBytes = 128 << 20
	// maxTextBytes is the largest file that is read for what it refers to.
	maxTextBytes = 4 << 20
)

// reader reads files of a view, within the bounds. Once a read failed, all do.
type reader struct {
	*work
	view   View
	unread int64 // bytes that may still be read
}

// at reads a part of e; nil after an error or at the end.
func (r *reader) at(e *Entry, offset, n int64) []byte {
	n = min(n, e.Size-offset)
	if r.err != nil || offset < 0 || n <= 0 {
		return nil
	}
	if r.unread -= n; r.unread < 0 {
		r.err = errSpent
		return nil
	}
	if r.ctx.Err() != nil {
		r.err = context.Cause(r.ctx)
		return nil
	}
	b, err := r.view.Read(r.ctx, e.Layer, e, offset, n)
	if err == nil && int64(len(b)) != n {
		err = fmt.Errorf("%w: %d bytes at %d, want %d", io.ErrUnexpectedEOF, len(b), offset, n)
	}
	if err != nil {
		r.err = fmt.Errorf("read %.100q of layer %d: %w", e.Path, e.Layer, err)
		return nil
	}
	return b
}

// text is all of a file that is small enough to be looked into, else nil.
func (r *reader) text(e *Entry) []byte {
	if e == nil || !e.Regular() || e.Size > maxTextBytes {
		return nil
	}
	return r.at(e, 0, e.Size)
}
