package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	// maxFills bounds the fills that fetch at a time, and with stepBytes their
	// memory (16 MiB); maxLowFills those at low priority.
	maxFills    = 64
	maxLowFills = 4
	// maxBlobFills bounds the fills of one blob.
	maxBlobFills = 8
	// stepBytes are written and shown to readers at a time, or less when they took
	// longer than stepTime to come. A reader is woken for each.
	stepBytes = 256 << 10
	stepTime  = 20 * time.Millisecond
	// jumpBytes is how far ahead of a fill a reader waits for it; one that wants more
	// distant parts gets a fill of its own.
	jumpBytes = 8 << 20
	// skipParts are read over in a stream; to pass more, another one is opened.
	skipParts = 4
	// smallBytes and half of the size are what a fill that nobody waits for is finished for.
	smallBytes = 16 << 20
	// idleGrace is how long another one goes on.
	idleGrace = 10 * time.Second
	// pauseTime is how long a stream is held open while its fill waits for others.
	pauseTime = 5 * time.Second
)

// fill is one goroutine that brings a run of a blob's parts.
type fill struct {
	b       *blob
	fetcher Fetcher
	by      *Reader // who began it

	// Guarded by Store.mu:
	first, next, end int64 // parts: begun with; being written or to be written next; where it ends
	writing          bool
	shown            int64 // of the part next, up to here it is in the file
	peer             bool
	low              bool
	fetching         bool // has a slot
	counted          bool // in Store.demand
	reserved         int64
	idled            bool // ended because nobody waited for it
	done             bool
	err              error
	cancel           context.CancelFunc // nil until it runs

	saved hash.Hash // the blob's hash at the start of part next; only where that part is fed to it
}

var buffers = sync.Pool{New: func() any { b := make([]byte, stepBytes); return &b }}

// localError is a failure of ours, not of the source: readers are served without
// caching.
type localError struct{ error }

func (e localError) Unwrap() error { return e.error }

// startFill begins to bring the parts of r's blob from first to end, as far as they are
// missing and no other fill is at them. s.mu is held.
func (s *Store) startFill(r *Reader, first, end int64) (*fill, error) {
	b := r.b
	if s.ended {
		return nil, ErrClosed
	}
	run := first
	for run < end && !b.has(run) && b.owner(run) == nil {
		run++
	}
	l := b.alive()
	if l.unranged { // all of it comes anyway
		first, run = b.firstMissing(0), partsOf(b.size)
	}
	fl := &fill{b: b, fetcher: r.fetcher, by: r, first: first, next: first, end: run, low: r.low}
	l.fills = append(l.fills, fl)
	s.fills.Add(1)
	if s.run == nil {
		s.early = append(s.early, fl)
	} else {
		go s.fill(fl)
	}
	return fl, nil
}

// fill is the goroutine of one fill.
func (s *Store) fill(f *fill) {
	ctx, cancel := context.WithCancel(s.run)
	defer cancel()
	s.mu.Lock()
	f.cancel = cancel
	s.mu.Unlock()
	err := f.b.openFile(s, f)
	if err == nil {
		err = s.fetchRun(ctx, f)
	}
	if err == nil {
		err = s.verify(ctx, f.b)
	}
	if err != nil && s.run.Err() != nil {
		err = fmt.Errorf("%w: the store is shutting down", ErrClosed)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropFill(f, err)
}

// dropFill ends f; s.mu is held.
func (s *Store) dropFill(f *fill, err error) {
	b := f.b
	if f.writing {
		s.tear(f)
	}
	f.done, f.err = true, err
	s.setFetching(f, false)
	s.unreserve(f, f.reserved)
	l := b.live
	for i, other := range l.fills {
		if other == f {
			l.fills = append(l.fills[:i], l.fills[i+1:]...)
			break
		}
	}
	if b.gone == nil && l.file != nil {
		s.markDirty(b) // for what the file system says that it takes
	}
	b.wake()
	s.release(b)
	s.fills.Done()
	s.m.fillEnded(f)
}

// tear notes how far the part was shown that f did not finish.
func (s *Store) tear(f *fill) {
	l, start := f.b.live, f.next*partBytes
	f.writing = false
	if f.shown > start {
		if l.torn == nil {
			l.torn = map[int64]int64{}
		}
		l.torn[f.next] = max(l.torn[f.next], f.shown)
	}
	if l.hashed > start && l.hashed < f.b.partEnd(f.next) {
		if f.saved == nil {
			l.hash, l.hashed = nil, 0
		} else {
			l.hash, l.hashed = f.saved, start
		}
	}
}

// release forgets what nobody needs any more of b; s.mu is held.
func (s *Store) release(b *blob) {
	l := b.live
	if l == nil || l.readers > 0 || len(l.fills) > 0 || l.verifying {
		return
	}
	if b.gone == nil && !b.complete && b.missing == partsOf(b.size) {
		s.forget(b) // nothing of it came
	}
	if !l.dirty && !l.syncing {
		if l.file != nil {
			l.file.Close()
		}
		b.live = nil
	}
}

// openFile makes l.file.
func (b *blob) openFile(s *Store, f *fill) error {
	l := b.live
	l.opening.Lock()
	defer l.opening.Unlock()
	s.mu.Lock()
	gone, there, opened := b.gone, b.complete || b.missing < partsOf(b.size), l.file != nil
	s.mu.Unlock()
	if gone != nil {
		return gone
	}
	if opened {
		return nil
	}
	path := s.path(b.digest)
	if there {
		file, err := openSized(path, os.O_RDWR, b.size)
		if err != nil {
			s.lose(b, fmt.Errorf("%w: blob %s: %w", ErrDamaged, b.digest, err))
			return localError{err}
		}
		s.setFile(b, file, false)
		return nil
	}
	if err := s.clearTomb(b.digest); err != nil {
		return localError{err}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return localError{err}
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, os.ErrExist) {
		return b.takeOver(s, path)
	}
	if err != nil {
		return localError{err}
	}
	if err := file.Truncate(b.size); err != nil {
		file.Close()
		return localError{errors.Join(err, os.Remove(path))}
	}
	s.setFile(b, file, true)
	return nil
}

func (s *Store) setFile(b *blob, file *os.File, isNew bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.live.file, b.live.isNew = file, isNew
}

// takeOver looks at a file that the index does not know: when the digest is right, it is the blob.
func (b *blob) takeOver(s *Store, path string) error {
	file, err := openSized(path, os.O_RDWR, b.size)
	if err == nil {
		if err = checkFile(s.run, file, b.digest, b.size); err == nil {
			s.mu.Lock()
			b.live.file, b.live.isNew = file, true
			s.completed(b)
			if n, err := allocatedOf(file); err == nil {
				s.allocate(b, n)
			}
			s.mu.Unlock()
			return nil
		}
		file.Close()
		if s.run.Err() != nil {
			return err
		}
	}
	// What was in part there when the process died, or is no content.
	if err := os.Remove(path); err != nil {
		return localError{err}
	}
	file, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return localError{err}
	}
	if err := file.Truncate(b.size); err != nil {
		file.Close()
		return localError{errors.Join(err, os.Remove(path))}
	}
	s.setFile(b, file, true)
	return nil
}

