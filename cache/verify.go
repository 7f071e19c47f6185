package cache

import (
	"context"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
)

// verify checks the digest of b when all of it is there. Mostly the bytes were
// hashed on their way into the file; the rest is read from it.
func (s *Store) verify(ctx context.Context, b *blob) error {
	s.mu.Lock()
	if b.gone != nil {
		defer s.mu.Unlock()
		return b.gone
	}
	l := b.live
	if b.complete || b.missing > 0 || l.verifying {
		s.mu.Unlock()
		return nil
	}
	l.verifying = true
	if l.hash == nil {
		l.hash, l.hashed = newHash(b.digest), 0
	}
	s.mu.Unlock()

	err := hashFrom(ctx, l.hash, l.file, l.hashed, b.size)
	got := digest.NewDigest(b.digest.Algorithm(), l.hash)
	s.mu.Lock()
	l.verifying = false
	l.hash, l.hashed = nil, 0
	if err == nil && got == b.digest && b.gone == nil {
		s.completed(b)
		s.mu.Unlock()
		return nil
	}
	b.wake()
	s.mu.Unlock()
	if ctx.Err() != nil {
		return ctx.Err() // it is checked again when somebody wants it
	}
	if err != nil {
		s.lose(&b.item, fmt.Errorf("%w: blob %s: %w", ErrDamaged, b.digest, err))
		return localError{err}
	}
	err = fmt.Errorf("%w: blob %s has digest %s", ErrDigest, b.digest, got)
	s.lose(&b.item, err)
	return err
}

// completed notes that b is all there and checked; s.mu is held.
func (s *Store) completed(b *blob) {
	b.complete, b.parts, b.missing = true, nil, 0
	s.markDirty(b)
	b.wake()
}

// hashFrom feeds bytes [from, size) of file to h.
func hashFrom(ctx context.Context, h hash.Hash, file *os.File, from, size int64) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for from < size {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		n, err := file.ReadAt((*buf)[:min(int64(len(*buf)), size-from)], from)
		h.Write((*buf)[:n])
		from += int64(n)
		if err != nil && from < size {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// checkFile reports ErrDigest when the file is not d.
func checkFile(ctx context.Context, file *os.File, d digest.Digest, size int64) error {
	h := newHash(d)
	if err := hashFrom(ctx, h, file, 0, size); err != nil {
		return err
	}
	if got := digest.NewDigest(d.Algorithm(), h); got != d {
		return fmt.Errorf("%w: %s has digest %s", ErrDigest, file.Name(), got)
	}
	return nil
}
