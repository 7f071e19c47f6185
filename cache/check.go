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
	// CheckedLayers were read, and what they have of their chunks hashed. Of UncheckedLayers only the files about them
	// were: nothing here can check chunks.
	CheckedLayers   int `json:"checkedLayers"`
	UncheckedLayers int `json:"uncheckedLayers"`
	// WrongChunks of layers were not as they had been written. Their marks were taken away: they are fetched again.
	WrongChunks int `json:"wrongChunks"`
	// Damaged were dropped: content or size not as it was, or a file was gone.
	Damaged []digest.Digest `json:"damaged,omitempty"`
	// AdoptedBlobs and AdoptedLayers were files that the index did not know and whose digests are right;
	// RemovedFiles those that were no good (the folder of a layer counts as one).
	AdoptedBlobs  int `json:"adoptedBlobs"`
	AdoptedLayers int `json:"adoptedLayers"`
	RemovedFiles  int `json:"removedFiles"`
	// RemovedBlobs and RemovedLayers were evicted by GC; FreedBytes is what that and RemovedFiles gave back.
	RemovedBlobs  int   `json:"removedBlobs"`
	RemovedLayers int   `json:"removedLayers"`
	FreedBytes    int64 `json:"freedBytes"`
}

// Check reads every complete blob and every layer again and drops what is damaged (also what is pinned; the
// pin stays): of a layer, wrong chunks only, unless the files about it are. progress, which may be nil, is told the bytes read so far and to read. It may run
// beside everything else.
func (s *Store) Check(ctx context.Context, progress func(done, total int64)) (Report, error) {
	var rep Report
	if err := s.sweep(ctx, &rep); err != nil {
		return rep, err
	}
	total := int64(0)
	var all []Entry
	for _, e := range s.List() {
		if e.Form == FormBlob && !e.Complete {
			rep.PartialBlobs++
			continue
		}
		if e.Form == FormLayer && s.o.VerifyLayer == nil {
			e.PresentBytes = 0 // what is read of it is little
		}
		all = append(all, e)
		total += e.PresentBytes
	}
	for _, e := range all {
		var err error
		if e.Form == FormLayer {
			err = s.checkLayer(ctx, e, &rep, func(done int64) {
				if progress != nil {
					progress(done, total)
				}
			})
		} else {
			err = s.checkBlob(ctx, e.Digest, &rep)
		}
		if err != nil {
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
		s.lose(&b.item, fmt.Errorf("%w: blob %s: %w", ErrDamaged, d, err))
	}
	return nil
}

// checkLayer reads one layer again; one that is gone by now is no error. progress is told how much was
// read of everything.
func (s *Store) checkLayer(ctx context.Context, e Entry, rep *Report, progress func(done int64)) error {
	s.mu.Lock()
	l := s.layers[e.Digest]
	if s.closed || l == nil {
		defer s.mu.Unlock()
		if s.closed {
			return ErrClosed
		}
		return nil
	}
	l.checks++ // so that it stays
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		l.checks--
	}()
	before := rep.CheckedBytes
	wrong, err := l.verify(ctx, func(bytes int64) {
		rep.CheckedBytes = min(rep.CheckedBytes+bytes, before+e.PresentBytes)
		progress(rep.CheckedBytes)
	})
	rep.CheckedBytes = before + e.PresentBytes
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case noDescriptors(err):
		return fmt.Errorf("check layer %s: %w", e.Digest, err)
	case err != nil:
		rep.CheckedLayers++
		rep.Damaged = append(rep.Damaged, e.Digest)
		s.lose(&l.item, fmt.Errorf("%w: layer %s: %w", ErrDamaged, e.Digest, err))
		return nil
	case s.o.VerifyLayer == nil:
		rep.UncheckedLayers++
		return nil
	}
	rep.CheckedLayers++
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := l.unmark(wrong); n > 0 && l.gone == nil {
		s.dirtyLayers[l] = struct{}{}
		rep.WrongChunks += n
		s.m.wrongChunks.Add(float64(n))
		s.o.Log.Warn("chunks of a layer were not as they had been written; they are fetched again", "layer", e.Digest, "chunks", n)
	}
	return nil
}

// verify returns the chunks that are not as they have to be; an error where the files about them are not.
func (l *Layer) verify(ctx context.Context, progress func(bytes int64)) (wrong []int, err error) {
	if err := l.info.intact(l.s.layerDir(l.digest)); err != nil || l.s.o.VerifyLayer == nil {
		return nil, err
	}
	return l.s.o.VerifyLayer(ctx, l.digest, l.Files(), l.Has(), progress)
}

// GC evicts down to the budget and the free floor, and removes blobs that are not
// complete and that nobody fills, files that are no content, and an index that was set aside.
// Layers that are not complete stay: what a mount reads of them is all that it wants.
func (s *Store) GC(ctx context.Context) (Report, error) {
	var rep Report
	if err := s.sweep(ctx, &rep); err != nil {
		return rep, err
	}
	before := s.held()
	s.mu.Lock()
	for _, i := range s.order.all() {
		if i.blob != nil && !i.blob.complete && i.evictable() {
			s.dropNow(i, fmt.Errorf("%w: removed", accel.ErrNotFound))
		}
	}
	s.mu.Unlock()
	err := s.makeRoom(0)
	after := s.held()
	rep.RemovedBlobs = max(before.blobs-after.blobs, 0) // others may have come meanwhile
	rep.RemovedLayers = max(before.layers-after.layers, 0)
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