func openSized(path string, flag int, size int64) (*os.File, error) {
	file, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && info.Size() != size {
		err = fmt.Errorf("%s has %d bytes, not %d", path, info.Size(), size)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// fetchRun brings f's run, by one stream or, where one ends early but got on, several.
func (s *Store) fetchRun(ctx context.Context, f *fill) error {
	for {
		if err := s.yield(ctx, f); err != nil {
			return err
		}
		slot, err := s.takeSlot(ctx, f)
		if err != nil {
			return err
		}
		before, more, err := s.plan(f)
		if err == nil && more > 0 {
			err = s.fetchOnce(ctx, f, before, more)
		}
		<-slot
		s.mu.Lock()
		s.setFetching(f, false)
		got, end := f.next-before, f.next >= f.end
		s.mu.Unlock()
		var local localError
		switch {
		case err == nil && (end || more == 0):
			return nil
		case err == nil:
		case ctx.Err() != nil || got <= 0 || errors.As(err, &local) || errors.Is(err, ErrDigest):
			return err
		default:
			s.o.Log.Debug("a fetch ended early and is continued", "blob", f.b.digest, "part", before+got, "err", err)
		}
	}
}

// takeSlot waits for the right to fetch and returns where to give it back.
func (s *Store) takeSlot(ctx context.Context, f *fill) (chan struct{}, error) {
	s.mu.Lock()
	slots := s.slots
	if f.low {
		slots = s.lowSlots
	}
	s.mu.Unlock()
	select {
	case slots <- struct{}{}:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.setFetching(f, true)
		return slots, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// plan moves f to the next part that it has to bring and reserves room for what it
// will bring in one go: from that part, and how many bytes.
func (s *Store) plan(f *fill) (part, length int64, err error) {
	s.mu.Lock()
	b := f.b
	if b.gone != nil {
		defer s.mu.Unlock()
		return 0, 0, b.gone
	}
	for f.next < f.end && b.has(f.next) {
		f.next++
	}
	need := int64(0)
	stop := f.next
	for p := f.next; p < f.end; p++ {
		if !b.has(p) {
			need += b.partEnd(p) - p*partBytes
			stop = p + 1
		}
	}
	length = 0
	if stop > f.next {
		length = b.partEnd(stop-1) - f.next*partBytes
	}
	part = f.next
	need -= f.reserved
	s.mu.Unlock()
	if length > 0 && need > 0 {
		err = s.reserve(f, need)
	}
	return part, length, err
}

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
			s.lose(b, err)
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
			s.lose(b, fmt.Errorf("%w: %w", ErrDamaged, err))
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
	s.allocate(b, b.allocated+n)
	s.unsynced += n
	s.markDirty(b)
	if s.unsynced >= commitBytes {
		s.kickCommit()
	}
}

// markDirty has the next commit write b's row; s.mu is held.
func (s *Store) markDirty(b *blob) {
	b.alive().dirty = true
	s.dirty[b] = struct{}{}
}

func (s *Store) kickCommit() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}
