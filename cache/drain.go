package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"time"
)

func (s *Store) fetchOnce(ctx context.Context, f *fill, part, length int64) error {
	offset := part * partBytes
	st, err := f.fetcher.Fetch(ctx, offset, length)
	if err != nil {
		return fmt.Errorf("blob %s, bytes from %d: %w", f.b.digest, offset, err)
	}
	defer st.Close()
	if st.From > offset || st.From < 0 {
		return fmt.Errorf("blob %s: asked for bytes from %d, got them from %d", f.b.digest, offset, st.From)
	}
	s.mu.Lock()
	f.peer = st.Peer
	if st.From < offset {
		f.b.live.unranged = true
		// What comes before is taken where it is missing and there is room for it.
		f.next = (st.From + partBytes - 1) / partBytes
		f.first = min(f.first, f.next)
		f.end = partsOf(f.b.size)
	}
	s.mu.Unlock()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	d := drain{s: s, f: f, st: st, at: st.From, buf: *buf}
	if err := d.all(ctx); err != nil {
		s.mu.Lock()
		if f.writing {
			s.tear(f)
		}
		s.mu.Unlock()
		return fmt.Errorf("blob %s, at byte %d of %d: %w", f.b.digest, d.at, f.b.size, err)
	}
	return nil
}

// drain takes one stream into the file.
type drain struct {
	s   *Store
	f   *fill
	st  Stream
	at  int64 // of the stream's next byte
	buf []byte
}

func (d *drain) all(ctx context.Context) error {
	for {
		part, write, ok, err := d.nextPart()
		if err != nil || !ok {
			return err
		}
		if write {
			if err := d.s.reservePart(d.f, part); err != nil {
				return err
			}
		}
		if err := d.pass(ctx, part*partBytes); err != nil {
			return err
		}
		if write {
			err = d.write(ctx, part)
		} else if err = d.pass(ctx, d.f.b.partEnd(part)); err == nil {
			d.s.mu.Lock()
			d.f.next = part + 1
			d.s.mu.Unlock()
		}
		if err != nil {
			return err
		}
		closed, err := d.s.pause(ctx, d.f)
		if err != nil || closed {
			return err
		}
	}
}

// nextPart says what is to be done next; ok is false where this stream has nothing more to give.
func (d *drain) nextPart() (part int64, write, ok bool, err error) {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	f, b := d.f, d.f.b
	if b.gone != nil {
		return 0, false, false, b.gone
	}
	next := f.next
	for next < f.end && (b.has(next) || b.written(next, f)) {
		next++
	}
	switch {
	case f.next >= f.end || next >= f.end:
		f.next = f.end
		return 0, false, false, nil
	case next-f.next > skipParts && !b.live.unranged:
		f.next = next // another stream from there
		return 0, false, false, nil
	}
	part = f.next
	if part < next {
		return part, false, true, nil
	}
	f.writing, f.shown, f.saved = true, part*partBytes, nil
	l := b.live
	if part == 0 && l.hash == nil {
		l.hash = newHash(b.digest)
	}
	if l.hash != nil && l.hashed == part*partBytes {
		f.saved = cloneHash(l.hash)
	}
	return part, true, true, nil
}

// written reports whether another fill than f writes the part just now.
func (b *blob) written(part int64, f *fill) bool {
	for _, other := range b.live.fills {
		if other != f && other.writing && other.next == part {
			return true
		}
	}
	return false
}

func cloneHash(h hash.Hash) hash.Hash {
	if c, ok := h.(hash.Cloner); ok {
		if copied, err := c.Clone(); err == nil {
			return copied
		}
	}
	return nil
}

// pass reads over the stream up to offset to.
func (d *drain) pass(ctx context.Context, to int64) error {
	for d.at < to {
		n, err := d.read(ctx, d.buf[:min(int64(len(d.buf)), to-d.at)])
		d.at += int64(n)
		if err != nil && d.at < to {
			return err
		}
	}
	return nil
}

func (d *drain) read(ctx context.Context, p []byte) (int, error) {
	n, err := d.st.Read(p)
	d.s.m.filled(n, d.st.Peer)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // at the end of the blob nobody looks at it
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return n, err
}

// write takes one part from the stream, in steps.
func (d *drain) write(ctx context.Context, part int64) error {
	end := d.f.b.partEnd(part)
	n, began := 0, time.Now()
	for d.at+int64(n) < end {
		left := min(int64(len(d.buf)), end-d.at)
		k, err := d.read(ctx, d.buf[n:left])
		n += k
		whole := int64(n) == left
		if whole || (n > 0 && time.Since(began) > stepTime) {
			if err := d.step(part, d.buf[:n]); err != nil {
				return err
			}
			d.at += int64(n)
			n, began = 0, time.Now()
		}
		if err != nil && d.at < end {
			return err
		}
	}
	return nil
}

// step writes data at d.at and shows it to readers.
func (d *drain) step(part int64, data []byte) error {
	f, b, s := d.f, d.f.b, d.s
	l := b.live
	s.mu.Lock()
	feed := f.saved != nil && l.hash != nil && l.hashed == d.at
	torn, file := l.torn[part], l.file
	s.mu.Unlock()
	if torn > d.at {
		// Readers were given these bytes from an earlier stream.
		was := make([]byte, min(int64(len(data)), torn-d.at))
		if _, err := file.ReadAt(was, d.at); err != nil {
			return localError{err}
		}
		if !bytes.Equal(was, data[:len(was)]) {
			err := fmt.Errorf("%w: blob %s: the same bytes came twice and were different", ErrDigest, b.digest)
			s.lose(&b.item, err)
			return err
		}
	}
	if err := s.writeAt(b, file, data, d.at); err != nil {
		return err
	}
	if feed {
		l.hash.Write(data)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.gone != nil {
		return b.gone
	}
	if feed {
		l.hashed += int64(len(data))
	}
	f.shown = d.at + int64(len(data))
	if f.shown == b.partEnd(part) {
		s.partDone(f, part)
	}
	b.wake()
	return nil
}

// writeAt writes; on a full disk it evicts and tries again.
func (s *Store) writeAt(b *blob, file *os.File, data []byte, at int64) error {
	for {
		_, err := file.WriteAt(data, at)
		if err == nil {
			return nil
		}
		if !noSpace(err) {
			s.lose(&b.item, fmt.Errorf("%w: %w", ErrDamaged, err))
			return localError{err}
		}
		if evicted := s.evict(partBytes); !evicted {
			return localError{fmt.Errorf("%w: %w", ErrNoSpace, err)}
		}
	}
}

// partDone marks a part; s.mu is held.
func (s *Store) partDone(f *fill, part int64) {
	b := f.b
	f.writing, f.next = false, part+1
	delete(b.live.torn, part)
	if b.has(part) {
		return
	}
	b.parts.set(part)
	b.missing--
	n := b.partEnd(part) - part*partBytes
	s.unreserve(f, min(n, f.reserved))
	s.allocate(&b.item, b.allocated+n)
	s.unsynced += n
	s.markDirty(b)
	if s.unsynced >= commitBytes {
		s.kickCommit()
	}
}
