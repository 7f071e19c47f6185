package cache

import (
	"context"
	"errors"
	"fmt"
	"os"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Report says what Check or GC found and did.
type Report struct {
	CheckedBlobs int   `json:"checkedBlobs"` // read and hashed
	CheckedBytes int64 `json:"checkedBytes"`
	// PartialBlobs are not complete: nothing to check them against.
	PartialBlobs int `json:"partialBlobs"`
	// Damaged were dropped: content or size not as it was, or the file was gone.
	Damaged []digest.Digest `json:"damaged,omitempty"`
	// AdoptedBlobs were files that the index did not know and whose digest is right;
	// RemovedFiles those that were no good.
	AdoptedBlobs int `json:"adoptedBlobs"`
	RemovedFiles int `json:"removedFiles"`
	// RemovedBlobs were evicted by GC; FreedBytes is what that and RemovedFiles gave back.
	RemovedBlobs int   `json:"removedBlobs"`
	FreedBytes   int64 `json:"freedBytes"`
}

// Check reads every complete blob again and drops what is damaged (also what is pinned; the
// pin stays). progress, which may be nil, is told the bytes read so far and to read. It may run
// beside everything else.
func (s *Store) Check(ctx context.Context, progress func(done, total int64)) (Report, error) {
	var rep Report
	if err := s.sweep(ctx, &rep); err != nil {
		return rep, err
	}
	total := int64(0)
	var all []Entry
	for _, e := range s.List() {
		if !e.Complete {
			rep.PartialBlobs++
			continue
		}
		all = append(all, e)
		total += e.SizeBytes
	}
	for _, e := range all {
		if err := s.checkBlob(ctx, e.Digest, &rep); err != nil {
			return rep, err
		}
		if progress != nil {
			progress(rep.CheckedBytes, total)
		}
	}
	return rep, s.commit()
}

// checkBlob reads one blob again; one that is gone by now is no error.
func (s *Store) checkBlob(ctx context.Context, d digest.Digest, rep *Report) error {
	s.mu.Lock()
	b := s.blobs[d]
	if s.closed || b == nil || !b.complete {
		defer s.mu.Unlock()
		if s.closed {
			return ErrClosed
		}
		return nil
	}
	b.alive().readers++ // so that it stays
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		b.live.readers--
		s.release(b)
	}()
	file, err := openSized(s.path(d), os.O_RDONLY, b.size)
	if err == nil {
		defer file.Close()
		err = checkFile(ctx, file, d, b.size)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	rep.CheckedBlobs++
	rep.CheckedBytes += b.size
	if err != nil {
		rep.Damaged = append(rep.Damaged, d)
		s.lose(b, fmt.Errorf("%w: blob %s: %w", ErrDamaged, d, err))
	}
	return nil
}

// GC evicts down to the budget and the free floor, and removes blobs that are not
// complete and that nobody fills, files that are no content, and an index that was set aside.
func (s *Store) GC(ctx context.Context) (Report, error) {
	var rep Report
	if err := s.sweep(ctx, &rep); err != nil {
		return rep, err
	}
	before := s.held()
	s.mu.Lock()
	for _, b := range s.order.all() {
		if !b.complete && b.evictable() {
			s.dropNow(b, fmt.Errorf("%w: removed", accel.ErrNotFound))
		}
	}
	s.mu.Unlock()
	err := s.makeRoom(0)
	after := s.held()
	rep.RemovedBlobs = max(before.blobs-after.blobs, 0) // others may have come meanwhile
	rep.FreedBytes += max(before.bytes-after.bytes, 0)
	if info, statErr := os.Stat(s.index.asidePath()); statErr == nil {
		if err := os.Remove(s.index.asidePath()); err != nil {
			return rep, err
		}
		rep.RemovedFiles++
		rep.FreedBytes += info.Size()
	}
	return rep, errors.Join(err, s.commit())
}
